"""A data set as arrays: read through TFDS once, then from one file beside the TFDS records.

The cache is hashed on every load, and MNIST, wherever it came from, against a constant.
"""

import contextlib
import hashlib
import io
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlp_jax.data import sources
from mlp_jax.records.rows import replacing, set_aside
from mlp_jax.training.config import UserError, one_line

# SHA-256 of MNIST's four arrays as Split has them, in the order of TFDS's records.
MNIST_SHA256 = "bd58c4704eea5663d1e60918ceccceebe201a1af6e8a8ebe8c86a631515c2c48"
CACHE = "mlp_jax.cache"  # the SHA-256 of an .npz, and the .npz


class Split(NamedTuple):
    images: np.ndarray  # uint8 [n, 784]
    labels: np.ndarray  # int32 [n]


class Dataset(NamedTuple):
    train: Split
    test: Split
    n_classes: int
    fingerprint: str  # SHA-256 (hex) of the training images in TFDS's order


def load_dataset(
    name: str = "mnist",
    data_dir: str | Path | None = None,
    manual_dir: str | Path | None = None,
    quiet: bool = False,
) -> Dataset:
    """The TFDS data set `name` in NumPy arrays, downloaded and prepared where it is missing.

    `data_dir` defaults to TFDS's own choice. Raises UserError where the data cannot be had or
    is not what was published.
    """
    data_dir = Path(data_dir or os.getenv("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    manual_dir = Path(manual_dir).expanduser() if manual_dir else None
    # Files given by hand are to be checked, which only `sources.prepare` does.
    directory = None if manual_dir else _cached_directory(name, data_dir)
    if directory is None:
        directory = Path(sources.prepare(name, data_dir, manual_dir, quiet).data_dir)
    dataset = _read_cache(directory)
    if dataset is None:
        dataset = _decode(directory, quiet)
        _write_cache(directory, dataset)
    if name == "mnist":
        content = hashlib.sha256()
        for array in (*dataset.train, *dataset.test):
            content.update(array)
        if content.hexdigest() != MNIST_SHA256:
            raise UserError(f"{directory} does not hold MNIST as it was published: remove it")
    return dataset


def _cached_directory(name: str, data_dir: Path) -> Path | None:
    """The newest version's directory that has a cache, found without importing TFDS."""
    if not sources.NAME.fullmatch(name):
        return None
    # TFDS's unfinished directories begin with another character than a digit.
    directories = [cache.parent for cache in (data_dir / name).glob(f"[0-9]*.*.*/{CACHE}")]
    return max(directories, key=lambda d: [*map(int, re.findall(r"\d+", d.name))], default=None)


def _decode(directory: Path, quiet: bool) -> Dataset:
    from tqdm import tqdm

    splits = []
    try:
        with sources.hushed(quiet) as tfds:
            builder = tfds.builder_from_directory(directory)
            for split in ("train", "test"):
                bar = tqdm(builder.as_data_source(split), f"Decoding {split}", disable=quiet)
                images, labels = zip(*((e["image"].ravel(), e["label"]) for e in bar), strict=True)
                splits.append(Split(np.stack(images), np.array(labels, np.int32)))
    except Exception as error:  # array_record, protobuf and Pillow each raise their own
        reason = one_line(error)
        raise UserError(f"{directory} cannot be read ({reason}): remove it") from error
    fingerprint = hashlib.sha256(splits[0].images).hexdigest()
    return Dataset(*splits, builder.info.features["label"].num_classes, fingerprint)


def _read_cache(directory: Path) -> Dataset | None:
    """The cached data set, or None; a damaged file is announced and set aside."""
    path = directory / CACHE
    try:
        content = memoryview(path.read_bytes())
    except OSError:
        return None
    digest, npz = content[:32], content[32:]
    if hashlib.sha256(npz).digest() != digest:
        set_aside(path, "its SHA-256 is another")
        return None
    *arrays, n_classes = np.load(io.BytesIO(npz)).values()
    fingerprint = hashlib.sha256(arrays[0]).hexdigest()
    return Dataset(Split(*arrays[:2]), Split(*arrays[2:]), int(n_classes), fingerprint)


def _write_cache(directory: Path, dataset: Dataset) -> None:
    """Writes the cache whole or not at all: where the directory is read-only, not at all."""
    npz = io.BytesIO()
    np.savez(npz, *dataset.train, *dataset.test, dataset.n_classes)
    with contextlib.suppress(OSError), replacing(directory / CACHE) as unfinished:
        unfinished.write_bytes(hashlib.sha256(npz.getvalue()).digest() + npz.getvalue())
