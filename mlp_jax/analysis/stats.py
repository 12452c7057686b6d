"""Estimators for scores of many runs: mean, spread, and which of two sets is higher.

Equal inputs and an equal `rng` give equal outputs; intervals are at 95 %, variances with ddof = 1.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

LOW, HIGH = 0.025, 0.975  # the tails that a 95 % interval leaves
Z = float(stats.norm.ppf(HIGH))
BLOCK = 4_000_000  # numbers drawn at once by a bootstrap: 32 MB as int64
FEW_RUNS = 20  # with fewer, a bootstrap of variances covers too little, and kurtosis is unknown

FEW_PAIRS = 5  # that are out of order: with fewer, `brunner_munzel` does not know its error

Rng = np.random.Generator | int


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval, all in one unit."""

    estimate: float
    low: float
    high: float


def mean_interval(x: ArrayLike, *, tail: float = LOW, resolution: float = 0.0) -> Interval:
    """Mean with Student's t interval, which leaves `tail` on each side, in the unit of `x`.

    `resolution` is the step between two possible values: an SD below that of rounding to it, as of
    two runs that happen to be equal, is not believed.
    """
    x = np.asarray(x, np.float64)
    mean, sd = x.mean(), np.maximum(x.std(ddof=1), sd_of_rounding(resolution))
    half = stats.t.ppf(1 - tail, x.size - 1) * sd / math.sqrt(x.size)
    return Interval(mean, mean - half, mean + half)


def sd_of_rounding(resolution: float) -> float:
    """SD of the error of rounding to multiples of `resolution`."""
    return resolution / math.sqrt(12)


def excess_kurtosis(x: ArrayLike) -> float:
    """How much heavier the tails of `x` are than a normal's: G2 of Joanes and Gill.

    10.1111/1467-9884.00122. The lower bound of 0, and 0 below FEW_RUNS, are our addition.
    """
    x = np.asarray(x, np.float64)
    if x.size < FEW_RUNS or np.ptp(x) == 0:
        return 0.0
    return max(0.0, float(stats.kurtosis(x, bias=False)))


def _degrees(x: NDArray) -> float:
    """Degrees of freedom of the variance of `x`; n - 1 for normal values.

    O'Neill, 10.1080/00031305.2014.966589: 2n / (kurtosis - (n - 3) / (n - 1)), which matches the
    chi-square's variance to that of the estimate. He takes the kurtosis as known; estimating it by
    `excess_kurtosis` is ours.
    """
    return (x.size - 1) / (1 + excess_kurtosis(x) * (x.size - 1) / (2 * x.size))


def sd_interval(x: ArrayLike, *, resolution: float = 0.0) -> Interval:
    """SD with the chi-square interval, wider for heavy tails, in the unit of `x`.

    It covers 95 % of the time for normal values; for t5 and Laplace 90 to 94 % from FEW_RUNS on,
    and 82 to 90 % below. The upper end is that of `mean_interval`'s least SD, at least.
    """
    x = np.asarray(x, np.float64)
    sd, df = x.std(ddof=1), _degrees(x)
    both = np.array([sd, np.maximum(sd, sd_of_rounding(resolution))])
    return Interval(sd, *both * np.sqrt(df / stats.chi2.ppf([HIGH, LOW], df)))


