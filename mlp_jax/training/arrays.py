"""A data set as arrays, and how a Config is fitted to it."""

import dataclasses
import hashlib
import math
from typing import Literal, NamedTuple

import numpy as np

from mlp_jax.errors import UserError
from mlp_jax.training.config import Config

N_PIXELS = 28 * 28


class Split(NamedTuple):
    images: np.ndarray  # uint8 [n, 784]
    labels: np.ndarray  # int32 [n]


class Dataset(NamedTuple):
    name: str
    train: Split
    test: Split
    n_classes: int
    fingerprint: str  # SHA-256 (hex) of all four arrays, in TFDS's order
    image_fingerprint: str = ""  # of the training images alone, as in older records
    # what `test` holds: the test set, or validation images held out of `train`
    split: Literal["test", "validation"] = "test"


def make_dataset(name: str, train: Split, test: Split, n_classes: int) -> Dataset:
    """A Dataset with its fingerprints; UserError for more classes than fit in a uint8."""
    if n_classes > 256:
        raise UserError(f"{name} has {n_classes} classes; at most 256 are supported")
    digest = hashlib.sha256(train.images)
    images = digest.hexdigest()
    for array in (train.labels, *test):
        digest.update(array)
    return Dataset(name, train, test, n_classes, digest.hexdigest(), images)


def hold_out(dataset: Dataset) -> Dataset:
    """`dataset` with the last sixth of its training examples scored, not trained on.

    For MNIST, 50,000 and 10,000. The result lacks the test set, so settings chosen on it never
    saw that.
    """
    n_train = len(dataset.train.labels) * 5 // 6
    train, held_out = (
        Split(*(array[part] for array in dataset.train))
        for part in (slice(n_train), slice(n_train, None))
    )
    made = make_dataset(dataset.name, train, held_out, dataset.n_classes)
    return made._replace(split="validation")


def for_dataset(config: Config, dataset: Dataset) -> Config:
    """`config` with the data set's name, split and classes; UserError if they do not fit."""
    n_train = len(dataset.train.labels)
    if config.batch_size > n_train:
        raise UserError(
            f"batch size {config.batch_size} is larger than the {n_train} training examples"
            f" of {dataset.name}"
        )
    if (n_steps := count_steps(config, n_train)) >= 2**31:
        raise UserError(f"{config.epochs} epochs are {n_steps} steps; the limit is {2**31 - 1}")
    return dataclasses.replace(
        config, dataset=dataset.name, split=dataset.split, n_classes=dataset.n_classes
    )


def count_steps(config: Config, n_train: int) -> int:
    """Steps of a run; a partial epoch is rounded to whole steps, at least one."""
    n_examples = n_train // 2 if config.examples == "half" else n_train
    steps = math.ceil(n_examples / config.batch_size)  # of an epoch
    return max((config.n_epochs - 1) * steps + 1, round(config.epochs * steps))
