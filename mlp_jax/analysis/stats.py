"""Estimators of how much test accuracy varies between runs, and of why.

Equal inputs and an equal `rng` give equal outputs; intervals are at 95 %, variances over runs with
ddof = 1. Predictions are consumed in blocks of runs, and what is kept grows by two integers a run.

R runs share n test images of k classes. E[r, i] = 1 where run r errs on image i, n_ic runs predict
class c for image i, and q_ic = n_ic / R.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LOW, HIGH = 0.025, 0.975  # the tails that a 95 % interval leaves
BLOCK = 4_000_000  # numbers drawn at once by a bootstrap: 32 MB as int64
ROWS = 255  # runs counted at once: the most that a uint8 counter holds
FEW_RUNS = 20  # with fewer, the bootstrap of a variance covers too little: 77 to 86 % at 10

Rng = np.random.Generator | int


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval, all in one unit."""

    estimate: float
    low: float
    high: float


class PredictionCounts(NamedTuple):
    """All that the estimators need to know of R x n predictions."""

    labels: NDArray[np.int64]  # [n]
    classes: NDArray[np.int64]  # [n, k]: n_ic
    correct_even: NDArray[np.int64]  # [R], over the images of even index
    correct_odd: NDArray[np.int64]  # [R]

    @property
    def runs(self) -> int:
        """R."""
        return len(self.correct_even)

    @property
    def correct(self) -> NDArray[np.int64]:
        """Test images that each run gets right [R]."""
        return self.correct_even + self.correct_odd

    @property
    def errors(self) -> NDArray[np.int64]:
        """Runs that err on each image [n]."""
        return self.runs - self.classes[np.arange(len(self.labels)), self.labels]


class VarianceParts(NamedTuple):
    """Variances between runs, in squared accuracy; `distribution` and `halves` may be negative."""

    test: float
    independent: float
    distribution: float
    halves: float


class PredictedSD(NamedTuple):
    """Standard deviations of accuracy that calibration predicts, as fractions."""

    binary: float
    k_class: float
    label_free: float


class Disagreement(NamedTuple):
    """Shares of images: two runs differ; a run errs; the class-aggregated calibration error."""

    disagreement: float
    error: float
    calibration_error: float


def mean_interval(x: ArrayLike) -> Interval:
    """Mean with Student's t interval, in the unit of `x`."""
    x = np.asarray(x, np.float64)
    mean, half = x.mean(), stats.t.ppf(HIGH, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size)
    return Interval(mean, mean - half, mean + half)


def excess_kurtosis(x: ArrayLike) -> float:
    """How much heavier the tails of `x` are than a normal's, 0 at least; 0 below FEW_RUNS.

    G2 of Joanes and Gill, 10.1111/1467-9884.00122.
    """
    x = np.asarray(x, np.float64)
    if x.size < FEW_RUNS or np.ptp(x) == 0:
        return 0.0
    return max(0.0, float(stats.kurtosis(x, bias=False)))


def _degrees(x: NDArray) -> float:
    """Degrees of freedom of the variance of `x`; n - 1 for normal values.

    O'Neill, 10.1080/00031305.2014.966589: 2n / (kurtosis - (n - 3) / (n - 1)), which matches the
    chi-square's variance to that of the estimate.
    """
    return (x.size - 1) / (1 + excess_kurtosis(x) * (x.size - 1) / (2 * x.size))


def sd_interval(x: ArrayLike) -> Interval:
    """SD with the chi-square interval, in the unit of `x`, wider where its tails are heavy."""
    x = np.asarray(x, np.float64)
    sd, df = x.std(ddof=1), _degrees(x)
    return Interval(sd, *sd * np.sqrt(df / stats.chi2.ppf([HIGH, LOW], df)))


