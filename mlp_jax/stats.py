"""Estimators of how much test accuracy varies between runs, and of why.

Accuracies are fractions in [0, 1] (a reader's percentage points are made in the report), every
variance is over runs with ddof = 1, every interval is at 95 %, and equal inputs and an equal `rng`
give equal outputs. Predictions are only ever consumed in blocks of runs: what is kept grows by two
integers a run, so that the number of runs is bounded by nothing else.

The runs share one test set of n images, k classes; R is the number of runs, E[r, i] = 1 where run
r errs on image i, n_ic the number of runs that predict class c for image i and q_ic = n_ic / R.
Jordan is 'On the Variance of Neural Network Training with respect to Test Sets and Distributions'
(arXiv 2304.01910), Jiang 'Assessing Generalization via Disagreement' (arXiv 2106.13799), Agarwal
'Deep RL at the Edge of the Statistical Precipice' (arXiv 2108.13264), Bouthillier 'Accounting for
Variance in Machine Learning Benchmarks' (arXiv 2103.03098).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LOW, HIGH = 0.025, 0.975  # the tails that a 95 % interval leaves
BLOCK = 4_000_000  # numbers drawn at once by a bootstrap: 32 MB as int64
ROWS = 255  # runs counted at once: the most that a uint8 counter holds

Rng = np.random.Generator | int


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval, all in one unit."""

    estimate: float
    low: float
    high: float


class Summary(NamedTuple):
    """What is said of one family of runs; the unit is that of the values."""

    runs: int
    mean: Interval
    sd: Interval
    min: float
    max: float
    iqm: Interval


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


class PairedImprovement(NamedTuple):
    """P(A > B) over paired seeds and what Bouthillier's rule makes of it."""

    probability: Interval
    significant: bool
    meaningful: bool


class Position(NamedTuple):
    """Where a reference lies among runs: the share of runs below it, and (reference - mean)/SD."""

    share_below: Interval
    z: float


def _values(x: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 1 or x.size < 2 or not np.isfinite(x).all():
        raise ValueError(f"need two or more finite values in one dimension, got shape {x.shape}")
    return x


def _percentile_interval(estimate: float, resampled: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(resampled, [LOW, HIGH])
    return Interval(float(estimate), float(low), float(high))


def mean_interval(x: ArrayLike) -> Interval:
    """Mean with Student's t interval."""
    x = _values(x)
    half = stats.t.ppf(HIGH, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size)
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half))


def sd_interval(x: ArrayLike) -> Interval:
    """Standard deviation (ddof = 1) with the chi-square interval.

    Exact for normal values only. It is preferred to a bootstrap because an accuracy is a mean of
    thousands of nearly independent bits, thus nearly normal, and because over the tens of runs that
    are common the percentile bootstrap of an SD covers too little (at 30 normal values 88 % of the
    time, at 100 93 %). Values with heavy tails, a diverged run say, make it too narrow.
    """
    x = _values(x)
    sd, df = x.std(ddof=1), x.size - 1
    low, high = sd * np.sqrt(df / stats.chi2.ppf([HIGH, LOW], df))
    return Interval(float(sd), float(low), float(high))


