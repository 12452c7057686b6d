"""A data set as arrays: read through TFDS once, then from one file beside the TFDS records.

What is loaded is what was published: the cache is hashed on every load, MNIST against a constant.
"""

import contextlib
import hashlib
import os
import re
import sys
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlp_jax import sources
from mlp_jax.config import UserError

# SHA-256 of MNIST's 60,000 training images, uint8, C order, in the order of TFDS's records.
MNIST_FINGERPRINT = "59edd5ea35c0062957306cacba8ae47e71e2c56261f4ca10230aacc14943dd3b"
CACHE = "mlp_jax.npz"
N_PIXELS = 28 * 28


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
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    data_dir = Path(data_dir or default).expanduser()
    # Files given by hand are to be checked, which only `sources.prepare` does.
    directory = None if manual_dir else _cached_directory(name, data_dir)
    dataset = _read_cache(directory) if directory else None
    if dataset is None:
        builder = sources.prepare(name, data_dir, manual_dir, quiet)
        if directory is None:
            dataset = _read_cache(directory := Path(builder.data_dir))
        if dataset is None:
            dataset = _decode(builder, quiet)
            _write_cache(directory, dataset)
    if name == "mnist" and dataset.fingerprint != MNIST_FINGERPRINT:
        raise UserError(
            f"{directory} does not hold the MNIST training images (SHA-256 {dataset.fingerprint}): "
            "remove it and run again"
        )
    return dataset


def _cached_directory(name: str, data_dir: Path) -> Path | None:
    """The newest version's directory that has a cache, found without importing TFDS."""
    if not sources.NAME.fullmatch(name):
        return None
    caches = (data_dir / name).glob(f"[0-9]*.*.*/{CACHE}")  # TFDS's unfinished ones begin otherwise
    directories = [cache.parent for cache in caches]
    return max(directories, key=lambda d: [*map(int, re.findall(r"\d+", d.name))], default=None)


def _decode(builder: Any, quiet: bool) -> Dataset:
    from tqdm import tqdm

    splits = {}
    for split in ("train", "test"):
        try:
            with sources.hushed(quiet):
                source = builder.as_data_source(split)
                images = np.empty((len(source), N_PIXELS), np.uint8)
                labels = np.empty(len(source), np.int32)
                for i, example in enumerate(tqdm(source, f"Decoding {split}", disable=quiet)):
                    images[i], labels[i] = example["image"].reshape(N_PIXELS), example["label"]
        except Exception as error:  # array_record, protobuf and Pillow each raise their own
            reason = sources.one_line(error)
            raise UserError(f"{builder.data_dir} cannot be read ({reason}): remove it") from error
        splits[split] = Split(images, labels)
    n_classes = getattr(builder.info.features["label"], "num_classes", None)
    return Dataset(
        **splits,
        n_classes=n_classes or 1 + max(int(split.labels.max()) for split in splits.values()),
        fingerprint=hashlib.sha256(splits["train"].images).hexdigest(),
    )


def _digest(dataset: Dataset) -> str:
    """SHA-256 over all a cache holds; the training images enter by their fingerprint."""
    rest = (dataset.train.labels, *dataset.test)
    shapes = [(array.dtype.str, array.shape) for array in (dataset.train.images, *rest)]
    digest = hashlib.sha256(repr((shapes, dataset.n_classes, dataset.fingerprint)).encode())
    for array in rest:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _read_cache(directory: Path) -> Dataset | None:
    """The cached data set, or None; a damaged file is announced and set aside."""
    path = directory / CACHE
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            train, test = (
                Split(stored[f"{split}_images"], stored[f"{split}_labels"])
                for split in ("train", "test")
            )
            n_classes, sha256 = int(stored["n_classes"]), str(stored["sha256"])
        fingerprint = hashlib.sha256(train.images).hexdigest()
        dataset = Dataset(train, test, n_classes, fingerprint)
        if _digest(dataset) == sha256:
            return dataset
        reason = "its hash differs"
    except FileNotFoundError:
        return None
    except Exception as error:  # a flipped bit surfaces in the zip, an npy header or a shape
        reason = sources.one_line(error)
    aside = path.with_name(f"{CACHE}.corrupt")
    print(f"{path} is damaged ({reason}): set aside as {aside.name}, made anew", file=sys.stderr)
    with contextlib.suppress(OSError):
        os.replace(path, aside)
    return None


def _write_cache(directory: Path, dataset: Dataset) -> None:
    """Writes the cache whole or not at all: where the directory is read-only, not at all."""
    unfinished = directory / f"{CACHE}.{uuid.uuid4().hex}"
    try:
        with unfinished.open("xb") as stream:
            np.savez(
                stream,
                **{
                    f"{split}_{field}": array
                    for split in ("train", "test")
                    for field, array in getattr(dataset, split)._asdict().items()
                },
                n_classes=dataset.n_classes,
                sha256=_digest(dataset),
            )
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, directory / CACHE)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
