"""What distinguishes runs of one Config: a seed per random stream, and the learning rate.

Imports no jax. New streams go at the end of Streams, so the keys of the others never change.
"""

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from mlp_jax.errors import UserError
from mlp_jax.training.config import Config, check_learning_rate


class Streams(NamedTuple):
    """One value for each independent random stream of a run: its seed, or its key."""

    init: Any  # initial weights
    order: Any  # order of the training examples
    dropout: Any  # dropped units, and other noise in the network
    augment: Any  # deformation of the training images
    data: Any  # which training examples are used, if not all


STREAMS = Streams._fields

HELD_SEED = 0
"""Seed of the streams that a family does not vary."""

BLOCK = 32
"""Seeds of a crossed block, which stored runs rely on: one per combination of five streams."""


MAX_RUNS = 10_000_000  # their list takes gigabytes


class Run(NamedTuple):
    """One training, as rows, files and checkpoints name it; made by `make_run`.

    `vary` is its family: "all", the one stream that varies, or "crossed", where `seed` is BLOCK b +
    cell: in block b, stream i has seed 2 b plus bit i of the cell, so blocks share no seed.
    """

    vary: str
    learning_rate: float
    seed: int

    @property
    def family(self) -> tuple[str, float]:
        return self.vary, self.learning_rate

    @property
    def seeds(self) -> Streams:
        """`seed` for the streams that `vary` names, else HELD_SEED."""
        if self.vary == "crossed":
            block, cell = divmod(self.seed, BLOCK)
            return Streams(*(2 * block + (cell >> i) % 2 for i in range(len(STREAMS))))
        varied = (self.vary in ("all", name) for name in STREAMS)
        return Streams(*(self.seed if each else HELD_SEED for each in varied))


def make_run(seed: int, learning_rate: float, vary: str = "all") -> Run:
    """A Run whose rate is the shortest decimal of the same float32, so that runs that train alike
    are equal. UserError for a seed or a rate out of range.
    """
    if vary not in ("all", "crossed", *STREAMS):
        raise UserError(f"a family varies all or one of {', '.join(STREAMS)}, not {vary!r}")
    seed = operator.index(seed)  # of any integer type
    if not 0 <= seed < 2**32:
        raise UserError(f"seeds must be from 0 to {2**32 - 1}, not {seed}")
    check_learning_rate(learning_rate)
    # str would depend on NumPy's print options
    return Run(vary, float(np.format_float_scientific(np.float32(learning_rate))), seed)


def make_runs(
    seeds: Iterable[int], vary: Iterable[str], learning_rates: Iterable[float]
) -> list[Run]:
    """Seeds x families x learning rates, seeds outermost, so that all families grow together."""
    families = [(name, rate) for name in dict.fromkeys(vary) for rate in learning_rates]
    return [make_run(seed, rate, name) for seed in seeds for name, rate in families]


def sweep_runs(
    config: Config,
    seeds: Iterable[int] | None = None,
    vary: str | Iterable[str] = ("all",),
    learning_rates: Iterable[float] = (),
    crossed: int = 0,
) -> list[Run]:
    """The runs of a sweep; UserError if they are too many, or their streams are not used.

    `seeds` (default: 0 to 99) for every family and every rate (default: the Config's), or instead
    `crossed` blocks.
    """
    if isinstance(vary, set | frozenset):  # its order may be another one in another shard
        vary = sorted(vary)
    vary = (vary,) if isinstance(vary, str) else tuple(vary)
    rates = list(learning_rates) or [config.learning_rate]
    if len({make_run(0, rate) for rate in rates}) < len(rates):
        raise UserError("two learning rates are equal (they are rounded to float32)")
    if not vary:
        raise UserError("vary needs at least one value")
    if unused := {*vary} & {*STREAMS} - {*used_streams(config)}:
        raise UserError(f"vary {min(unused)}: with these settings that stream is not used")
    if crossed and (seeds is not None or vary != ("all",)):
        raise UserError("crossed sets all seeds: leave out seeds and vary")
    seeds = range(100) if seeds is None else seeds if isinstance(seeds, range) else list(seeds)
    n_seeds = crossed * 2 ** len(used_streams(config)) or len(seeds)
    if (n_runs := n_seeds * len(set(vary)) * len(rates)) > MAX_RUNS:
        raise UserError(f"a sweep has at most {MAX_RUNS:,} runs, not {n_runs:,}")
    if crossed:
        return make_runs(crossed_seeds(crossed, config), ["crossed"], rates)
    return make_runs(seeds, vary, rates)


def used_streams(config: Config) -> tuple[str, ...]:
    """The streams whose seeds have an effect."""
    noise = (config.dropout, config.input_dropout, config.input_noise, config.mixup, config.vat)
    used = {"dropout": any(noise), "augment": config.augments, "data": config.examples != "all"}
    return tuple(name for name in STREAMS if used.get(name, True))


def crossed_seeds(n_blocks: int, config: Config) -> list[int]:
    """Seeds for `make_run` of blocks that cross the k used streams: 2^k runs each."""
    cells = [0]
    for name in used_streams(config):
        if 1 << STREAMS.index(name) >= BLOCK:
            raise UserError(f"a crossed block has no room for the stream {name}")
        cells += [cell | 1 << STREAMS.index(name) for cell in cells]
    return [BLOCK * block + cell for block in range(n_blocks) for cell in cells]