def interquartile_mean(x: ArrayLike, *, n_resamples: int = 50_000, rng: Rng = 0) -> Interval:
    """Mean of the middle half (`scipy.stats.trim_mean(x, .25)`) with a percentile bootstrap.

    Agarwal, whose 50,000 resamples are the default. Drawn is how often a resample holds each
    distinct value, not the values (the same distribution): runs share few distinct accuracies, so
    100,000 of them cost little more than 1,000.
    """
    x = _values(x)
    distinct, counts = np.unique(x, return_counts=True)
    rng, cut = np.random.default_rng(rng), x.size // 4
    resampled = []
    for start in range(0, n_resamples, step := max(1, BLOCK // distinct.size)):
        drawn = rng.multinomial(x.size, counts / x.size, size=min(step, n_resamples - start))
        ranks = np.cumsum(drawn, axis=1).clip(cut, x.size - cut)
        kept = np.diff(ranks, axis=1, prepend=cut)
        resampled.append(kept @ distinct / (x.size - 2 * cut))
    return _percentile_interval(stats.trim_mean(x, 0.25), np.concatenate(resampled))


def summarize(x: ArrayLike, *, rng: Rng = 0) -> Summary:
    """Mean, SD, extremes and interquartile mean.

    Beside the mean stand the extremes and never the best seed alone: Picard (arXiv 2109.08203).
    """
    x = _values(x)
    iqm = interquartile_mean(x, rng=rng)
    return Summary(x.size, mean_interval(x), sd_interval(x), float(x.min()), float(x.max()), iqm)


def binomial_sd(p: float, n: int) -> float:
    """SD of accuracy were all n images equally hard: sqrt(p (1 - p) / n).

    Under independent errors an upper bound, since p (1 - p) is concave and images differ; in
    Jordan's runs the variance so foretold is about 2.5 times too large.
    """
    return math.sqrt(p * (1 - p) / n)


def _parts(blocks: Iterable[ArrayLike], n: int) -> Iterable[NDArray[np.integer]]:
    for block in blocks:
        block = np.asarray(block)
        if block.ndim != 2 or block.shape[1] != n or block.dtype.kind not in "iu":
            raise ValueError(f"need integers [runs, {n}], got {block.dtype} {block.shape}")
        yield from (block[start : start + ROWS] for start in range(0, len(block), ROWS))


def count_predictions(
    blocks: Iterable[ArrayLike], labels: ArrayLike, *, n_classes: int = 10
) -> PredictionCounts:
    """Counts of blocks of predictions, integers [r, n] of any r each, in one pass."""
    labels = np.asarray(labels).astype(np.int64)
    classes = np.zeros((labels.size, n_classes), np.int64)
    even, odd = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for part in _parts(blocks, labels.size):
        if part.size and (part.min() < 0 or part.max() >= n_classes):
            raise ValueError(f"a prediction lies outside 0..{n_classes - 1}")
        for c in range(n_classes):
            # A uint8 sum over at most 255 rows cannot wrap, and is 9 times as fast as bincount.
            classes[:, c] += (part == c).view(np.uint8).sum(axis=0, dtype=np.uint8)
        right = part == labels
        even.append(np.count_nonzero(right[:, ::2], axis=1))
        odd.append(np.count_nonzero(right[:, 1::2], axis=1))
    return PredictionCounts(labels, classes, np.concatenate(even), np.concatenate(odd))


def variance_parts(counts: PredictionCounts) -> VarianceParts:
    """The variance of test accuracy, and how much of it would stay on an endless test set.

    test = Var_r(accuracy); independent = (1/n^2) sum_i Var_r(E[:, i]), what `test` would be were
    errors independent between images; distribution = n/(n-1) (test - independent), Jordan Theorem
    2: unbiased, the mean covariance of two different images' errors; halves = Cov_r of the
    accuracies on the even and on the odd images, which estimates the same.
    """
    runs, n, errors = counts.runs, len(counts.labels), counts.errors
    if runs < 2 or n < 2:
        raise ValueError(f"need two runs and two images, got {runs} and {n}")
    test = counts.correct.var(ddof=1) / n**2
    independent = (errors * (runs - errors)).sum() / (runs * (runs - 1) * n**2)
    covariance = np.cov(counts.correct_even, counts.correct_odd)[0, 1]
    halves = covariance / (((n + 1) // 2) * (n // 2))
    distribution = n / (n - 1) * (test - independent)
    return VarianceParts(float(test), float(independent), float(distribution), float(halves))


def signed_sqrt(variance: ArrayLike) -> NDArray[np.float64]:
    """sign(v) sqrt(|v|): the SD of a variance estimate that may be negative.

    Monotone, so that it maps an interval's ends; a negative SD says 'not told from zero', and by
    how much, which a clip at 0 would hide.
    """
    return np.sign(variance) * np.sqrt(np.abs(variance))


def error_overlaps(blocks: Iterable[ArrayLike], counts: PredictionCounts) -> NDArray[np.int64]:
    """Per run, the errors it shares with all runs: g_r = sum_i E[r, i] sum_s E[s, i], int64 [R].

    A second pass over the blocks that `counts` came from, in the same order; g is the row sums of
    the Gram matrix E E^T, which itself (R x R) is never made.
    """
    errors = counts.errors.astype(np.float64)  # BLAS; every sum stays an exact integer below 2**53
    parts = _parts(blocks, errors.size)
    overlaps = [(part != counts.labels).astype(np.float64) @ errors for part in parts]
    return np.concatenate([np.zeros(0), *overlaps]).astype(np.int64)


def distribution_sd(
    counts: PredictionCounts,
    overlaps: NDArray[np.int64],
    *,
    n_resamples: int = 10_000,
    rng: Rng = 0,
) -> Interval:
    """Signed SD of accuracy on the whole distribution, with a percentile bootstrap over runs.

    Jordan Theorem 2; the interval is over runs, on these images. Where a resample holds run r w_r
    times, image i has e_i + delta_i errors, delta_i = sum_r (w_r - 1) E[r, i], and V_ind needs
    sum_i of that times R less it: sum_i e_i (R - e_i) + sum_r (w_r - 1) h_r - sum_i delta_i^2 with
    h_r = R T_r - 2 g_r, T_r the errors of run r and g = `error_overlaps`. All is exact but the last
    sum, which stands at its mean sum_i e_i (R - e_i) / R; its spread changes the interval's width
    by under 1 %. As percentile bootstraps of a variance do, it covers about 90 % of the time at 30
    runs and 93 % from 100 on. Time is R x n_resamples, memory R.
    """
    runs, n, parts = counts.runs, len(counts.labels), variance_parts(counts)
    if len(overlaps) != runs or overlaps.sum() != (counts.errors**2).sum():
        raise ValueError("the overlaps come from other blocks than the counts")
    wrong = n - counts.correct
    # Both are centred: equal runs then give 0 exactly, and no two large sums cancel.
    centred = wrong - wrong.mean()
    slope = runs * wrong - 2 * overlaps
    slope = slope - slope.mean()
    linear = centred**2 / (runs - 1) - slope / (runs * (runs - 1))
    rest = (1 - 1 / runs) * n**2 * parts.independent
    rng, resampled = np.random.default_rng(rng), []
    for start in range(0, n_resamples, step := max(1, BLOCK // runs)):
        drawn = rng.integers(runs, size=(min(step, n_resamples - start), runs))
        spread = centred[drawn].sum(axis=1) ** 2 / (runs * (runs - 1))
        resampled.append(linear[drawn].sum(axis=1) - spread - rest)
    resampled = signed_sqrt(np.concatenate(resampled) / (n * (n - 1)))
    return _percentile_interval(signed_sqrt(parts.distribution), resampled)


def predicted_sd(counts: PredictionCounts) -> PredictedSD:
    """SD of test accuracy foretold by calibration, P(label = c | q_i) = q_ic, and independence.

    binary = sqrt(err / (2n)), Jordan Eq. 6, exact for two classes; k_class = sqrt(err / (n k)), a
    lower bound, Theorem 4. label_free: an image whose label is c has error variance
    q_ic (1 - q_ic), and has that label with probability q_ic, hence the variance
    (1/n^2) sum_ic q_ic^2 (1 - q_ic); with two classes it is the binary one. q^2 (1 - q) is
    estimated by n_ic (n_ic - 1) (R - n_ic) / (R (R - 1) (R - 2)), unbiased at any R >= 3: the
    share of ordered triples of runs of which the first two say c and the third does not.
    """
    runs, (n, k) = counts.runs, counts.classes.shape
    if runs < 3:
        raise ValueError(f"the label-free SD needs three runs, got {runs}")
    error = counts.errors.mean() / runs
    votes = counts.classes.astype(np.float64)  # their cubes overflow int64 at 10^5 runs
    triples = (votes * (votes - 1) * (runs - votes)).sum() / (runs * (runs - 1) * (runs - 2))
    return PredictedSD(
        math.sqrt(error / (2 * n)), math.sqrt(error / (n * k)), math.sqrt(triples) / n
    )


def disagreement(counts: PredictionCounts, *, bins: int = 10) -> Disagreement:
    """How often two runs differ, beside how often one errs; equal where the votes are calibrated.

    Jiang: disagreement = (1/n) sum_i [1 - sum_c n_ic (n_ic - 1) / (R (R - 1))], unbiased. Their
    class-aggregated calibration error (CACE) bounds the gap; here over `bins` equal bins of q_ic,
    (1/n) sum_bins |sum_ic in bin (1[label_i = c] - q_ic)|. Few images have divided votes, so that
    finer bins measure noise.
    """
    runs, n, votes = counts.runs, len(counts.labels), counts.classes
    if runs < 2:
        raise ValueError(f"a disagreement needs two runs, got {runs}")
    differ = 1 - (votes * (votes - 1)).sum() / (n * runs * (runs - 1))
    gap = (counts.labels[:, None] == np.arange(votes.shape[1])) - votes / runs
    cell = np.minimum(votes * bins // runs, bins - 1)
    cace = np.abs(np.bincount(cell.ravel(), gap.ravel())).sum() / n
    return Disagreement(float(differ), float(counts.errors.mean() / runs), float(cace))


def ensemble_correct(counts: PredictionCounts) -> int:
    """Images that the majority vote of all runs gets right; a tie goes to the smallest class."""
    return int((counts.classes.argmax(axis=1) == counts.labels).sum())


def probability_of_improvement(a: ArrayLike, b: ArrayLike) -> float:
    """P(A > B) of independent runs: Mann-Whitney U / (N K), a tie counts one half (Agarwal)."""
    a, b = _values(a), _values(b)
    ranks = stats.rankdata(np.concatenate([a, b]))[: a.size]
    return float((ranks.sum() - a.size * (a.size + 1) / 2) / (a.size * b.size))


def paired_improvement(
    a: ArrayLike, b: ArrayLike, *, n_resamples: int = 50_000, rng: Rng = 0
) -> PairedImprovement:
    """P(A > B) where a[j] and b[j] share a seed, ties one half, with a percentile bootstrap.

    Bouthillier: significant where the interval's low end passes .5, meaningful where its
    high end passes gamma = .75; an improvement is claimed where both hold. 29 pairs detect .75 at
    alpha = beta = .05. Wins and ties of a resample are multinomial, so no pair is ever gathered.
    """
    a, b = _values(a), _values(b)
    if a.size != b.size:
        raise ValueError(f"pairs need equal lengths, got {a.size} and {b.size}")
    score = np.array([1.0, 0.5, 0.0])
    shares = np.array([np.mean(a > b), np.mean(a == b), np.mean(a < b)])
    drawn = np.random.default_rng(rng).multinomial(a.size, shares, size=n_resamples)
    probability = _percentile_interval(shares @ score, drawn @ score / a.size)
    return PairedImprovement(probability, probability.low > 0.5, probability.high > 0.75)


def seeds_for_mean(sd: float, half_width: float) -> int:
    """Runs whose mean is known to +/- half_width, both in one unit: (z sd / half_width)^2.

    z = 1.96, since `sd` is taken as known; the t interval then found is wider by about 1.2 / R.
    """
    return max(2, math.ceil((stats.norm.ppf(HIGH) * sd / half_width) ** 2))


def seeds_for_sd(relative: float) -> int:
    """Runs whose SD is known to +/- relative, a share of it, for near-normal values.

    SD(s) / sigma = 1 / sqrt(2 (R - 1)) to first order, hence R = 1 + z^2 / (2 relative^2).
    """
    return max(2, math.ceil(1 + (stats.norm.ppf(HIGH) / relative) ** 2 / 2))


def locate(reference: float, x: ArrayLike) -> Position:
    """Where a published number lies in the distribution of runs; z is nan where all runs are equal.

    Share of runs below, a tie one half, with Jeffreys' interval Beta(s + 1/2, R - s + 1/2), ends
    set to 0 and 1 at s = 0 and R (Brown, Cai, DasGupta 2001, 10.1214/ss/1009213286): it takes half
    a success as it is, where Clopper-Pearson is over-wide. Two accuracies tie only where both came
    from one division, so give reference and runs in one unit.
    """
    x = _values(x)
    below = float((x < reference).sum() + (x == reference).sum() / 2)
    low, high = stats.beta.ppf([LOW, HIGH], below + 0.5, x.size - below + 0.5)
    share = Interval(
        below / x.size, float(low) if below else 0.0, float(high) if below < x.size else 1.0
    )
    sd = x.std(ddof=1)
    return Position(share, float((reference - x.mean()) / sd) if sd else math.nan)


def variance_ratio(a: ArrayLike, b: ArrayLike) -> Interval:
    """Var(a) / Var(b) of independent families of runs, with the F interval.

    For near-normal values, as in `sd_interval`; the square roots are the ratio of the SDs.
    """
    a, b = _values(a), _values(b)
    if not b.var():
        raise ValueError("the runs of the second family are all equal")
    ratio = a.var(ddof=1) / b.var(ddof=1)
    low, high = ratio / stats.f.ppf([HIGH, LOW], a.size - 1, b.size - 1)
    return Interval(float(ratio), float(low), float(high))
