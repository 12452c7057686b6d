"""Estimators that look at single predictions: what makes accuracy vary, and how runs disagree.

R runs share n test images of k classes. E[r, i] = 1 where run r errs on image i, n_ic runs predict
class c for image i, and q_ic = n_ic / R. Predictions are consumed in blocks of runs, once, and what
is kept grows by two integers a run.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlp_jax.analysis.stats import Interval, Z, sd_interval

FEW_ERRORS = 10  # images; of simulated intervals, 6 % miss with 10 errors, 10 with 5, 26 with 1
ROWS = 255  # runs counted at once: the most that a uint8 counter holds


class PredictionCounts(NamedTuple):
    """All that the estimators need to know of R x n predictions."""

    labels: NDArray[np.int64]  # [n]
    classes: NDArray[np.int64]  # [n, k]: n_ic
    moments: NDArray[np.int64]  # [2, n]: sum_r E[r, i] T_r, and of T_r^2; T_r the errors of run r
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

    @property
    def has_few_errors(self) -> bool:
        """Whether a run misses fewer than FEW_ERRORS images, or gets as few right, on average."""
        wrong = self.errors.sum() / self.runs
        return bool(min(wrong, len(self.labels) - wrong) < FEW_ERRORS)


class VarianceParts(NamedTuple):
    """Variances between runs, in squared accuracy; `distribution` and `halves` may be negative."""

    test: float
    independent: float
    distribution: float
    halves: float


class PredictedSD(NamedTuple):
    """SDs of accuracy that calibrated, independent errors would have, as fractions."""

    binary: float
    k_class: float
    label_free: float


class Disagreement(NamedTuple):
    """Shares of images: two runs differ; a run errs; the class-aggregated calibration error."""

    disagreement: float
    error: float
    calibration_error: float


def count_block(block: ArrayLike, labels: NDArray, classes: NDArray, moments: NDArray) -> NDArray:
    """Add predictions [r, n] in place to the `classes` and `moments` of PredictionCounts.

    Returns the images that each run gets right among those of even and of odd index, [2, r].
    """
    block, correct = np.asarray(block), [np.zeros((2, 0), np.int64)]
    for start in range(0, len(block), ROWS):
        part = block[start : start + ROWS]
        for c in range(classes.shape[1]):
            # A uint8 sum over at most 255 rows cannot wrap, and is 9 times as fast as bincount.
            classes[:, c] += (part == c).view(np.uint8).sum(axis=0, dtype=np.uint8)
        right = part == labels
        halves = (right[:, ::2], right[:, 1::2])
        correct.append(np.array([np.count_nonzero(half, axis=1) for half in halves]))
        errors = labels.size - correct[-1].sum(axis=0, dtype=np.float64)
        # BLAS; every sum stays an exact integer below 2**53
        powers = np.stack([errors, errors**2])
        moments += (powers.sum(axis=1, keepdims=True) - powers @ right).astype(np.int64)
    return np.concatenate(correct, axis=1)


def variance_parts(counts: PredictionCounts) -> VarianceParts:
    """The variance of test accuracy, and what of it would remain on an infinite test set.

    Jordan, arXiv 2304.01910, Theorem 2. test = Var_r(accuracy); independent = (1/n^2) sum_i
    Var_r(E[:, i]); distribution = n/(n-1) (test - independent), unbiased, the mean covariance of
    two images' errors; halves = Cov_r of the accuracies on even and odd images, as unbiased.
    """
    runs, n, errors = counts.runs, len(counts.labels), counts.errors
    order = np.lexsort((counts.correct_odd, counts.correct_even))  # equal runs, equal numbers
    even, odd = counts.correct_even[order], counts.correct_odd[order]
    test = (even + odd).var(ddof=1) / n**2
    independent = (errors * (runs - errors)).sum() / (runs * (runs - 1) * n**2)
    halves = np.cov(even, odd)[0, 1] / (n // 2 * (n - n // 2))
    return VarianceParts(test, independent, n / (n - 1) * (test - independent), halves)


def signed_sqrt(variance: ArrayLike) -> NDArray[np.float64]:
    """sign(v) sqrt(|v|): the SD of a variance estimate; negative where the estimate is."""
    return np.sign(variance) * np.sqrt(np.abs(variance))


def image_variance(counts: PredictionCounts) -> float:
    """What the choice of n test images adds to the variance of `VarianceParts.distribution`.

    That is a U statistic of images, hence (Hoeffding 1948) (4/n) Var_i(c_i), c_i = mean over j of
    Cov_r(E[:, i], E[:, j]); less the variance that c_i has of R runs, so that it may be negative.
    """
    runs, n, wrong_runs = counts.runs, len(counts.labels), counts.errors
    errors = n - np.sort(counts.correct)  # in this order equal sets of runs give equal numbers
    mean, p = errors.mean(), wrong_runs / runs
    q = 1 - p
    # sums over the runs that err on i: of T_r - mean, and of its square
    first = counts.moments[0] - mean * wrong_runs
    second = counts.moments[1] - 2 * mean * counts.moments[0] + mean**2 * wrong_runs
    # (E - p) (errors on other images, less their mean), summed over all runs, and its square
    products = first - wrong_runs * q
    squares = q**2 * (second - 2 * q * first + wrong_runs * q**2)
    rest = ((errors - mean) ** 2).sum() - second - 2 * p * first
    squares += p**2 * (rest + (runs - wrong_runs) * p**2)
    noise = (squares - products**2 / runs) / (runs * (runs - 1))
    spread = (products / (runs - 1)).var(ddof=1) - noise.mean()
    return float(4 / n * spread / (n - 1) ** 2)


def distribution_sd(counts: PredictionCounts) -> Interval:
    """Signed SD of accuracy on the whole distribution, of which runs and test images are samples.

    Jordan, arXiv 2304.01910, Theorem 2. The ends are those of V_test (`sd_interval`) less V_ind,
    whose own error is small, joined with `image_variance` as in Zou and Donner 2008,
    10.1002/sim.3095 (MOVER); where it is negative it counts as 0, so the ends are never closer than
    those of the runs alone. Drawing runs and images anew, at 30, 100 and 300 runs, they covered 93
    to 98 % of the time for normal effects of the seed and 91 to 98 % for a skewness of up to 1.4,
    least at 30 runs; at a skewness of 3, 74, 87 and 93 %. Without the images, down to 78 %. The
    ends are nan if there are too few errors (`has_few_errors`) to say how images differ.
    """
    n, parts = len(counts.labels), variance_parts(counts)
    ends = np.array(sd_interval(np.sort(counts.correct), resolution=1)[1:]) / n
    of_runs = n / (n - 1) * (ends**2 - parts.independent) - parts.distribution
    both = of_runs**2 + Z**2 * max(0.0, image_variance(counts))
    low, high = parts.distribution + np.array([-1, 1]) * np.sqrt(both)
    if counts.has_few_errors:
        low = high = math.nan
    return Interval(*(float(signed_sqrt(each)) for each in (parts.distribution, low, high)))


def predicted_sd(counts: PredictionCounts) -> PredictedSD:
    """SD of accuracy if errors are independent and calibrated: P(label = c | q_i) = q_ic.

    They predict sqrt(V_ind), not the whole SD; `label_free` looks at the votes alone.

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


