"""The estimators against arithmetic done by hand, scipy, and the properties they must have.

Every Monte Carlo draw is seeded; its tolerance is four or more of its own standard errors.
"""

import math

import numpy as np
import pytest
import scipy.stats
from counting import count_predictions
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlp_jax.analysis import predictions as preds
from mlp_jax.analysis import stats

LABELS = np.array([0, 1, 2, 0])
PREDICTIONS = np.array([[0, 1, 2, 0], [0, 1, 2, 1], [1, 1, 2, 1]], np.uint8)  # correct: 4, 3, 2

# No deadline: a busy machine is no failure.
repeatable = settings(derandomize=True, deadline=None)
tables = hnp.arrays(
    np.uint8, st.tuples(st.integers(3, 12), st.integers(2, 9)), elements=st.integers(0, 2)
)


def count(predictions, labels=None, k=3):
    labels = np.zeros(predictions.shape[1], int) if labels is None else labels
    return count_predictions([predictions], labels, n_classes=k)


def distribution_sd(predictions):
    return preds.distribution_sd(count(predictions))


def test_mean_and_sd_goldens():
    # mean 2, sd 1; t(.975, 2 df) = 4.302653, half width 4.302653 / sqrt(3) = 2.484138
    np.testing.assert_allclose(stats.mean_interval([1, 2, 3]), (2, -0.484138, 4.484138), atol=1e-6)
    # chi-square with 2 df has quantile -2 ln(1 - p): sd sqrt(2 / (-2 ln .025)) and so on
    want = (1, 1 / math.sqrt(-math.log(0.025)), 1 / math.sqrt(-math.log(0.975)))
    np.testing.assert_allclose(stats.sd_interval([1, 2, 3]), want)


def test_runs_that_happen_to_be_equal_are_not_certain():
    """As the same numbers before they were rounded to whole images would not be."""
    mean, sd = (each([7, 7, 7], resolution=1) for each in (stats.mean_interval, stats.sd_interval))
    before = np.array([-1, 0, 1]) / math.sqrt(12)  # as wide as rounding makes them
    assert mean[1:] == pytest.approx(7 + np.array(stats.mean_interval(before)[1:]))
    assert sd == pytest.approx((0, 0, stats.sd_interval(before).high))
    x = [6, 7, 9]
    assert stats.mean_interval(x, resolution=1) == stats.mean_interval(x)
    assert stats.sd_interval(x, resolution=1) == stats.sd_interval(x)


def test_mean_interval_is_scipys():
    x = np.random.default_rng(0).normal(size=17)
    want = scipy.stats.ttest_1samp(x, 0).confidence_interval(0.95)
    np.testing.assert_allclose(stats.mean_interval(x)[1:], want)


def test_interquartile_mean_goldens():
    # the middle half of 1..8 is 3, 4, 5, 6; of five values one is cut from either end
    assert stats.interquartile_mean(range(1, 9)).estimate == 4.5
    assert stats.interquartile_mean([100, 3, 2, 1, 0]).estimate == 2
    # of two values nothing is cut; their resamples would miss half of the time
    estimate, low, high = stats.interquartile_mean([0, 1])
    assert estimate == 0.5
    assert math.isnan(low)
    assert math.isnan(high)


def test_the_interquartile_mean_of_equal_runs_is_as_uncertain_as_their_mean():
    same = np.full(9, 97.0)
    wide = stats.mean_interval(same, resolution=1)
    assert stats.interquartile_mean(same, resolution=1) == pytest.approx(wide)
    assert wide.high - wide.low > 0.4
    x = np.arange(40.0)  # nothing changes where the runs differ
    assert stats.interquartile_mean(x, resolution=1) == stats.interquartile_mean(x)


