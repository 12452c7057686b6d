"""A data set as arrays, and how a Config is fitted to it."""

import dataclasses
import hashlib
import math
from typing import Any, Literal, NamedTuple

import numpy as np

from mlp_jax.errors import UserError
from mlp_jax.training.config import Config

N_PIXELS = 28 * 28


class Split(NamedTuple):
    images: np.ndarray  # uint8 [n, 784]
    labels: np.ndarray  # int32 [n]


class Teacher(NamedTuple):
    """A committee whose mean prediction is learned in place of the labels."""

    params: dict  # [members, ...] by layer and name
    digest: str  # the first half of their SHA-256, in hex


class Dataset(NamedTuple):
    name: str
    train: Split
    test: Split
    n_classes: int
    fingerprint: str  # SHA-256 (hex) of all four arrays, in TFDS's order
    image_fingerprint: str = ""  # of the training images alone, as in older records
    # what `test` holds: the test set, or validation images held out of `train`
    split: Literal["test", "validation"] = "test"
    teacher: Teacher | None = None

    @property
    def arrays(self) -> tuple[Split, Split, Any]:
        """What is put on the devices: both splits, and the teacher's weights or ()."""
        return self.train, self.test, self.teacher.params if self.teacher else ()


def make_dataset(name: str, train: Split, test: Split, n_classes: int) -> Dataset:
    """A Dataset with its fingerprints, of read-only copies of the arrays.

    UserError for fewer than two images in a split, over 256 classes, or arrays unlike Split's.
    """
    if n_classes > 256:
        raise UserError(f"{name} has {n_classes} classes; at most 256 are supported")
    train, test = (Split(*map(_copy, split)) for split in (train, test))
    for split, (images, labels) in (("training", train), ("test", test)):
        if len(images) < 2:
            raise UserError(f"{name} has {len(images)} {split} images; at least two are needed")
        if images.dtype != np.uint8 or images.shape[1:] != (N_PIXELS,):
            given = f"{images.dtype} {list(images.shape)}"
            raise UserError(f"{name}: {split} images must be uint8 [n, {N_PIXELS}], not {given}")
        is_label = np.isin(labels, np.arange(n_classes))
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or not is_label.all():
            wanted = f"an integer from 0 to {n_classes - 1} for each image"
            raise UserError(f"{name}: the {split} labels must be {wanted}")
    return Dataset(name, train, test, n_classes, *fingerprints(train, test))


def _copy(array: np.ndarray) -> np.ndarray:
    copy = np.array(array, np.asarray(array).dtype.newbyteorder("="), order="C")
    copy.flags.writeable = False  # on CPU the devices share its memory
    return copy


def fingerprints(train: Split, test: Split) -> tuple[str, str]:
    """SHA-256 (hex) of all four arrays, and of the training images alone."""
    digest = hashlib.sha256(train.images)
    images = digest.hexdigest()
    for array in (train.labels, *test):
        digest.update(array)
    return digest.hexdigest(), images


def check_unchanged(dataset: Dataset) -> None:
    """UserError if the arrays, or the teacher's, are no longer those of the fingerprint."""
    if dataset.teacher and params_digest(dataset.teacher.params) != dataset.teacher.digest:
        raise UserError("the teacher's weights were changed: call with_teacher again")
    splits = (Split(*map(np.ascontiguousarray, each)) for each in (dataset.train, dataset.test))
    if fingerprints(*splits)[0] != dataset.fingerprint:
        raise UserError(
            f"the arrays of {dataset.name} were changed after it was loaded: pass them to"
            " mlp_jax.training.arrays.make_dataset"
        )


def hold_out(dataset: Dataset) -> Dataset:
    """`dataset` with the last sixth of its training examples held out for evaluation.

    For MNIST, 50,000 and 10,000. The result lacks the test set, so settings chosen on it never
    saw the test images. UserError if that takes most examples of a class.
    """
    n_train = len(dataset.train.labels) * 5 // 6
    train, held_out = (
        Split(*(array[part] for array in dataset.train))
        for part in (slice(n_train), slice(n_train, None))
    )
    for k in range(dataset.n_classes):
        kept, lost = (np.count_nonzero(each.labels == k) for each in (train, held_out))
        if lost > kept + 5:
            of = f"{lost} of {kept + lost} examples of class {k}: shuffle them"
            raise UserError(f"the last sixth of {dataset.name} has {of}")
    made = make_dataset(dataset.name, train, held_out, dataset.n_classes)
    return made._replace(split="validation")


def with_teacher(dataset: Dataset, config: Config, params: dict) -> Dataset:
    """`dataset` with a copy of `params` as its teacher, which had that Config.

    UserError if it learned from other data.
    """
    own = config.dataset, config.split, config.n_classes
    # else a teacher that has seen the validation images would give them away
    if own != (dataset.name, dataset.split, dataset.n_classes):
        raise UserError(
            f"the teacher was trained with --dataset {config.dataset} --split {config.split}, but"
            f" this run has --dataset {dataset.name} --split {dataset.split}"
        )
    copies = {
        layer: {name: _copy(array) for name, array in leaves.items()}
        for layer, leaves in params.items()
    }
    return dataset._replace(teacher=Teacher(copies, params_digest(copies)))


def params_digest(params: dict) -> str:
    digest = hashlib.sha256()
    for layer in sorted(params):
        for name in sorted(params[layer]):
            digest.update(np.ascontiguousarray(params[layer][name]))
    return digest.hexdigest()[:32]


def for_dataset(config: Config, dataset: Dataset) -> Config:
    """`config` with what the data set decides: name, split, classes, teacher.

    UserError if they do not fit.
    """
    n_train = len(dataset.train.labels)
    if config.batch_size > n_train:
        raise UserError(
            f"batch size {config.batch_size} is larger than the {n_train} training examples"
            f" of {dataset.name}"
        )
    if (n_steps := count_steps(config, n_train)) >= 2**31:
        raise UserError(f"{config.epochs} epochs are {n_steps} steps; the limit is {2**31 - 1}")
    if config.split == "validation" != dataset.split:
        raise UserError('split="validation" needs load_dataset(..., split="validation")')
    if config.teacher and not dataset.teacher:
        raise UserError(
            f"these runs learn from committee {config.teacher[:12]}...: add --teacher DIR, or from"
            " Python pass the data set of mlp_jax.load_data(config)"
        )
    digest = dataset.teacher.digest if dataset.teacher else ""
    if config.teacher and config.teacher != digest:
        raise UserError(
            f"these runs learn from committee {config.teacher[:12]}..., not {digest[:12]}...:"
            " name another --teacher"
        )
    return dataclasses.replace(
        config,
        dataset=dataset.name,
        split=dataset.split,
        n_classes=dataset.n_classes,
        teacher=digest,
    )


def count_steps(config: Config, n_examples: int) -> int:
    """Steps of a run of epochs of so many examples; a partial one is rounded, to at least one."""
    steps = math.ceil(n_examples / config.batch_size)  # of an epoch
    return max((config.n_epochs - 1) * steps + 1, round(config.epochs * steps))
