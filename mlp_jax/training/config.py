"""Settings of a run and the named recipes.

A Config may gain fields: `from_json` gives an older record the default of each, so a default must
mean what the code did before the field existed.
"""

import dataclasses
import struct
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from mlp_jax.errors import UserError

OptimizerName = Literal["sgd", "momentum", "rmsprop", "adam"]
ScheduleName = Literal["constant", "linear", "cosine"]
RecipeName = Literal["keras-sgd", "keras-rmsprop", "short"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything but the seeds that decides how a run trains; hashable, static under `jax.jit`."""

    dataset: str = "mnist"
    """TFDS data set of 28x28x1 images: mnist, fashion_mnist, kmnist, emnist/digits, ..."""
    hidden: tuple[int, ...] = (512, 512)
    """Widths of the hidden layers."""
    dropout: float = 0.2
    """Fraction of hidden units dropped in training, in [0, 1)."""
    optimizer: OptimizerName = "sgd"
    """Update rule, as defined in training/optim.py."""
    learning_rate: float = 0.01
    """Step size at the peak of the schedule."""
    schedule: ScheduleName = "constant"
    """How the step size falls from the first step to the last, where it reaches 0."""
    batch_size: int = 128
    """Examples per step; a smaller last batch is averaged over the examples it has."""
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
            raise UserError(f"dropout must be in [0, 1), not {self.dropout}")
        check_learning_rate(self.learning_rate)
        if any(width < 1 for width in self.hidden):
            raise UserError(f"hidden widths must be at least 1, not {self.hidden}")

    @classmethod
    def from_json(cls, settings: dict[str, Any]) -> "Config":
        """The Config that `dataclasses.asdict` and JSON turned into `settings`.

        Fields that the record does not have take their defaults; UserError for one that this
        version does not know.
        """
        unknown = settings.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise UserError(f"unknown setting {min(unknown)!r}: a newer mlp_jax wrote it")
        lists = {name: tuple(v) for name, v in settings.items() if isinstance(v, list)}
        return cls(**settings | lists)


def check_learning_rate(rate: float) -> None:
    """UserError for a rate that is not positive and finite in float32, in which it is used."""
    try:
        (used,) = struct.unpack("f", struct.pack("f", rate))
    except (OverflowError, struct.error):  # too large, or no number
        used = float("inf")
    if not 0 < used < float("inf"):
        raise UserError(f"learning rate must be positive and finite in float32, not {rate}")


class Reference(NamedTuple):
    """A published result: correct test images of 10,000, and who reports it."""

    correct: int
    source: str


RECIPES: dict[str, Config] = {
    # The README that this project starts from.
    "keras-sgd": Config(),
    # The Keras example of the same net.
    "keras-rmsprop": Config(optimizer="rmsprop", learning_rate=1e-3, epochs=20),
    # One epoch with momentum, for studies that need thousands of runs: about 96.4 %.
    "short": Config(optimizer="momentum", learning_rate=0.1, epochs=1),
}
DEFAULT_RECIPE = "keras-sgd"

REFERENCES: dict[str, Reference] = {
    "keras-sgd": Reference(9726, "the Keras README"),
    "keras-rmsprop": Reference(9840, "Keras' mnist_mlp example"),
}
"""The published result of a recipe, where there is one."""