@pytest.mark.parametrize("decimals", [6, 1])  # without ties and with many
def test_interquartile_mean_is_scipys_bootstrap(decimals):
    x = (np.random.default_rng(1).normal(size=24) ** 5).round(
        decimals
    )  # tails that a cut must drop
    got = stats.interquartile_mean(x)
    want = scipy.stats.bootstrap(
        (x,),
        lambda v, axis: scipy.stats.trim_mean(v, 0.25, axis=axis),
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert got.estimate == scipy.stats.trim_mean(x, 0.25)
    # an end's Monte Carlo error is sqrt(.025 x .975 / 20,000) / .0584 = .019 SD, .5 % of the width
    np.testing.assert_allclose(got[1:], want, atol=0.03 * (want.high - want.low))


def test_bootstrap_blocks_do_not_change_its_size(monkeypatch):
    x = np.arange(20.0)
    whole = stats.interquartile_mean(x, n_resamples=5_000)
    monkeypatch.setattr(stats, "BLOCK", 7)
    assert stats.interquartile_mean(x, n_resamples=5_000) == whole


@pytest.mark.parametrize(
    "bootstrap",
    [
        lambda **kw: stats.interquartile_mean(np.arange(40.0) ** 2, n_resamples=300, **kw),
        lambda **kw: stats.interquartile_mean(np.arange(9.0) ** 2 / 7, **kw),
    ],
)
def test_bootstrap_honours_its_seed(bootstrap):
    assert bootstrap(rng=3) == bootstrap(rng=3) == bootstrap(rng=np.random.default_rng(3))
    assert bootstrap(rng=3) != bootstrap(rng=4)
    generator = np.random.default_rng(3)
    assert bootstrap(rng=generator) != bootstrap(rng=generator)


def test_binomial_sd():
    assert stats.binomial_sd(0.5, 25) == 0.1  # sqrt(.25 / 25)


@pytest.mark.parametrize(("interval", "truth"), [(stats.mean_interval, 0), (stats.sd_interval, 1)])
def test_normal_intervals_cover(interval, truth):
    samples = np.random.default_rng(5).normal(size=(1500, 8))
    ends = np.array([interval(x)[1:] for x in samples])
    covered = np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1]))
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 1500)  # .0225


def test_heavy_tails_golden():
    # moments .1 and .1: 19 / (18 x 17) (21 x 7 + 6) = 9.5; 19 / (1 + 9.5 x 19 / 40) = 19 / 5.5125
    x = [0] * 18 + [1, -1]
    assert stats.excess_kurtosis(x) == pytest.approx(9.5)
    df = 19 / 5.5125
    ends = math.sqrt(2 / 19) * np.sqrt(df / scipy.stats.chi2.ppf([0.975, 0.025], df))
    np.testing.assert_allclose(stats.sd_interval(x)[1:], ends)
    assert stats.excess_kurtosis(x[1:]) == stats.excess_kurtosis([3] * 20) == 0  # too few; equal


def test_intervals_of_spread_cover_heavy_tails():
    """Laplace values, kurtosis 6: the plain chi-square and F intervals would cover 79 and 78 %."""
    rng, truth = np.random.default_rng(6), math.sqrt(2)
    samples = rng.laplace(size=(600, 2, 300))
    of_sd = [stats.sd_interval(a) for a, _ in samples]
    of_ratio = [stats.variance_ratio(a, b) for a, b in samples]
    assert 0.91 < np.mean([got.low <= truth <= got.high for got in of_sd]) < 0.97
    assert 0.91 < np.mean([got.low <= 1 <= got.high for got in of_ratio]) < 0.97


def test_counts_goldens():
    counts = count(PREDICTIONS, LABELS)
    assert counts.runs == 3
    assert counts.classes.tolist() == [[2, 1, 0], [0, 3, 0], [0, 0, 3], [1, 2, 0]]
    assert counts.correct_even.tolist() == [2, 2, 1]  # images 0 and 2
    assert counts.correct_odd.tolist() == [2, 1, 1]
    assert counts.correct.tolist() == [4, 3, 2]
    assert counts.errors.tolist() == [1, 0, 0, 2]
    # run 1 errs on image 3 alone, run 2 on images 0 and 3
    assert counts.moments.tolist() == [[2, 0, 0, 1 + 2], [4, 0, 0, 1 + 4]]