def _bootstrap(
    estimate: float, resample: Callable[[int], NDArray], n_resamples: int, width: int
) -> Interval:
    """Percentile interval of `resample(m)`, called for blocks of m resamples of `width` numbers."""
    step = max(1, BLOCK // width)
    sizes = (min(step, n_resamples - start) for start in range(0, n_resamples, step))
    low, high = np.quantile(np.concatenate([resample(size) for size in sizes]), [LOW, HIGH])
    return Interval(float(estimate), float(low), float(high))


def interquartile_mean(x: ArrayLike, *, n_resamples: int = 50_000, rng: Rng = 0) -> Interval:
    """Mean of the middle half with a percentile bootstrap, in the unit of `x`.

    Agarwal, arXiv 2108.13264, whose 50,000 resamples are the default. How often a resample holds
    each distinct value is drawn, not the values: accuracies have few, so many runs cost little.
    """
    x = np.asarray(x, np.float64)
    distinct, counts = np.unique(x, return_counts=True)
    rng, cut = np.random.default_rng(rng), x.size // 4

    def resample(size: int) -> NDArray[np.float64]:
        drawn = rng.multinomial(x.size, counts / x.size, size=size)
        ranks = np.cumsum(drawn, axis=1).clip(cut, x.size - cut)
        return np.diff(ranks, axis=1, prepend=cut) @ distinct / (x.size - 2 * cut)

    return _bootstrap(stats.trim_mean(x, 0.25), resample, n_resamples, distinct.size)


def binomial_sd(p: float, n: int) -> float:
    """SD of accuracy were all n images equally hard; too large, as they differ (2304.01910)."""
    return math.sqrt(p * (1 - p) / n)


def _parts(blocks: Iterable[ArrayLike]) -> Iterator[NDArray[np.integer]]:
    for block in map(np.asarray, blocks):
        yield from (block[start : start + ROWS] for start in range(0, len(block), ROWS))


def count_predictions(
    blocks: Iterable[ArrayLike], labels: ArrayLike, *, n_classes: int = 10
) -> PredictionCounts:
    """Counts of blocks of predictions, integers [r, n] of any r each, in one pass."""
    labels = np.asarray(labels).astype(np.int64)
    classes, correct = np.zeros((labels.size, n_classes), np.int64), [np.zeros((2, 0), np.int64)]
    for part in _parts(blocks):
        for c in range(n_classes):
            # A uint8 sum over at most 255 rows cannot wrap, and is 9 times as fast as bincount.
            classes[:, c] += (part == c).view(np.uint8).sum(axis=0, dtype=np.uint8)
        right = part == labels
        correct.append([np.count_nonzero(half, axis=1) for half in (right[:, ::2], right[:, 1::2])])
    counts = PredictionCounts(labels, classes, *np.concatenate(correct, axis=1))
    if classes.sum() != counts.runs * labels.size:
        raise ValueError(f"a prediction lies outside 0..{n_classes - 1}")
    return counts


def error_overlaps(blocks: Iterable[ArrayLike], counts: PredictionCounts) -> NDArray[np.int64]:
    """Per run, the errors it shares with all runs: g_r = sum_i E[r, i] sum_s E[s, i], int64 [R].

    A second pass over the blocks that `counts` came from, in the same order; g is the row sums of
    the Gram matrix E E^T, which itself (R x R) is never made.
    """
    errors = counts.errors.astype(np.float64)  # BLAS; every sum stays an exact integer below 2**53
    overlaps = [(part != counts.labels).astype(np.float64) @ errors for part in _parts(blocks)]
    return np.concatenate([np.zeros(0), *overlaps]).astype(np.int64)


def variance_parts(counts: PredictionCounts) -> VarianceParts:
    """The variance of test accuracy, and what of it would stay on an endless test set.

    Jordan, arXiv 2304.01910, Theorem 2. test = Var_r(accuracy); independent = (1/n^2) sum_i
    Var_r(E[:, i]); distribution = n/(n-1) (test - independent), unbiased, the mean covariance of
    two images' errors; halves = Cov_r of the accuracies on even and odd images, as unbiased.
    """
    runs, n, errors = counts.runs, len(counts.labels), counts.errors
    test = counts.correct.var(ddof=1) / n**2
    independent = (errors * (runs - errors)).sum() / (runs * (runs - 1) * n**2)
    halves = np.cov(counts.correct_even, counts.correct_odd)[0, 1] / (n // 2 * (n - n // 2))
    return VarianceParts(test, independent, n / (n - 1) * (test - independent), halves)


def signed_sqrt(variance: ArrayLike) -> NDArray[np.float64]:
    """sign(v) sqrt(|v|): the SD of a variance estimate; below 0 where it is not told from zero."""
    return np.sign(variance) * np.sqrt(np.abs(variance))


def distribution_sd(
    counts: PredictionCounts, overlaps: NDArray, *, n_resamples: int = 10_000, rng: Rng = 0
) -> Interval:
    """Signed SD of accuracy on the whole distribution, with a percentile bootstrap over runs.

    Jordan, arXiv 2304.01910, Theorem 2; `overlaps` from `error_overlaps`. The ends are nan below
    FEW_RUNS; the interval covers 85 to 90 % of the time at 30 runs and about 93 % from 100 on.

    Where a resample holds run r w_r times, image i has e_i + delta_i errors, delta_i =
    sum_r (w_r - 1) E[r, i], and V_ind needs sum_i of that times R less it: sum_i e_i (R - e_i) +
    sum_r (w_r - 1) (R T_r - 2 g_r) - sum_i delta_i^2, T_r the errors of run r and g the overlaps.
    All is exact but the last sum, held at its mean sum_i e_i (R - e_i) / R: under 1 % of the width.
    """
    runs, n, parts = counts.runs, len(counts.labels), variance_parts(counts)
    if len(overlaps) != runs or overlaps.sum() != (counts.errors**2).sum():
        raise ValueError("the overlaps come from other blocks than the counts")
    estimate = float(signed_sqrt(parts.distribution))
    if runs < FEW_RUNS:
        return Interval(estimate, math.nan, math.nan)
    wrong = n - counts.correct
    # Both are centred: equal runs then give 0 exactly, and no two large sums cancel.
    centred, slope = wrong - wrong.mean(), runs * wrong - 2 * overlaps
    linear = centred**2 / (runs - 1) - (slope - slope.mean()) / (runs * (runs - 1))
    rest = (1 - 1 / runs) * n**2 * parts.independent
    rng = np.random.default_rng(rng)

    def resample(size: int) -> NDArray[np.float64]:
        drawn = rng.integers(runs, size=(size, runs))
        spread = centred[drawn].sum(axis=1) ** 2 / (runs * (runs - 1))
        return signed_sqrt((linear[drawn].sum(axis=1) - spread - rest) / (n * (n - 1)))

    return _bootstrap(estimate, resample, n_resamples, runs)


def predicted_sd(counts: PredictionCounts) -> PredictedSD:
    """SD of accuracy foretold by calibration, P(label = c | q_i) = q_ic, and independence.

    Jordan, arXiv 2304.01910. binary = sqrt(err / (2n)), Eq. 6; k_class = sqrt(err / (n k)), a lower
    bound, Theorem 4. label_free = sqrt(sum_ic q_ic^2 (1 - q_ic)) / n, the binary one at two
    classes; q^2 (1 - q) is the share of ordered triples of runs of which the first two say c and
    the third does not, unbiased for R >= 3.
    """
    runs, (n, k) = counts.runs, counts.classes.shape
    error = counts.errors.mean() / runs
    votes = counts.classes.astype(np.float64)  # their cubes overflow int64 at 10^5 runs
    triples = (votes * (votes - 1) * (runs - votes)).sum() / (runs * (runs - 1) * (runs - 2))
    return PredictedSD(*np.sqrt([error / (2 * n), error / (n * k), triples / n**2]).tolist())


def disagreement(counts: PredictionCounts, *, bins: int = 10) -> Disagreement:
    """How often two runs differ, beside how often one errs; equal where the votes are calibrated.

    Jiang, arXiv 2106.13799: (1/n) sum_i [1 - sum_c n_ic (n_ic - 1) / (R (R - 1))], unbiased; CACE
    bounds the gap: (1/n) sum_bins |sum_ic in bin (1[label_i = c] - q_ic)|; finer bins add noise,
    and the bound itself is for one bin a value and pairs of runs drawn with replacement.
    """
    runs, n, votes = counts.runs, len(counts.labels), counts.classes
    differ = 1 - (votes * (votes - 1)).sum() / (n * runs * (runs - 1))
    gap = (counts.labels[:, None] == np.arange(votes.shape[1])) - votes / runs
    cell = np.minimum(votes * bins // runs, bins - 1)
    cace = np.abs(np.bincount(cell.ravel(), gap.ravel())).sum() / n
    return Disagreement(differ, counts.errors.mean() / runs, cace)


def ensemble_correct(counts: PredictionCounts) -> int:
    """Images that the majority vote of all runs gets right; a tie goes to the smallest class."""
    return int((counts.classes.argmax(axis=1) == counts.labels).sum())


def paired_improvement(
    a: ArrayLike, b: ArrayLike, *, n_resamples: int = 50_000, rng: Rng = 0
) -> Interval:
    """P(A > B) where a[j] and b[j] share a seed, ties one half, with a percentile bootstrap.

    Bouthillier, arXiv 2103.03098: significant where the low end passes .5, meaningful where the
    high end passes .75; an improvement is both. 29 pairs detect .75 at alpha = beta = .05.
    """
    signs, rng = np.sign(np.subtract(a, b, dtype=np.float64)), np.random.default_rng(rng)
    score, shares = np.array([1, 0.5, 0]), np.array([np.mean(signs == s) for s in (1, 0, -1)])

    def resample(size: int) -> NDArray[np.float64]:
        return rng.multinomial(signs.size, shares, size=size) @ score / signs.size

    return _bootstrap(shares @ score, resample, n_resamples, len(shares))


def seeds_for_mean(sd: float, half_width: float) -> int:
    """Runs whose mean is known to +/- half_width, in the unit of `sd`: (1.96 sd / half_width)^2."""
    return max(2, math.ceil((stats.norm.ppf(HIGH) * sd / half_width) ** 2))


def seeds_for_sd(relative: float, excess: float = 0.0) -> int:
    """Runs whose SD is known to +/- that share of it: 1 + 1.96^2 / (2 relative^2) (1 + excess / 2).

    `excess` is the kurtosis above a normal's, as `excess_kurtosis` finds it.
    """
    normal = (stats.norm.ppf(HIGH) / relative) ** 2 / 2
    return max(2, math.ceil(1 + normal * (1 + excess / 2)))


def share_below(reference: float, x: ArrayLike) -> Interval:
    """Share of runs below a published number, a tie one half, with Jeffreys' interval.

    Brown, Cai, DasGupta 2001, 10.1214/ss/1009213286. Ties are exact only in whole images.
    """
    x = np.asarray(x, np.float64)
    below = (x < reference).sum() + (x == reference).sum() / 2
    low, high = stats.beta.ppf([LOW, HIGH], below + 0.5, x.size - below + 0.5)
    return Interval(below / x.size, low if below else 0.0, high if below < x.size else 1.0)


def variance_ratio(a: ArrayLike, b: ArrayLike) -> Interval:
    """Var(a) / Var(b) of independent families of runs, with the F interval of `_degrees`.

    Where the two share seeds and these move them alike, the interval is too wide.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    ratio = np.var(a, ddof=1) / np.var(b, ddof=1)
    return Interval(ratio, *ratio / stats.f.ppf([HIGH, LOW], _degrees(a), _degrees(b)))
