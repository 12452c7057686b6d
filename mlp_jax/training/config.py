"""Settings of a run and the named recipes.

Imports no jax, so that `--help` and every bad flag are answered at once.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Annotated, Literal

import tyro

OptimizerName = Literal["sgd", "momentum", "rmsprop", "adam"]
RecipeName = Literal["keras-sgd", "keras-rmsprop", "short"]
Auto = Literal["auto"]


class UserError(Exception):
    """Bad input, told in one line; the fronts print it and leave with `status`."""

    status = 2

    def __init__(self, line: str):
        super().__init__(line.replace("\n", " "))  # a path may have any character


class Diverged(UserError):
    """A loss became infinite or NaN; what was written until then stays."""

    status = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides what a seed trains to; hashable, static under `jax.jit`."""

    dataset: str = "mnist"
    """TFDS data set of 28x28x1 images: mnist, fashion_mnist, kmnist, emnist/digits, ..."""
    hidden: tuple[int, ...] = (512, 512)
    """Widths of the hidden layers."""
    dropout: float = 0.2
    """Share of hidden units dropped in training, in [0, 1)."""
    optimizer: OptimizerName = "sgd"
    """Update rule; optim.py says what each one is."""
    learning_rate: float = 0.01
    """Step size, constant over the run."""
    batch_size: int = 128
    """Examples a step; a smaller last batch is averaged over what it has."""
    epochs: int = 50
    """Passes over the training set."""
    n_classes: Annotated[int, tyro.conf.Suppress] = 10
    # Set from the data set, not by hand: it is a setting because it shapes the output layer.

    def __post_init__(self):
        if self.epochs < 1:
            raise UserError(f"epochs must be at least 1, not {self.epochs}")
        if self.batch_size < 1:
            raise UserError(f"batch size must be at least 1, not {self.batch_size}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must lie in [0, 1), not {self.dropout}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(f"learning rate must be positive and finite, not {self.learning_rate}")
        if any(width < 1 for width in self.hidden):
            raise UserError(f"hidden widths must be at least 1, not {self.hidden}")


RECIPES: dict[str, Config] = {
    # The README that this project starts from; it reports 97.26 %.
    "keras-sgd": Config(),
    # The Keras example of the same net; it reports 98.40 %.
    "keras-rmsprop": Config(optimizer="rmsprop", learning_rate=1e-3, epochs=20),
    # One epoch with momentum, for studies that need thousands of runs: about 96.5 %.
    "short": Config(optimizer="momentum", learning_rate=0.1, epochs=1),
}
DEFAULT_RECIPE = "keras-sgd"

REFERENCES: dict[str, tuple[int, str]] = {
    "keras-sgd": (9726, "the Keras README"),
    "keras-rmsprop": (9840, "Keras' mnist_mlp example"),
}
"""What a recipe is held against: MNIST test images right of 10,000, and who reports it."""

STREAMS = ("init", "order", "dropout")
"""The random streams of a run, in the order of their numbers; each can be moved alone."""

HELD_SEED = 0
"""Seed of the streams that a family of runs does not vary."""


def stream_seeds(seed: int, vary: str = "all") -> tuple[int, ...]:
    """One seed a stream: `seed` for the streams that `vary` names, HELD_SEED for the rest."""
    if not 0 <= seed < 2**32:
        raise UserError(f"a seed must lie in 0 ... {2**32 - 1}, not {seed}")
    return tuple(seed if vary in ("all", stream) else HELD_SEED for stream in STREAMS)


def one_line(error: BaseException) -> str:
    """What an exception of another library has to say, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(": ")


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known word spelt most like `word`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