def test_variance_parts_goldens():
    parts = preds.variance_parts(count(PREDICTIONS, LABELS))
    # totals 4, 3, 2 have variance 1, over 4^2; sum e (3 - e) = 2 + 2, over 3 x 2 x 4^2;
    # 4/3 (1/16 - 1/24) = 1/36; halves 2,2,1 and 2,1,1 have covariance 1/6, over 2 x 2
    np.testing.assert_allclose(parts, (1 / 16, 1 / 24, 1 / 36, 1 / 24))


@repeatable
@given(tables)
def test_distribution_variance_is_mean_off_diagonal_covariance(predictions):
    covariance = np.cov((predictions != 0).T.astype(float))
    n = len(covariance)
    parts = preds.variance_parts(count(predictions))
    off = covariance.sum() - covariance.trace()
    assert parts.distribution == pytest.approx(off / (n * (n - 1)), abs=1e-12)
    assert parts.test == pytest.approx(covariance.mean(), abs=1e-12)
    assert parts.independent == pytest.approx(covariance.trace() / n**2, abs=1e-12)
    assert parts.halves == pytest.approx(covariance[::2, 1::2].mean(), abs=1e-12)


@repeatable
@given(tables, st.lists(st.integers(0, 12), max_size=4))
def test_blocks_equal_all_at_once(predictions, cuts):
    labels = np.arange(predictions.shape[1]) % 3
    blocks = np.split(predictions, np.sort(np.minimum(cuts, len(predictions))).astype(int))
    whole, streamed = (
        count_predictions(iter(b), labels, n_classes=3) for b in ([predictions], blocks)
    )
    for a, b in zip(whole, streamed, strict=True):
        np.testing.assert_array_equal(a, b)
    errors = (predictions != labels).astype(int)
    totals = errors.sum(axis=1)
    np.testing.assert_array_equal(whole.moments, [totals @ errors, totals**2 @ errors])


def test_identical_runs_vary_by_nothing():
    # 600 runs: more than a uint8 counter holds, in one block
    predictions = np.tile(np.array([0, 1, 2, 1, 0] * 5, np.uint8), (600, 1))
    counts = count(predictions)
    assert counts.classes.max() == 600
    assert preds.variance_parts(counts) == (0, 0, 0, 0)
    estimate, low, high = distribution_sd(predictions)
    assert (estimate, low) == (0, 0)
    # runs that are equal once rounded to whole images may differ before
    rounding = stats.sd_interval(counts.correct, resolution=1).high / 25
    assert high == pytest.approx(rounding * math.sqrt(25 / 24))
    assert preds.predicted_sd(counts).label_free == 0
    assert preds.disagreement(counts).disagreement == 0


def bernoulli(rng, runs, n, shift=0.0):
    """Predictions 0 (right) or 1 with an error rate of its own for every image."""
    rng = np.random.default_rng(rng)
    rate = np.linspace(0.05, 0.65, n)
    shifts = shift * rng.choice([-1, 1], size=(runs, 1))
    return (rng.random((runs, n)) < rate + shifts).astype(np.uint8)


@pytest.mark.parametrize("shift", [0, 0.05])
def test_distribution_variance_is_unbiased(shift):
    # independent errors: E = 0; a shift of +/- .05 common to a run's errors: E = Var(p_r) = .05^2
    rng = np.random.default_rng(6)
    draws = np.array(
        [preds.variance_parts(count(bernoulli(rng, 20, 60, shift))) for _ in range(600)]
    )
    error = draws.std(axis=0, ddof=1) / math.sqrt(600)
    assert error[2:].max() < 0.0025 / 10  # sharp enough to tell the two cases apart
    np.testing.assert_array_less(np.abs(draws.mean(axis=0) - shift**2)[2:], 4 * error[2:])


def test_signed_sqrt():
    assert preds.signed_sqrt([-4, 0, 9]).tolist() == [-2, 0, 3]


@repeatable
@given(tables)
def test_image_variance_is_its_definition(predictions):
    errors, n = (predictions != 0).astype(float), predictions.shape[1]
    of_others = (errors.sum(axis=1)[:, None] - errors) / (n - 1)
    per_run = (errors - errors.mean(axis=0)) * (of_others - of_others.mean(axis=0))
    covariance = per_run.sum(axis=0) / (len(errors) - 1)  # c_i, without a matrix of all pairs
    matrix = np.cov(errors.T)
    assert covariance == pytest.approx((matrix.sum(axis=0) - matrix.diagonal()) / (n - 1))
    noise = per_run.var(axis=0, ddof=1).mean() / len(errors)
    want = 4 / n * (covariance.var(ddof=1) - noise)
    assert preds.image_variance(count(predictions)) == pytest.approx(want, abs=1e-12)