def bootstrap(
    estimate: Any, resample: Callable[[int], NDArray], n_resamples: int, width: int
) -> Interval:
    """Percentile interval of `resample(m)`, called for blocks of m resamples of `width` numbers.

    If a resample is an array, so are the ends.
    """
    step = max(1, BLOCK // width)
    sizes = (min(step, n_resamples - start) for start in range(0, n_resamples, step))
    resamples = np.concatenate([resample(size) for size in sizes])
    return Interval(estimate, *np.quantile(resamples, [LOW, HIGH], axis=0))


def interquartile_mean(
    x: ArrayLike, *, resolution: float = 0.0, n_resamples: int = 50_000, rng: Rng = 0
) -> Interval:
    """Mean of the middle half with a percentile bootstrap, in the unit of `x`.

    Agarwal, arXiv 2108.13264, whose 50,000 resamples are the default. Counts of each distinct value
    are drawn instead of values: accuracies have few, so many runs cost little. By simulation it
    covers 50 % at 2 runs, 85 % at 4, and 90 % or more from 5 on; below, the ends are nan. They are
    as wide as those of the mean of runs with the least SD of `mean_interval`, at least.
    """
    x = np.asarray(x, np.float64)
    if x.size < 5:
        return Interval(stats.trim_mean(x, 0.25), math.nan, math.nan)
    distinct, counts = np.unique(x, return_counts=True)
    rng, cut = np.random.default_rng(rng), x.size // 4

    def resample(size: int) -> NDArray[np.float64]:
        drawn = rng.multinomial(x.size, counts / x.size, size=size)
        ranks = np.cumsum(drawn, axis=1).clip(cut, x.size - cut)
        return np.diff(ranks, axis=1, prepend=cut) @ distinct / (x.size - 2 * cut)

    found, low, high = bootstrap(stats.trim_mean(x, 0.25), resample, n_resamples, distinct.size)
    _, *least = mean_interval(np.full(x.size, found), resolution=resolution)
    return Interval(found, min(low, least[0]), max(high, least[1]))


def binomial_sd(p: float, n: int) -> float:
    """SD of accuracy if all n images were equally hard; too large, as they differ (2304.01910)."""
    return math.sqrt(p * (1 - p) / n)


def jeffreys(successes: float, n: int) -> Interval:
    """A share of n trials, ties one half; the interval ends at 0 without successes, at 1 with all.

    Brown, Cai, DasGupta 2001, 10.1214/ss/1009213286.
    """
    low, high = stats.beta.ppf([LOW, HIGH], successes + 0.5, n - successes + 0.5)
    low, high = low if successes else 0.0, high if successes < n else 1.0
    return Interval(float(successes / n), float(low), float(high))


def paired_improvement(a: ArrayLike, b: ArrayLike) -> Interval:
    """P(A > B) where a[j] and b[j] share a seed, ties one half, with Jeffreys' interval.

    Bouthillier, arXiv 2103.03098: significant where the low end passes .5, meaningful where the
    high end passes .75; an improvement is both. 29 pairs detect .75 at alpha = beta = .05.
    """
    signs = np.sign(np.subtract(a, b, dtype=np.float64))
    return jeffreys((signs + 1).sum() / 2, signs.size)


def welch(a: NDArray, b: NDArray, *, resolution: float = 0.0) -> tuple[float, float]:
    """Standard error of mean(a) - mean(b) of independent values, and its degrees of freedom.

    The SD of either is at least that of rounding to `resolution`, as in `mean_interval`.
    """
    least = sd_of_rounding(resolution) ** 2
    parts = np.array([max(x.var(ddof=1), least) / x.size for x in (a, b)])
    if not parts.any():
        return 0.0, a.size + b.size - 2.0
    df = parts.sum() ** 2 / (parts**2 / [a.size - 1, b.size - 1]).sum()
    return math.sqrt(parts.sum()), float(df)


def brunner_munzel(a: ArrayLike, b: ArrayLike) -> Interval:
    """P(A > B) of independent runs, ties one half: Mann-Whitney's U / (n m).

    Brunner and Munzel 2000: the standard error is that of each run's share of the other side below
    (or above) it; the interval is that of the logit, within 0 and 1 (Pauly, Asendorf and
    Konietschke 2016, 10.1002/bimj.201500105), with at most min(n, m) - 1 degrees of freedom. Where
    too few runs are out of order to know the error, or all of a side are equal, it is Jeffreys' of
    the min(n, m) pairs that use no run twice. Both rules are ours: of simulated normal scores, also
    rounded or with SDs up to 5 times apart, up to 7 % are then missed (without them up to 29 %),
    and up to 14 % where one side is nearly constant, as by Jeffreys' interval itself.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)

    def count_below(x: NDArray, y: NDArray) -> Any:
        """Twice the number of y below each x."""
        return sum(np.searchsorted(np.sort(y), x, side) for side in ("left", "right"))

    below, above = count_below(a, b), count_below(b, a)
    error, df = welch(below / (2 * b.size), above / (2 * a.size))
    pairs, most = min(a.size, b.size), 2 * a.size * b.size
    rarer = int(min(below.sum(), above.sum()))  # of `most`, in integers: at the limit, too
    estimate = float(below.sum() / most)
    if error == 0 or pairs * rarer < FEW_PAIRS * most or np.ptp(a) == 0 or np.ptp(b) == 0:
        return jeffreys(estimate * pairs, pairs)
    half = stats.t.ppf(HIGH, min(df, pairs - 1)) * error / (estimate * (1 - estimate))
    low, high = special.expit(special.logit(estimate) + np.array([-half, half])).tolist()
    return Interval(estimate, low, high)


def seeds_for_mean(sd: float, half_width: float) -> int:
    """Runs needed for the mean to +/- half_width, in the unit of `sd`: (1.96 sd / half_width)^2."""
    return max(2, math.ceil((Z * sd / half_width) ** 2))


def seeds_for_sd(relative: float, excess: float = 0.0) -> int:
    """Runs for the SD to +/- `relative` of it: 1 + 1.96^2 / (2 relative^2) (1 + excess / 2).

    `excess` is the kurtosis above a normal's, as from `excess_kurtosis`.
    """
    normal = (Z / relative) ** 2 / 2
    return max(2, math.ceil(1 + normal * (1 + excess / 2)))


def share_below(reference: float, x: ArrayLike) -> Interval:
    """Share of runs below a published number, ties one half; exact if given in whole images."""
    return paired_improvement(np.full_like(x, reference, np.float64), x)


def variance_ratio(a: ArrayLike, b: ArrayLike) -> Interval:
    """Var(a) / Var(b) of independent families of runs, with the F interval of `_degrees`.

    If the two share seeds that move them alike, the interval is too wide.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    ratio = np.var(a, ddof=1) / np.var(b, ddof=1)
    return Interval(ratio, *ratio / stats.f.ppf([HIGH, LOW], _degrees(a), _degrees(b)))