def error_covariance(pairs: Iterable[tuple[NDArray, NDArray]], n: int) -> float:
    """Mean over n images of Cov_r(E_A[r, i], E_B[r, i]), r the pairs of runs; 0 for fewer than two.

    Each run is given as the images that it gets right, 8 to a byte; these have the same covariance.
    """
    sums, runs = np.zeros((3, n), np.int64), 0
    for a, b in pairs:
        sums += np.unpackbits(np.stack([a, b, a & b]), axis=1, count=n)
        runs += 1
    a, b, both = sums
    return float((both - a * b / runs).mean() / (runs - 1)) if runs > 1 else 0.0


def sd_over_test_sets(
    counts: PredictionCounts,
    other: PredictionCounts | None = None,
    *,
    pairs: int = 0,
    covariance: float = 0.0,
) -> float:
    """SD of mean accuracy over test sets of n images, for infinitely many runs; nan for one run,
    or for few errors (`has_few_errors`).

    SD_i(p_i) / sqrt(n), p_i the share of runs that get image i right, without the variance
    p_i (1 - p_i) / R that p_i has of its own. With `other`, of the difference of two means; if
    `pairs` of the runs share seeds, that variance is less by what they share, which `covariance`
    says (`error_covariance`).
    """
    sides = [counts] if other is None else [counts, other]
    p = [1 - side.errors / side.runs for side in sides]
    if any(side.runs < 2 or side.has_few_errors for side in sides):
        return math.nan
    noise = sum((q * (1 - q)).mean() / (s.runs - 1) for q, s in zip(p, sides, strict=True))
    noise -= 2 * covariance * pairs / math.prod(side.runs for side in sides)
    spread = (p[0] if other is None else p[0] - p[1]).var(ddof=1) - noise
    return math.sqrt(max(0.0, spread) / len(counts.labels))


def ensemble_correct(counts: PredictionCounts) -> int:
    """Images that the majority vote of all runs gets right; a tie goes to the smallest class."""
    return int((counts.classes.argmax(axis=1) == counts.labels).sum())
