"""Estimators that look at single predictions: what makes accuracy vary, and how runs disagree.

R runs share n test images of k classes. E[r, i] = 1 where run r errs on image i, n_ic runs predict
class c for image i, and q_ic = n_ic / R. Predictions are consumed in blocks of runs, and what is
kept grows by two integers a run.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlp_jax.analysis.stats import FEW_RUNS, Interval, Rng, bootstrap

ROWS = 255  # runs counted at once: the most that a uint8 counter holds


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


def count_block(block: ArrayLike, labels: NDArray, classes: NDArray[np.int64]) -> NDArray:
    """Add predictions [r, n] to `classes`, n_ic [n, k], in place.

    Returns the images that each run gets right among those of even and of odd index, [2, r].
    """
    correct: list[NDArray] = [np.zeros((2, 0), np.int64)]
    for part in _parts(block):
        for c in range(classes.shape[1]):
            # A uint8 sum over at most 255 rows cannot wrap, and is 9 times as fast as bincount.
            classes[:, c] += (part == c).view(np.uint8).sum(axis=0, dtype=np.uint8)
        right = part == labels
        halves = (right[:, ::2], right[:, 1::2])
        correct.append(np.array([np.count_nonzero(half, axis=1) for half in halves]))
    return np.concatenate(correct, axis=1)


def _parts(block: ArrayLike) -> list[NDArray[np.integer]]:
    block = np.asarray(block)
    return [block[start : start + ROWS] for start in range(0, len(block), ROWS)]


def count_predictions(
    blocks: Iterable[ArrayLike], labels: ArrayLike, *, n_classes: int = 10
) -> PredictionCounts:
    """Counts of blocks of predictions, integers [r, n] of any r; ValueError for a bad class."""
    labels = np.asarray(labels).astype(np.int64)
    classes = np.zeros((labels.size, n_classes), np.int64)
    correct = [count_block(block, labels, classes) for block in blocks]
    counts = PredictionCounts(labels, classes, *np.concatenate(correct, axis=1))
    if classes.sum() != counts.runs * labels.size:
        raise ValueError(f"a prediction is not in 0..{n_classes - 1}")
    return counts


def error_overlaps(block: ArrayLike, counts: PredictionCounts) -> NDArray[np.int64]:
    """Per run of a block, the errors it shares with all: g_r = sum_i E[r, i] sum_s E[s, i], [r].

    g is the row sums of the Gram matrix E E^T, which itself (R x R) is never made.
    """
    errors = counts.errors.astype(np.float64)  # BLAS; every sum stays an exact integer below 2**53
    shared = [(part != counts.labels).astype(np.float64) @ errors for part in _parts(block)]
    return np.concatenate([np.zeros(0), *shared]).astype(np.int64)


def variance_parts(counts: PredictionCounts) -> VarianceParts:
    """The variance of test accuracy, and what of it would remain on an infinite test set.

    Jordan, arXiv 2304.01910, Theorem 2. test = Var_r(accuracy); independent = (1/n^2) sum_i
    Var_r(E[:, i]); distribution = n/(n-1) (test - independent), unbiased, the mean covariance of
    two images' errors; halves = Cov_r of the accuracies on even and odd images, as unbiased.
    """
    runs, n, errors = counts.runs, len(counts.labels), counts.errors
    even, odd = np.array(sorted(zip(counts.correct_even, counts.correct_odd, strict=True))).T
    test = (even + odd).var(ddof=1) / n**2
    independent = (errors * (runs - errors)).sum() / (runs * (runs - 1) * n**2)
    halves = np.cov(even, odd)[0, 1] / (n // 2 * (n - n // 2))
    return VarianceParts(test, independent, n / (n - 1) * (test - independent), halves)


def signed_sqrt(variance: ArrayLike) -> NDArray[np.float64]:
    """sign(v) sqrt(|v|): the SD of a variance estimate; negative where the estimate is."""
    return np.sign(variance) * np.sqrt(np.abs(variance))


def distribution_sd(
    counts: PredictionCounts, overlaps: NDArray, *, n_resamples: int = 10_000, rng: Rng = 0
) -> Interval:
    """Signed SD of accuracy on the whole distribution, with a percentile bootstrap over runs.

    Jordan, arXiv 2304.01910, Theorem 2; `overlaps` are the `error_overlaps` of all runs, in the
    order of `counts`. The ends are nan below FEW_RUNS; the interval covers 85 to 90 % of the time
    at 30 runs and about 93 % from 100 on.

    Where a resample holds run r w_r times, image i has e_i + delta_i errors, delta_i =
    sum_r (w_r - 1) E[r, i], and V_ind needs sum_i of that times R less it: sum_i e_i (R - e_i) +
    sum_r (w_r - 1) (R T_r - 2 g_r) - sum_i delta_i^2, T_r the errors of run r and g the overlaps.
    All is exact but the last sum, set to its mean sum_i e_i (R - e_i) / R: under 1 % of the width.
    """
    runs, n, parts = counts.runs, len(counts.labels), variance_parts(counts)
    if len(overlaps) != runs or overlaps.sum() != (counts.errors**2).sum():
        raise ValueError("the overlaps come from other blocks than the counts")
    estimate = float(signed_sqrt(parts.distribution))
    if runs < FEW_RUNS:
        return Interval(estimate, math.nan, math.nan)
    wrong = n - counts.correct
    # a bootstrap draws by position: in this order equal sets of runs give equal intervals
    order = np.lexsort((overlaps, counts.correct_odd, counts.correct_even))
    wrong, overlaps = wrong[order], overlaps[order]
    # Both are centred: equal runs then give 0 exactly, and no two large sums cancel.
    centred, slope = wrong - wrong.mean(), runs * wrong - 2 * overlaps
    linear = centred**2 / (runs - 1) - (slope - slope.mean()) / (runs * (runs - 1))
    rest = (1 - 1 / runs) * n**2 * parts.independent
    rng = np.random.default_rng(rng)

    def resample(size: int) -> NDArray[np.float64]:
        drawn = rng.integers(runs, size=(size, runs))
        spread = centred[drawn].sum(axis=1) ** 2 / (runs * (runs - 1))
        return signed_sqrt((linear[drawn].sum(axis=1) - spread - rest) / (n * (n - 1)))

    return bootstrap(estimate, resample, n_resamples, runs)


def predicted_sd(counts: PredictionCounts) -> PredictedSD:
    """SD of accuracy predicted by calibration, P(label = c | q_i) = q_ic, and independence.

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


def sd_over_test_sets(counts: PredictionCounts, other: PredictionCounts | None = None) -> float:
    """SD of mean accuracy over test sets of n images, were the runs endless; nan of one run.

    SD_i(p_i) / sqrt(n), p_i the share of runs that get image i right, without the variance
    p_i (1 - p_i) / R that p_i has of its own. With `other`, of the difference of two means.
    """
    sides = [counts] if other is None else [counts, other]
    if min(side.runs for side in sides) < 2:
        return math.nan
    p = [1 - side.errors / side.runs for side in sides]
    noise = sum((q * (1 - q)).mean() / (s.runs - 1) for q, s in zip(p, sides, strict=True))
    spread = (p[0] if other is None else p[0] - p[1]).var(ddof=1) - noise
    return math.sqrt(max(0.0, spread) / len(counts.labels))


def ensemble_correct(counts: PredictionCounts) -> int:
    """Images that the majority vote of all runs gets right; a tie goes to the smallest class."""
    return int((counts.classes.argmax(axis=1) == counts.labels).sum())