def sample(rng, runs, n, strength, skewed):
    """Predictions of a new test set; errors rise together, on some images more than on others."""
    rate = rng.beta(0.12, 3, n)
    z = (rng.gamma(4, size=runs) - 4) / 2 if skewed else rng.normal(size=runs)
    moved = rate + strength * rate * (1 - rate) * z[:, None]
    return (rng.random((runs, n)) < moved).astype(np.uint8)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("strength", [0, 0.5])
@pytest.mark.parametrize("runs", [30, 100, 300])
def test_distribution_sd_covers_other_runs_and_images(runs, strength, skewed):
    rng, many = np.random.default_rng([runs, int(100 * strength), skewed]), 200
    rate = 0.12 / 3.12
    truth = strength * (rate - rate * (0.12 + 1) / (3.12 + 1))  # E p (1 - p) of the beta
    got = [distribution_sd(sample(rng, runs, 400, strength, skewed)) for _ in range(many)]
    covered = np.mean([each.low <= truth <= each.high for each in got])
    # 92 to 98 %, within three standard errors
    assert covered > 0.88


def test_distribution_sd_has_no_interval_of_a_few_errors():
    """Which say too little of how the errors on other images go together."""
    for n, few in ((25, True), (31, False)):  # 35 % of them are missed: 9 or 11
        wrong = bernoulli(7, 50, n)
        for each in (wrong, 1 - wrong):
            assert math.isnan(distribution_sd(each).high) == few


def test_distribution_sd_joins_two_intervals():
    predictions = bernoulli(7, 50, 400, 0.05)
    counts, got = count(predictions), distribution_sd(predictions)
    parts, ends = preds.variance_parts(counts), np.array(stats.sd_interval(counts.correct)) / 400
    of_runs = (ends[1:] ** 2 - parts.independent) * 400 / 399 - parts.distribution
    images = 1.959964 * math.sqrt(preds.image_variance(counts))
    want = parts.distribution + np.array([-1, 1]) * np.hypot(of_runs, images)
    np.testing.assert_allclose(np.sign(got[1:]) * np.square(got[1:]), want, rtol=1e-6)
    assert got.estimate == preds.signed_sqrt(parts.distribution)


def test_distribution_sd_is_as_uncertain_as_it_is_on_these_images():
    """A negative estimate of what other images add is none."""
    negative = 0
    for seed in range(60):
        counts = count(bernoulli(seed, 30, 200))
        parts, ends = preds.variance_parts(counts), np.array(stats.sd_interval(counts.correct)[1:])
        of_runs = ((ends / 200) ** 2 - parts.independent) * 200 / 199
        got = np.array(preds.distribution_sd(counts)[1:])
        wider = np.sign(got) * got**2 - of_runs
        if preds.image_variance(counts) < 0:
            negative += 1
            np.testing.assert_allclose(wider, 0, atol=1e-9)
        else:
            assert wider[0] < 0 < wider[1]
    assert 5 < negative < 55


def test_distribution_sd_of_equally_many_errors_has_two_ends():
    rng = np.random.default_rng(3)
    predictions = rng.permuted(np.tile([1] * 20 + [0] * 80, (4, 1)), axis=1).astype(np.uint8)
    estimate, low, high = distribution_sd(predictions)
    assert low < estimate < high


def test_distribution_sd_does_not_depend_on_the_order_of_the_runs():
    predictions = bernoulli(7, 50, 400)
    shuffled = np.random.default_rng(0).permutation(predictions)
    assert distribution_sd(shuffled) == distribution_sd(predictions)


def test_predicted_sd_goldens():
    # err 3/12; sum n_ic (n_ic - 1) (3 - n_ic) = 2 (image 0) + 2 (image 3), over 3 x 2 x 1, 4^2
    want = np.sqrt([1 / 4 / 8, 1 / 4 / 12, 4 / 6 / 16])
    np.testing.assert_allclose(preds.predicted_sd(count(PREDICTIONS, LABELS)), want)


