"""What tells two runs of one Config apart: a seed for each random stream, and the learning rate.

Imports no jax. A new stream is appended to Streams, so the keys of the others stay as they are.
"""

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from mlp_jax.errors import UserError
from mlp_jax.training.config import check_learning_rate


class Streams(NamedTuple):
    """One value for each independent random stream of a run: its seed, or its key."""

    init: Any  # initial weights
    order: Any  # order of the training examples
    dropout: Any  # dropped units, and other noise in the network
    augment: Any  # deformation of the training images
    data: Any  # which training examples are used, if not all


STREAMS = Streams._fields

HELD_SEED = 0
"""Seed of the streams that a family of runs does not vary."""


class Run(NamedTuple):
    """One training: `vary` names the family it belongs to, "all" or the one stream that varies."""

    seeds: Streams
    learning_rate: float
    vary: str = "all"

    @property
    def seed(self) -> int:
        """The seed that tells the runs of a family apart."""
        return self.seeds[0] if self.vary == "all" else getattr(self.seeds, self.vary)


def make_run(seed: int, learning_rate: float, vary: str = "all") -> Run:
    """The run whose streams take `seed` if `vary` names them, else HELD_SEED.

    The rate becomes the shortest decimal that is the same float32, so that runs which train alike
    are equal. UserError for a seed or a rate out of range.
    """
    seed = operator.index(seed)  # of any integer type
    if vary not in ("all", *STREAMS):
        raise UserError(f"a family varies all or one of {', '.join(STREAMS)}, not {vary!r}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seeds must be in 0 ... {2**32 - 1}, not {seed}")
    check_learning_rate(learning_rate)
    seeds = Streams(*(seed if vary in ("all", name) else HELD_SEED for name in STREAMS))
    return Run(seeds, float(str(np.float32(learning_rate))), vary)


def make_runs(
    seeds: Iterable[int], vary: Iterable[str], learning_rates: Iterable[float]
) -> list[Run]:
    """Seeds x families x learning rates, so that all families grow together."""
    families = [(name, rate) for name in dict.fromkeys(vary) for rate in learning_rates]
    return [make_run(seed, rate, name) for seed in seeds for name, rate in families]
