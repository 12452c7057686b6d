"""MNIST's four IDX files: found, parsed or refused with one line, known by their SHA-256."""

import gzip
import hashlib
import io
import math
import struct
import zipfile
from pathlib import Path

import numpy as np

from mlp_jax.errors import UserError, one_line

# all of MNIST's family use these file names
PARTS = tuple(
    f"{split}-{kind}-ubyte"
    for split in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
# SHA-256 of the contents of PARTS, not of the .gz, so that any compression will do. Other data sets
# have published hashes of the compressed files only.
CONTENTS = {
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "fashion_mnist": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}


def parse_idx(data: bytes, name: str) -> np.ndarray:
    """The uint8 labels [n] or images [n, rows, columns] of an IDX file, called `name` in errors."""
    n_dims = {b"\0\0\x08\x01": 1, b"\0\0\x08\x03": 3}.get(data[:4])
    if n_dims is None:
        raise UserError(f"{name}: not an IDX file of images or labels")
    header = 4 + 4 * n_dims
    if len(data) <= header:
        raise UserError(f"{name}: truncated, it holds no examples")
    shape = struct.unpack(f">{n_dims}I", data[4:header])
    size = header + math.prod(shape)
    if len(data) != size:
        fault = "truncated" if len(data) < size else "too long"
        raise UserError(f"{name}: {fault}, {len(data)} bytes where its header says {size}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def find_part(folder: Path, part: str, url: str = "", plain: bool = True) -> Path:
    """The file of `part` in `folder`, named as at `url`, or uncompressed."""
    names = [url.rpartition("/")[2] or f"{part}.gz"]
    names += [part, part.replace("-idx", ".idx")] if plain else []
    found = [folder / name for name in names if (folder / name).is_file()]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not found:
        raise UserError(f"{folder}: has no {' or '.join(names)}")
    return found[0]


def read_part(path: Path, part: str, config: str | None = None) -> tuple[np.ndarray, str, str]:
    """The array of `part`, and the SHA-256 of its file and of its IDX contents."""
    try:
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if config:
            member = f"gzip/emnist-{config}-{part.replace('t10k', 'test')}.gz"
            data = zipfile.ZipFile(io.BytesIO(data)).read(member)
        if data.startswith(b"\x1f\x8b"):  # an uncompressed IDX file begins with two zeros
            data = gzip.decompress(data)
    except Exception as error:  # zipfile, gzip and zlib each raise their own
        raise UserError(f"{path}: truncated or unreadable ({one_line(error)})") from error
    array, wanted = parse_idx(data, str(path)), part.split("-")[1]
    size = "x".join(map(str, array.shape[1:]))
    kind = {"": "labels", "28x28": "images"}.get(size, f"{size} images")
    if kind != wanted:
        size = " of 28x28" if kind.endswith(" images") else ""
        raise UserError(f"{path}: holds {kind} where {wanted}{size} should be")
    return array, digest, hashlib.sha256(data).hexdigest()