NONE = np.zeros((2, 1), int)  # moments, which these do not look at


def one_image(votes, label=0):
    runs = np.zeros(sum(votes), int)
    return preds.PredictionCounts(np.array([label]), np.array([votes]), NONE, runs, runs)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.8])
def test_label_free_variance_is_unbiased_at_few_runs(q):
    # over all outcomes of 5 runs, weighed: q^2 (1 - q) + (1 - q)^2 q = q (1 - q), with no tolerance
    votes = [(m, 5 - m) for m in range(6)]
    variance = [preds.predicted_sd(one_image(v)).label_free ** 2 for v in votes]
    mean = np.dot(scipy.stats.binom.pmf(np.arange(6), 5, q), variance)
    assert mean == pytest.approx(q * (1 - q))
    # as Jordan's Eq. 6 has it: calibrated labels err at 2 q (1 - q), and V = err / (2n)
    label_shares = [q, 1 - q]
    binary = [
        np.dot(label_shares, [preds.predicted_sd(one_image(v, c)).binary ** 2 for c in (0, 1)])
        for v in votes
    ]
    assert np.dot(scipy.stats.binom.pmf(np.arange(6), 5, q), binary) == pytest.approx(mean)


def test_k_class_bound_is_tight_for_even_votes():
    # q = 1/3 thrice: 3 (1/9) (2/3) = 2/9, and err / (n k) = (2/3) / 3
    even, uneven = (preds.predicted_sd(one_image(v)) for v in ([4000] * 3, [6000, 4000, 2000]))
    assert even.k_class**2 == pytest.approx(2 / 9)
    assert even.label_free**2 == pytest.approx(2 / 9, rel=1e-3)
    # q = 1/2, 1/3, 1/6: 1/8 + 2/27 + 5/216 = 2/9 above (1 - 14/36) / 3 = 11/54
    assert uneven.label_free**2 == pytest.approx(2 / 9, rel=1e-3)
    assert uneven.label_free**2 > 11 / 54


def test_disagreement_goldens():
    # agreeing ordered pairs 2 + 6 + 6 + 2 of 4 x 6; errors 3 of 12; gaps at q = 1/3: -1/3 + 2/3,
    # at q = 2/3: 1/3 - 2/3, at q = 0 and 1: 0, so (1/3 + 1/3) / 4
    got = preds.disagreement(count(PREDICTIONS, LABELS))
    np.testing.assert_allclose(got, (1 / 3, 1 / 4, 1 / 6))
    # q = .95 and 1 share the last of ten bins: gaps +.05 - 1 there and -.05 + 1 in the first
    runs = np.zeros(20, int)
    shared = preds.PredictionCounts(
        np.array([0, 1]), np.array([[19, 1], [20, 0]]), NONE, runs, runs
    )
    assert preds.disagreement(shared).calibration_error == pytest.approx((0.95 + 0.95) / 2)


@repeatable
@given(tables)
def test_disagreement_of_all_pairs_and_its_bound(predictions):
    labels = np.arange(predictions.shape[1]) % 3
    runs = len(predictions)
    got = preds.disagreement(count(predictions, labels), bins=runs + 1)  # a bin for every q
    pairs = [(a != b).mean() for i, a in enumerate(predictions) for b in predictions[:i]]
    assert got.disagreement == pytest.approx(np.mean(pairs))
    assert got.error == pytest.approx((predictions != labels).mean())
    # Jiang's bound is on pairs drawn with replacement
    gap = abs(got.disagreement * (runs - 1) / runs - got.error)
    assert gap <= got.calibration_error + 1e-12


def test_ensemble_correct():
    assert preds.ensemble_correct(count(PREDICTIONS, LABELS)) == 3  # image 3 is outvoted 2 to 1
    tie = np.array([[1, 2], [0, 1]], np.uint8)  # votes go to 0 and to 1
    assert preds.ensemble_correct(count(tie, np.array([0, 2]))) == 1


