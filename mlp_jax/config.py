"""Settings of a run, the named recipes, and how a command line becomes them.

Imports no jax, so that `--help` and every bad flag are answered at once.
"""

import argparse
import contextlib
import dataclasses
import difflib
import io
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Literal, NoReturn, TypeVar

import tyro

Args = TypeVar("Args")
OptimizerName = Literal["sgd", "momentum", "rmsprop", "adam"]
RecipeName = Literal["keras-sgd", "keras-rmsprop", "short"]


class UserError(Exception):
    """Bad input, told in one line; the fronts print it and leave with `status`."""

    status = 2


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


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known word spelt most like `word`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def recipe_in(argv: Sequence[str] | None) -> str:
    """The recipe that a command line names, whose values are the defaults of its other flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", nargs="?", default=DEFAULT_RECIPE)
    # a flag without its value is for `parse_args` to tell
    recipe = first.parse_known_args(argv)[0].recipe or DEFAULT_RECIPE
    if recipe not in RECIPES:
        names = ", ".join(RECIPES)
        raise UserError(f"unknown recipe {recipe}{nearest(recipe, RECIPES)} (there are {names})")
    return recipe


def parse_args(
    args_type: type[Args],
    argv: Sequence[str] | None,
    *,
    default: Args | None = None,
    prog: str,
    description: str,
) -> Args:
    """Read a command line into a dataclass; UserError, in one line, for whatever cannot be read."""
    options = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        # tyro draws its errors as a box of many lines; a user, or a log, wants one
        with contextlib.redirect_stderr(said):
            return tyro.cli(args_type, prog=prog, description=description, args=argv, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        text = " ".join(re.sub("[╭╮╰╯│─]+", " ", said.getvalue()).split())
        text = re.sub(r" (Argument helptext|For full helptext).*", "", text)
        text = re.sub(r" Perhaps you meant: (--\S+).*", r"; did you mean \1?", text)
        raise UserError(text.replace("Unrecognized options Unrecognized", "unrecognized")) from None


def run_front(main: Callable[[], None]) -> NoReturn:
    """Run a front's `main` as a process: what goes wrong ends in one line and its status."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    sys.exit(0)
