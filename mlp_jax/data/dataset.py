"""A data set as arrays: read through TFDS once, then from a cache file beside the TFDS records.

Every load checks the cache's hash, and MNIST, wherever it came from, against a constant.
"""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from mlp_jax.bars import progress_bar
from mlp_jax.data import sources
from mlp_jax.errors import UserError, one_line
from mlp_jax.files import check_writable, load_arrays, read_or_quarantine, save_arrays
from mlp_jax.training.arrays import N_PIXELS, Dataset, Split, hold_out, make_dataset

# SHA-256 of MNIST's four arrays, in Split's types and the order of TFDS's records.
MNIST_SHA256 = "bd58c4704eea5663d1e60918ceccceebe201a1af6e8a8ebe8c86a631515c2c48"
CACHE = "mlp_jax.npz"
SPLITS = ("train", "test")


def load_dataset(
    name: str = "mnist",
    data_dir: str | Path | None = None,
    manual_dir: str | Path | None = None,
    quiet: bool = True,
    split: Literal["test", "validation"] = "test",
) -> Dataset:
    """The TFDS data set `name` in NumPy arrays, downloaded and prepared if missing.

    `split` "validation" is `arrays.hold_out`; `data_dir` defaults to TFDS's own. UserError if the
    data are unavailable or not what was published.
    """
    if split not in ("test", "validation"):
        raise UserError(f"split must be test or validation, not {split!r}")
    try:
        data_dir = data_dir or os.getenv("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        data_dir = Path(data_dir).expanduser()
        manual_dir = Path(manual_dir).expanduser() if manual_dir else None
    except RuntimeError as error:
        raise UserError(f"{one_line(error)}: name a --data-dir") from None
    # Only `sources.prepare` checks the files in manual_dir.
    directory = None if manual_dir else _cached_directory(name, data_dir)
    made = None
    if directory is None:
        check_writable(data_dir)  # before a download
        directory, n_classes, arrays = sources.prepare(name, data_dir, manual_dir, quiet)
        made = arrays and _to_dataset(name, arrays, n_classes)
    dataset = _read_cache(name, directory)
    if dataset is None:
        dataset = made or _decode(name, directory, quiet)
        _write_cache(directory, dataset)
    if made and made.fingerprint != dataset.fingerprint:
        line = f"{directory} holds different data from {manual_dir}"
        raise UserError(f"{line}: name another --dataset, or move that directory away")
    if name == "mnist" and dataset.fingerprint != MNIST_SHA256:
        raise UserError(f"{directory} does not hold MNIST as it was published: remove it")
    return hold_out(dataset) if split == "validation" else dataset


def check_dataset(place: Path, fingerprint: str, images: str | None, dataset: Dataset) -> None:
    """UserError if the record in `place` was trained on other data than `dataset`.

    Older records hash the training images alone, and `images` is None.
    """
    here = dataset.fingerprint if images else dataset.image_fingerprint
    if here != fingerprint:
        raise UserError(
            f"{place} was trained on different data from the {dataset.name} here (SHA-256"
            f" {fingerprint[:12]}..., not {here[:12]}...)"
        )


def _cached_directory(name: str, data_dir: Path) -> Path | None:
    """The directory of the newest version if it is cached, found without importing TFDS."""
    if not sources.NAME.fullmatch(name):
        return None
    filled = {path.parent for path in (data_dir / name).glob("*/*")}
    # not TFDS's unfinished directories, nor copies such as "1.0.0 (1)"
    versions = [d for d in filled if re.fullmatch(r"\d+\.\d+\.\d+", d.name)]
    newest = max(versions, key=lambda d: [*map(int, d.name.split("."))], default=None)
    return newest if newest and (newest / CACHE).exists() else None


def _decode(name: str, directory: Path, quiet: bool) -> Dataset:
    arrays: list[tuple] = []
    try:
        with sources.hush(quiet) as tfds:
            builder = tfds.builder_from_directory(directory)
            for split in SPLITS:
                source, desc = builder.as_data_source(split), f"Decoding {split}"
                bar = progress_bar(source, quiet=quiet, desc=desc)
                arrays += zip(*((e["image"], e["label"]) for e in bar), strict=True)
            return _to_dataset(name, arrays, builder.info.features["label"].num_classes)
    except Exception as error:  # array_record, protobuf and Pillow each raise their own
        reason = one_line(error)
        raise UserError(f"{directory} cannot be read ({reason}): remove it") from error


def _to_dataset(name: str, arrays: Sequence[ArrayLike], n_classes: int) -> Dataset:
    """From images [n, 28, 28] and labels of the training set, then those of the test set."""
    train, test = (
        Split(np.asarray(images).reshape(-1, N_PIXELS), np.asarray(labels, np.int32))
        for images, labels in (arrays[:2], arrays[2:])
    )
    return make_dataset(name, train, test, n_classes)


def _read_cache(name: str, directory: Path) -> Dataset | None:
    """The cached data set, or None; a damaged file is quarantined."""
    with contextlib.suppress(OSError):  # another user's
        if content := read_or_quarantine(load_arrays, directory / CACHE):
            arrays, metadata = content
            for array in arrays.values():
                array.flags.writeable = False  # make_dataset need not copy it
            train, test = (
                Split(*(arrays[f"{split}_{part}"] for part in Split._fields)) for split in SPLITS
            )
            return make_dataset(name, train, test, metadata["n_classes"])
    return None


def _write_cache(directory: Path, dataset: Dataset) -> None:
    """Write the complete cache, or nothing if the directory is read-only."""
    arrays = {
        f"{split}_{part}": array
        for split in SPLITS
        for part, array in getattr(dataset, split)._asdict().items()
    }
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)  # the user's own data have no other files
        save_arrays(directory / CACHE, arrays, {"n_classes": dataset.n_classes})