def test_paired_improvement_goldens():
    # two wins and a tie: Beta(3, 1) has distribution function x^3
    got = stats.paired_improvement([2, 2, 1], [1, 1, 0])
    assert got.estimate == got.high == 1
    got = stats.paired_improvement([3, 2, 1, 1], [1, 2, 1, 0])
    ends = scipy.stats.beta.ppf([0.025, 0.975], 3.5, 1.5)
    np.testing.assert_allclose(got, (0.75, *ends))
    assert stats.paired_improvement([2] * 9, [1] * 9).high == 1
    # 600 of 1,000: SD sqrt(.24 / 1000) = .0155, so .6 +/- .030: seen, but small
    many = stats.paired_improvement(np.arange(1000) < 600, np.full(1000, 0.5))
    np.testing.assert_allclose(many, (0.6, 0.5696, 0.6304), atol=0.002)


@pytest.mark.parametrize("decimals", [6, 0])  # without ties and with many
def test_brunner_munzel_is_scipys(decimals):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=15).round(decimals), rng.normal(0.4, 2, size=11).round(decimals)
    got, test = stats.brunner_munzel(a, b), scipy.stats.brunnermunzel(b, a)
    assert got.estimate == pytest.approx(scipy.stats.mannwhitneyu(a, b).statistic / (15 * 11))
    # from the statistic its standard error, from the p value the degrees of freedom
    error = (got.estimate - 0.5) / test.statistic
    df = scipy.optimize.brentq(
        lambda df: 2 * scipy.stats.t.sf(abs(test.statistic), df) - test.pvalue, 2, 40
    )
    assert df > 10  # then it is that of the smaller side's runs
    half = scipy.stats.t.ppf(0.975, 10) * abs(error) / (got.estimate * (1 - got.estimate))
    ends = scipy.special.logit(got)
    assert ends[2] - ends[0] == pytest.approx(half) == ends[0] - ends[1]


def test_brunner_munzel_has_a_mirror_image_at_the_limit():
    """Where exactly FEW_PAIRS of 30 are out of order: P is 5/6, in runs of 130 images."""
    a, b = np.repeat([10, 30], [15, 15]), np.repeat([0, 20], [20, 10])
    got, mirrored = stats.brunner_munzel(a / 130, b / 130), stats.brunner_munzel(b / 130, a / 130)
    assert got.estimate == pytest.approx(1 - 5 / 30)
    assert mirrored == pytest.approx((1 - got.estimate, 1 - got.high, 1 - got.low))
    assert got.low != pytest.approx(stats.jeffreys(25, 30).low)


def test_brunner_munzel_where_the_error_is_unknown():
    assert stats.brunner_munzel([3, 4, 5], [1, 2]) == stats.jeffreys(2, 2)
    assert stats.brunner_munzel([1, 1], [1, 1, 1]) == stats.jeffreys(1, 2)
    assert stats.brunner_munzel([1, 1, 1], [1] * 88 + [2] * 12) == stats.jeffreys(1.32, 3)
    assert stats.brunner_munzel(range(10), [-1] * 99 + [4.5]) == stats.jeffreys(9.95, 10)


@pytest.mark.parametrize("shift", [0, 1.2])
@pytest.mark.parametrize("runs", [(2, 20), (3, 100), (5, 5), (25, 40), (100, 10)])
@pytest.mark.parametrize("decimals", [6, 0])
def test_brunner_munzel_covers(runs, shift, decimals):
    rng, (n, m) = np.random.default_rng([2, *runs]), runs

    def draw(size):
        return rng.normal(shift, 1, size).round(decimals), rng.normal(0, 3, size).round(decimals)

    a, b = draw(200_000)
    truth = (a > b).mean() + (a == b).mean() / 2
    got = [stats.brunner_munzel(draw(n)[0], draw(m)[1]) for _ in range(1000)]
    covered = np.mean([each.low <= truth <= each.high for each in got])
    assert covered > 0.93 - 2 * math.sqrt(0.93 * 0.07 / 1000)
    assert min(runs) < 25 or covered < 0.98


