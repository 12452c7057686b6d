"""Which source of randomness makes accuracy vary: independent blocks that cross all streams.

A block holds two fresh seeds of each of k streams in all 2^k combinations. Accuracy is a sum of
uncorrelated effects, one of each set u of streams (Hoeffding, Sobol'): V = sum_u V_u. The index of
u is V_u / V; the total index of a stream sums those of all sets that hold it: the share of V that
remains, on average, if all other streams are fixed. Estimates of variances are unbiased, so they
may be negative.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlp_jax.analysis.stats import FEW_RUNS, Interval, Rng, bootstrap


class BlockSums(NamedTuple):
    """Sums over images of B blocks; an axis of 2 per stream, at 1 if it is in u, else 0."""

    contrasts: NDArray[np.int64]  # [B, 2, ...]: sum_r +-C_r, C_r the images that run r gets right
    squares: NDArray[np.int64]  # [B, 2, ...]: the squared contrast of each image, summed
    n_test: int


class SobolIndices(NamedTuple):
    """A variance and its parts, each set of streams named like `init x order`.

    Shares are nan where V is not positive, and their ends where that of a resample is not.
    """

    blocks: int
    variance: Interval
    components: dict[str, Interval]  # V_u, in the unit of the variance
    indices: dict[str, Interval]  # V_u / V; of a single stream: its first-order index
    total: dict[str, Interval]  # of each stream
    interactions: Interval  # 1 - the first-order indices


def _butterfly(y: NDArray, k: int, sum_of, difference_of) -> NDArray:
    """Along each of the k axes after the first, replace two values by "sum" and "difference"."""
    for axis in range(1, k + 1):
        a, b = np.moveaxis(y, axis, 0)
        y = np.stack([sum_of(a, b), difference_of(a, b)], axis)
    return y


def contrasts(y: NDArray, k: int) -> NDArray:
    """sum +-y over the 2^k runs of a block, minus if an odd number of u's seeds is the second.

    `y` [B, 2, ...] has k axes of 2, and may have more after them; equal runs give 0 exactly.
    """
    return _butterfly(y, k, np.add, np.subtract)


def sum_block(block: ArrayLike) -> tuple[NDArray, NDArray]:
    """What `BlockSums` holds of one block's correctness, bool [2^k, n_test].

    The last stream's seed changes fastest.
    """
    right = np.asarray(block, np.int8)  # a contrast of an image is 2^k at most
    k = len(right).bit_length() - 1
    of_images = contrasts(right.reshape(1, *(2,) * k, -1), k)[0]
    squares = np.square(of_images, dtype=np.int16).sum(axis=-1, dtype=np.int64)
    return of_images.sum(axis=-1, dtype=np.int64), squares


def squared_contrasts(sums: BlockSums) -> tuple[NDArray, NDArray]:
    """c_u^2 of accuracy on this test set, and what it would be on an infinite one; [B, 2, ...].

    Jordan, arXiv 2304.01910, Theorem 2, for a contrast instead of a variance over runs:
    n/(n-1) (c_u^2 - n^-2 sum_j c_uj^2), the mean product of the contrasts of two images. It is
    unbiased and may be negative.
    """
    runs, n = sums.squares[0].size, sums.n_test
    square = sums.contrasts.astype(np.float64) ** 2
    return square / (runs * n**2), (square - sums.squares) / (runs * n * (n - 1))


def variance_components(squares: NDArray) -> NDArray:
    """V_u of squared contrasts [B, 2, ...], in the same layout; meaningless at the empty set.

    E c_u^2 = sum over v that contain u of 2^(k - |v|) V_v, hence by Moebius inversion
    2^(k - |u|) V_u = sum over v that contain u of (-1)^(|v| - |u|) E c_v^2.
    """
    return _butterfly(squares, squares.ndim - 1, lambda a, b: (a - b) / 2, lambda _, b: b)


def sobol_indices(
    squares: ArrayLike, streams: Sequence[str], *, n_resamples: int = 10_000, rng: Rng = 0
) -> SobolIndices:
    """The indices of squared contrasts [B, 2, ...], one axis a stream, in the unit of accuracy.

    Intervals are a percentile bootstrap over blocks and hold the test images fixed; their ends are
    nan below FEW_RUNS blocks, or if all blocks are equal. They cover 86 to 93 % of the time at 20
    blocks, 91 to 95 % at 100 and 93 to 95 % at 300, normal or exponential effects.
    """
    squares, k = np.asarray(squares, np.float64), len(streams)
    if squares.shape[1:] != (2,) * k:
        raise ValueError(f"blocks of shape {squares.shape[1:]} are not crossed in {k} streams")
    sets = sorted(itertools.product([True, False], repeat=k), key=sum)[1:]
    of_sets: Any = variance_components(squares)
    of_blocks = np.stack([of_sets[:, *map(int, u)] for u in sets], axis=1)
    sets = np.array(sets)
    linear = np.concatenate([np.eye(len(sets)), sets, sets.sum(axis=1, keepdims=True) > 1], axis=1)

    def estimate(components: NDArray) -> NDArray:
        """V, the components, and the share of V of each column of `linear`; [..., m]."""
        variance = components.sum(axis=-1, keepdims=True)
        rounding = 1e-12 * np.abs(components).sum(axis=-1, keepdims=True)
        variance = np.where(np.abs(variance) > rounding, variance, 0)
        positive = np.where(variance > 0, variance, math.nan)
        return np.concatenate([variance, components, components @ linear / positive], axis=-1)

    rng, n = np.random.default_rng(rng), len(squares)

    def resample(size: int) -> NDArray:
        return estimate(rng.multinomial(n, np.full(n, 1 / n), size=size) @ of_blocks / n)

    found = estimate(of_blocks.mean(axis=0))
    known = n >= FEW_RUNS and np.ptp(of_blocks, axis=0).any()
    ends = bootstrap(found, resample, n_resamples, n)[1:] if known else [found * np.nan] * 2
    each = iter([Interval(*map(float, three)) for three in zip(found, *ends, strict=True)])
    names = [" x ".join(itertools.compress(streams, u)) for u in sets]
    return SobolIndices(
        n,
        next(each),
        {name: next(each) for name in names},
        {name: next(each) for name in names},
        {name: next(each) for name in streams},
        next(each),
    )


class Crossed(NamedTuple):
    """Indices of accuracy on this test set, and distribution-wise: on an infinite one."""

    test: SobolIndices
    distribution: SobolIndices


def crossed_indices(sums: BlockSums, streams: Sequence[str], **options) -> Crossed:
    """The `sobol_indices` of both kinds; `options` are theirs."""
    return Crossed(*(sobol_indices(each, streams, **options) for each in squared_contrasts(sums)))
