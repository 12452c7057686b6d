"""Settings of a run and the named recipes.

A Config may gain fields: `from_json` fills in defaults for older records, so a default must mean
what the code did before the field existed.
"""

import dataclasses
import math
import operator
import struct
import sys
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
import tyro

from mlp_jax.errors import UserError

OptimizerName = Literal[
    "sgd", "momentum", "nesterov", "rmsprop", "rmsprop-outside", "adam", "nadam", "adabelief",
    "adadelta", "adagrad", "adamax", "adan", "amsgrad", "lion", "muon", "novograd", "radam",
    "sign-sgd", "sm3", "yogi",
]  # fmt: skip
ScheduleName = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that determines a run except its seeds; hashable, static under `jax.jit`."""

    dataset: str = "mnist"
    """TFDS data set of 28x28x1 images: mnist, fashion_mnist, kmnist, emnist/digits, ..."""
    hidden: tuple[int, ...] = (512, 512)
    """Widths of the hidden layers."""
    dropout: float = 0.2
    """Fraction of hidden units dropped in training, in [0, 1)."""
    optimizer: OptimizerName = "sgd"
    """Update rule, as defined in training/optim.py."""
    learning_rate: float = 0.01
    """Learning rate at the peak of the schedule."""
    schedule: ScheduleName = "constant"
    """How the learning rate decays to 0 at the last step, if it does."""
    warmup: float = 0.0
    """Fraction of the steps spent in linear warm-up, in [0, 1)."""
    cycles: int = 1
    """How many times the schedule runs from beginning to end (restarts)."""
    batch_size: int = 128
    """Examples per step; a smaller last batch is averaged over the examples it has."""
    epochs: int | float = 50
    """Passes over the training set; the last may be a part of one, as in 0.7."""
    init: Literal["glorot", "he"] = "glorot"
    """Initial weights: Glorot uniform, as in Keras, or He normal."""
    products: Literal["float32", "bfloat16"] = "float32"
    """Type of the operands of matrix products; sums, weights and updates stay float32.
    On TPU and TF32 GPUs JAX rounds float32, too, unless jax_default_matmul_precision="float32"."""
    loss: Literal["softmax", "squared-hinge"] = "softmax"
    """Cross-entropy, or the one-against-all L2-SVM of Tang, arXiv 1306.0239."""
    label_smoothing: float = 0.0
    """Fraction of the target spread evenly over all classes, in [0, 1)."""
    weight_decay: float = 0.0
    """Decoupled weight decay, as in AdamW; biases are not decayed."""
    max_norm: float = 0.0
    """Maximum norm of the weights into a hidden unit (Srivastava et al. 2014); 0: none."""
    ema: float = 0.0
    """Decay per step of an exponential moving average of the weights, for evaluation; 0: none."""
    input_dropout: float = 0.0
    """Fraction of pixels dropped in training, in [0, 1)."""
    input_noise: float = 0.0
    """SD of the normal noise added to the pixels, which lie in [0, 1], in training."""
    mixup: float = 0.0
    """Parameter of the Beta distribution of mixup (Zhang et al., arXiv 1710.09412); 0: none."""
    vat: float = 0.0
    """Radius of virtual adversarial training (Miyato et al., arXiv 1704.03976); 0: none."""
    rotation: float = 0.0
    """Rotate training images by up to this many degrees either way."""
    shear: float = 0.0
    """Shear training images by up to this many columns per row."""
    scale: float = 0.0
    """Scale training images by up to this fraction, each axis separately."""
    shift: float = 0.0
    """Shift training images by up to this many pixels, each axis separately."""
    elastic: float = 0.0
    """Elastic deformation of training images: smooth random shifts with this SD, in pixels."""
    elastic_sigma: float = 4.0
    """Length scale of the elastic shifts, in pixels."""
    examples: Literal["all", "bootstrap", "half"] = "all"
    """Training examples used: all, a bootstrap sample of the same size, or a random half."""
    split: Literal["test", "validation"] = "test"
    """Images to evaluate on: the test set, or the last sixth of the training set, held out."""
    n_classes: Annotated[int, tyro.conf.Suppress] = 10
    # Set from the data set, not by hand; a setting because it shapes the output layer.
    teacher: Annotated[str, tyro.conf.Suppress] = ""
    # Digest of the weights whose predictions are learned in place of the labels; set from them.

    def __post_init__(self):
        types = get_type_hints(type(self))  # without what only the command line needs
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.floating):  # .1 of any precision is .1
                value = float(np.format_float_scientific(value))
                object.__setattr__(self, field.name, value)
            elif isinstance(value, np.generic):
                object.__setattr__(self, field.name, value := value.item())
            kind, what = TYPES.get(types[field.name], (object, ""))
            if not isinstance(value, kind) or (what and isinstance(value, bool)):
                raise UserError(f"{_in_words(field.name)} must be {what}, not {value!r}")
            if isinstance(value, int) and abs(value) > sys.float_info.max:
                raise UserError(f"{_in_words(field.name)} is too large a number")
            if field.type is float:
                object.__setattr__(self, field.name, float(value))  # 1 is traced as 1.0
            if get_origin(field.type) is Literal and value not in get_args(field.type):
                choices = ", ".join(get_args(field.type))
                raise UserError(f"{_in_words(field.name)} must be one of {choices}; not {value!r}")
        if not 0 < self.epochs < math.inf:
            raise UserError(f"epochs must be positive and finite, not {self.epochs}")
        if self.epochs == int(self.epochs):  # 50.0 is written, and compared, as 50
            object.__setattr__(self, "epochs", int(self.epochs))
        for name in ("dropout", "input_dropout", "warmup", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{_in_words(name)} must be in [0, 1), not {getattr(self, name)}")
        for name, least in LEAST.items():
            if not least <= (value := getattr(self, name)) < math.inf:
                raise UserError(f"{_in_words(name)} must be at least {least}, not {value}")
        for name, most in MOST.items():
            if (value := getattr(self, name)) > most:
                raise UserError(f"{_in_words(name)} must be at most {most:,}, not {value:,}")
        check_learning_rate(self.learning_rate)
        try:
            object.__setattr__(self, "hidden", tuple(map(operator.index, self.hidden)))
        except TypeError:
            line = f"hidden must be widths, such as (512, 512), not {self.hidden!r}"
            raise UserError(line) from None
        if any(not 1 <= width < 2**31 for width in self.hidden):
            raise UserError(f"hidden widths must be from 1 to 2^31 - 1, not {self.hidden}")

    @property
    def n_epochs(self) -> int:
        """Epochs, counting a partial last one: how often a run is evaluated."""
        return math.ceil(self.epochs)

    @property
    def augments(self) -> bool:
        """Whether training images are deformed."""
        return any((self.rotation, self.shear, self.scale, self.shift, self.elastic))

    @classmethod
    def from_json(cls, settings: dict[str, Any]) -> "Config":
        """The Config that `dataclasses.asdict` and JSON turned into `settings`.

        Missing fields take their defaults; UserError for a field that this version does not know.
        """
        unknown = settings.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise UserError(f"unknown setting {min(unknown)!r}: a newer mlp_jax wrote it")
        lists = {name: tuple(v) for name, v in settings.items() if isinstance(v, list)}
        return cls(**settings | lists)


# of the fields of each type: what their values may be, for isinstance and in words
TYPES: dict[Any, tuple[Any, str]] = {
    str: (str, "text"),
    int: (int, "an integer"),
    float: (int | float, "a number"),
    int | float: (int | float, "a number"),
}

# cycles: up to here float32 holds all integers
MOST = {"cycles": 2**24, "elastic_sigma": 10**6}

FROM_DATA = ("n_classes", "teacher")
"""The settings that are known once the data are loaded."""

NOT_NEGATIVE = ("weight_decay", "max_norm", "input_noise", "mixup", "vat")
NOT_NEGATIVE += ("rotation", "shear", "scale", "shift", "elastic")
LEAST = dict.fromkeys(NOT_NEGATIVE, 0)
LEAST |= dict.fromkeys(("batch_size", "n_classes", "cycles", "elastic_sigma"), 1)


def _in_words(name: str) -> str:
    return name.replace("_", " ")


def check_learning_rate(rate: float) -> None:
    """UserError for a rate that is not positive and finite in float32, as it is used."""
    try:
        (used,) = struct.unpack("f", struct.pack("f", rate))
    except (OverflowError, struct.error):  # too large, or no number
        used = float("inf")
    if not 0 < used < float("inf"):
        raise UserError(f"learning rate must be positive and finite in float32, not {rate}")


class Reference(NamedTuple):
    """A published result: correct test images out of 10,000, and who reports it."""

    correct: int
    source: str


SPRINT = Config(
    optimizer="nadam",
    learning_rate=0.006,
    schedule="linear",
    warmup=0.1,
    epochs=0.5,
    dropout=0.0,
    init="he",
    label_smoothing=0.1,
)

# The settings of these were chosen on validation images (results/search.json). Nothing in `best`
# knows which pixels are neighbours.
BEST = Config(
    dropout=0.0,
    optimizer="adam",
    learning_rate=3e-3,
    schedule="cosine",
    warmup=0.1,
    batch_size=256,
    epochs=100,
    init="he",
    label_smoothing=0.05,
    ema=0.999,
    vat=1.5,
)
# Deformed images, for hundreds of epochs, as in Ciresan et al. (arXiv 1003.0358).
BEST_AUGMENTED = dataclasses.replace(
    BEST,
    epochs=400,
    vat=0.0,
    rotation=15.0,
    shear=0.15,
    scale=0.15,
    shift=1.5,
    elastic=1.0,
    elastic_sigma=6.0,
)

RECIPES: dict[str, Config] = {
    # The README that this project starts from.
    "keras-sgd": Config(),
    # The Keras example of the same network.
    "keras-rmsprop": Config(optimizer="rmsprop", learning_rate=1e-3, epochs=20),
    # One epoch with momentum, for studies that need thousands of runs: about 96.4 %.
    "short": Config(optimizer="momentum", learning_rate=0.1, epochs=1),
    # The least training whose mean passes the references, or 99 % on images as they are;
    # results/speedruns-search.json.
    "sprint": SPRINT,
    "sprint-98": dataclasses.replace(SPRINT, learning_rate=0.004, epochs=2),
    "sprint-99": dataclasses.replace(BEST, optimizer="nadam", schedule="linear", epochs=40),
    "best": BEST,
    "best-augmented": BEST_AUGMENTED,
    # Taught by the committee that comes with mlp_jax, of five runs of best-augmented.
    "best-distilled": dataclasses.replace(
        BEST_AUGMENTED, label_smoothing=0.0, teacher="e4d0a40b9209ad9812f09f6f5f3d2ae4"
    ),
}
if TYPE_CHECKING:  # which wants the names spelled out
    RecipeName = str
else:
    RecipeName = Literal[tuple(RECIPES)]
DEFAULT_RECIPE: RecipeName = "keras-sgd"

REFERENCES: dict[str, Reference] = {
    "keras-sgd": Reference(9726, "the Keras README"),
    "keras-rmsprop": Reference(9840, "Keras' mnist_mlp example"),
    "sprint": Reference(9726, "the Keras README"),
    "sprint-98": Reference(9840, "Keras' mnist_mlp example"),
    "best": Reference(9943, "the ladder network, arXiv 1507.02672"),
    "best-augmented": Reference(9951, "1000-500-10 of Ciresan et al., arXiv 1003.0358"),
    "best-distilled": Reference(9965, "12 million parameters of Ciresan et al., arXiv 1003.0358"),
}
"""The published result of a recipe, where there is one."""


def format_setting(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