def test_seeds_needed():
    # (1.959964 x .06 / .01)^2 = 138.3; 1 + 3.841459 / (2 x .05^2) = 769.3
    assert stats.seeds_for_mean(0.06, 0.01) == 139
    assert stats.seeds_for_sd(0.05) == 770
    assert stats.seeds_for_sd(0.05, excess=3) == 1922  # 1 + 768.3 x 2.5
    assert (stats.seeds_for_mean(0.06, 10), stats.seeds_for_sd(10)) == (2, 2)
    # what they promise: the t and chi-square intervals then found are as wide as asked
    assert scipy.stats.t.ppf(0.975, 138) * 0.06 / math.sqrt(139) == pytest.approx(0.01, rel=0.01)
    x = scipy.stats.norm.ppf((np.arange(770) + 0.5) / 770)
    got = stats.sd_interval(x)
    assert (got.high - got.low) / (2 * got.estimate) == pytest.approx(0.05, rel=0.01)


def test_share_below_goldens():
    got = stats.share_below(2, [1, 2, 3, 4])
    # one below and one tied: 1.5 / 4; Beta(2, 3) has distribution function 6x^2 - 8x^3 + 3x^4
    assert got.estimate == 0.375
    ends = np.array(got[1:])
    np.testing.assert_allclose(6 * ends**2 - 8 * ends**3 + 3 * ends**4, [0.025, 0.975])
    below, above = stats.share_below(0, [1, 2, 3, 4]), stats.share_below(5, [1, 2, 3, 4])
    assert below[:2] == (0, 0)
    assert above.estimate == above.high == 1
    assert above.low == pytest.approx(1 - below.high)
    assert stats.share_below(0.9726, np.array([9725, 9726]) / 10000).estimate == 0.75


def test_share_below_covers():
    # exactly, by summing over all outcomes of 40 runs; Jeffreys is near 95 % on average over p
    runs = np.arange(40)
    intervals = np.array([stats.share_below(k - 0.5, runs)[1:] for k in range(41)])
    p = np.linspace(0.02, 0.98, 97)[:, None]
    inside = (intervals[:, 0] <= p) & (p <= intervals[:, 1])
    covered = (scipy.stats.binom.pmf(np.arange(41), 40, p) * inside).sum(axis=1)
    assert covered.mean() == pytest.approx(0.95, abs=0.01)
    assert covered.min() > 0.88


def test_variance_ratio():
    # variances 2 and 1/2; F with 1 and 1 df has quantile tan^2(pi p / 2), and 1/F its mirror
    f = math.tan(math.pi * 0.975 / 2) ** 2
    np.testing.assert_allclose(stats.variance_ratio([0, 2], [0, 1]), (4, 4 / f, 4 * f))
    # variances 1 and 5; F with 2 and 4 df has quantile 2 ((1 - p)^(-1/2) - 1)
    f = 2 * (np.array([0.025, 0.975]) ** -0.5 - 1)
    np.testing.assert_allclose(stats.variance_ratio([0, 1, 2], [0, 0, 0, 0, 5])[1:], 0.2 / f)
    rng, covered = np.random.default_rng(11), 0
    for _ in range(1000):
        got = stats.variance_ratio(rng.normal(0, 3, 12), rng.normal(0, 2, 7))
        covered += got.low <= 9 / 4 <= got.high
    assert abs(covered / 1000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 1000)


@repeatable
@given(hnp.arrays(float, st.integers(2, 30), elements=st.integers(9600, 9800).map(float)))
def test_intervals_hold_their_estimates(x):
    for got in (stats.mean_interval(x), stats.sd_interval(x), stats.share_below(9700, x)):
        assert got.low <= got.estimate <= got.high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: count(PREDICTIONS, LABELS[:3]), "broadcast"),
        (lambda: stats.paired_improvement([1, 2], [1, 2, 3]), "broadcast"),
    ],
)
def test_what_cannot_be_estimated_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_too_few_runs_give_no_number():
    one, two = count(PREDICTIONS[:1]), count(PREDICTIONS[:2])
    unknown = [*stats.mean_interval([1])[1:], *stats.sd_interval([1]), *preds.variance_parts(one)]
    unknown += [preds.disagreement(one).disagreement, preds.predicted_sd(two).label_free]
    assert np.isnan(unknown).all()
