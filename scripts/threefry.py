"""Reproducer: on CPU, JAX draws random bits slower than the same cipher with its rounds unrolled.

    python scripts/threefry.py --out results/threefry.json

JAX lowers threefry2x32's five groups of rounds to a loop on CPU, and unrolls them elsewhere; a loop
cannot be fused with what uses the bits. Here both draw the dropout masks of an epoch of
`keras-sgd` in turns, after the masks were found to be equal.
"""

import dataclasses
import functools
import math
import statistics
import sys
from pathlib import Path
from time import perf_counter as clock

import jax
import jax.numpy as jnp
import tyro
from jax import lax

import mlp_jax as mj
from mlp_jax.files import write_json

MASK = (128, 512)  # units of a hidden layer for a batch
N_MASKS = 2 * 469  # two hidden layers, 469 steps
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


@dataclasses.dataclass(frozen=True)
class Args:
    turns: int = 100
    """Epochs of masks that each of the two draws, in turns."""
    out: Path | None = None
    """File for the record, as JSON."""


def rolled_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.bits(key, shape, jnp.uint32)


def unrolled_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The bits of `rolled_bits`: threefry2x32 (Salmon et al., SC 2011) of the 64-bit positions.

    For fewer than 2**32 numbers, as the upper words are zero, and for partitionable threefry.
    """
    low, high = jax.random.key_data(key)
    keys = (low, high, low ^ high ^ jnp.uint32(0x1BD11BDA))
    positions = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    x, y = jnp.zeros(shape, jnp.uint32) + keys[0], positions + keys[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x = x + y
            y = x ^ ((y << rotation) | (y >> (32 - rotation)))
        x += keys[(group + 1) % 3]
        y += keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x ^ y


@functools.partial(jax.jit, static_argnums=0)
def draw_masks(random_bits, key: jax.Array) -> jax.Array:
    """How often each unit is kept at a dropout rate of .2: int32 of shape MASK."""

    def add_mask(i, kept):
        return kept + (random_bits(jax.random.fold_in(key, i), MASK) >= 2**32 // 5)

    return lax.fori_loop(0, N_MASKS, add_mask, jnp.zeros(MASK, jnp.int32))


def main(args: Args) -> None:
    key = jax.random.key(0)
    kinds = {"rolled": rolled_bits, "unrolled": unrolled_bits}
    a, b = (draw_masks(kind, key) for kind in kinds.values())
    assert (a == b).all(), "the two draw different bits"
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(args.turns):
        for name, kind in kinds.items():
            start = clock()
            draw_masks(kind, jax.random.fold_in(key, turn)).block_until_ready()
            seconds[name].append(clock() - start)
    low, _, high = statistics.quantiles(seconds["rolled"], n=4)
    if high > 1.15 * low:
        sys.exit(f"error: a quarter takes {high / low:.2f} times as long: keep the machine idle")
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    record = {
        "command": f"python scripts/threefry.py --turns {args.turns} --out results/threefry.json",
        "environment": mj.describe_environment(),
        "seconds": seconds,
    }
    for name, value in seconds.items():
        print(f"{name}: {statistics.median(value):.3f} s for the masks of an epoch")
    found = statistics.median(ratios), min(ratios), max(ratios)
    print("unrolled / rolled: {:.2f} ({:.2f} to {:.2f})".format(*found))
    if args.out:
        write_json(args.out, record)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
