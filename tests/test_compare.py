"""Comparisons against scipy and statsmodels, and how often they are wrong in simulation."""

import itertools
import json
import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from counting import count_predictions
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_ind, ttost_paired

from mlp_jax.analysis import compare as comparing
from mlp_jax.analysis import figures, predictions
from mlp_jax.analysis.compare import compare, confidence_sequence, decide, verdict_sentence
from mlp_jax.analysis.stats import Interval
from mlp_jax.analysis.summary import to_json
from mlp_jax.compare import format_decision

ROOT = Path(__file__).parents[1]


def scores(rng, n, mean=0.97, sd=0.001, first=0):
    return dict(enumerate(rng.normal(mean, sd, n).tolist(), first))


def values(*sides):
    return [np.array(list(side.values())) for side in sides]


def test_shared_seeds_are_compared_in_pairs():
    rng = np.random.default_rng(0)
    a = scores(rng, 24)
    b = {seed: a[seed] / 2 + 0.485 + rng.normal(-0.0005, 0.0005) for seed in reversed(a)}
    got = compare(a, b | {99: 0.1}, margin=0.001)  # a seed that A lacks is left out
    x, y = np.array([(a[seed], b[seed]) for seed in a]).T
    test = scipy.stats.ttest_rel(x, y)
    assert (got.pairs, got.runs_a, got.runs_b) == (24, 24, 24)
    np.testing.assert_allclose(got.difference[1:], test.confidence_interval())
    assert got.difference.estimate == pytest.approx(np.mean(x - y))
    assert got.p_value == pytest.approx(test.pvalue)
    assert got.tost_p == pytest.approx(ttost_paired(x, y, -0.001, 0.001)[0])
    assert got.correlation == pytest.approx(scipy.stats.pearsonr(x, y).statistic)
    ratio = np.var(x - y) / (np.var(x) + np.var(y))
    assert got.variance_ratio == pytest.approx(ratio)
    assert got.probability.estimate == pytest.approx(np.mean(x > y))
    assert math.isnan(got.over_test_sets.low)


def test_runs_that_are_all_equal_have_no_correlation():
    rng = np.random.default_rng(2)
    stuck = dict.fromkeys(range(7), 0.1135)
    assert np.std([*stuck.values()]) > 0  # by rounding
    assert math.isnan(compare(stuck, scores(rng, 7), margin=0.001).correlation)


def test_other_seeds_are_compared_as_independent():
    rng = np.random.default_rng(1)
    a, b = scores(rng, 20), scores(rng, 35, 0.9695, 0.002, first=17)  # 3 seeds in common
    got = compare(a, b, margin=0.001, sd_over_test_sets=0.001)
    x, y = values(a, b)
    test = scipy.stats.ttest_ind(x, y, equal_var=False)
    assert (got.pairs, got.runs_a, got.runs_b) == (0, 20, 35)
    np.testing.assert_allclose(got.difference[1:], test.confidence_interval())
    assert got.p_value == pytest.approx(test.pvalue)
    assert got.tost_p == pytest.approx(ttost_ind(x, y, -0.001, 0.001, usevar="unequal")[0])
    assert got.probability.estimate == pytest.approx(np.mean(x[:, None] > y))
    assert math.isnan(got.correlation)
    half = got.difference.high - got.difference.estimate
    wider = got.over_test_sets.high - got.over_test_sets.estimate
    assert wider == pytest.approx(math.hypot(half, 1.959964 * 0.001), rel=1e-6)


def test_welchs_interval_of_two_runs_is_too_narrow():
    rng = np.random.default_rng(0)
    missed = []
    for n in (2, 10, 100):
        sides = rng.normal(size=(20_000, 2)), rng.normal(size=(20_000, n))
        test = scipy.stats.ttest_ind(*sides, axis=1, equal_var=False)
        missed.append(np.mean(test.pvalue < 0.05))
    assert missed[0] < 0.05 < 0.09 < missed[1] < missed[2] < 0.125


def test_the_interval_is_near_scipys_bootstrap():
    x, y = np.random.default_rng(2).normal(size=(2, 60))
    got = compare(dict(enumerate(x)), dict(enumerate(y)), margin=1)
    want = scipy.stats.bootstrap(
        (x - y,), np.mean, n_resamples=20_000, rng=np.random.default_rng(3)
    ).confidence_interval
    np.testing.assert_allclose(got.difference[1:], want, atol=0.05 * (want.high - want.low))


def shifted(shift, sd=0.0003, n=40):
    """Runs of B, and A that is higher by `shift`, but for noise of that SD."""
    noise = scipy.stats.norm.ppf((np.arange(n) + 0.5) / n) * sd
    b = np.random.default_rng(4).normal(0.97, 0.001, n)
    return dict(enumerate(b + shift + noise)), dict(enumerate(b))


@pytest.mark.parametrize(
    ("shift", "sd", "verdict", "words"),
    [
        (0.001, 0.0003, "better", "A scores higher than B:"),
        (-0.001, 0.0003, "worse", "A scores lower than B:"),
        (0.0002, 0.0003, "better", "A scores higher than B, but by less than 0.05 points:"),
        (0, 0.0003, "equivalent", "A and B are equivalent within 0.05 points:"),
        (0, 0.003, "undecided", "it is undecided whether A or B scores higher:"),
    ],
)
def test_the_verdict_in_one_sentence(shift, sd, verdict, words):
    got = compare(*shifted(shift, sd), margin=0.0005, sd_over_test_sets=0.0004)
    assert got.verdict == verdict
    said = verdict_sentence(got, "A", "B")
    assert said.startswith(f"On this test set {words} the difference is")
    low, high = (f"{100 * end:+.3f}" for end in got.over_test_sets[1:])
    assert f"over all images like these, {100 * shift:+.3f} points ({low} to {high})." in (
        said.replace("-0.000 points", "+0.000 points")
    )
    assert "40 shared seeds" in said
    json.dumps(to_json(got), allow_nan=False)


def test_equal_runs_are_equivalent():
    same = dict.fromkeys(range(30), 0.97)
    got = compare(same, same, margin=0.0001)
    assert (got.verdict, got.p_value, got.difference) == ("equivalent", 1, (0, 0, 0))
    assert compare(same, same, margin=0).verdict == "undecided"
    other = dict.fromkeys(range(50, 80), 0.96)
    assert (
        compare(same, other, margin=0.0001).verdict,
        compare(same, other, margin=0).p_value,
    ) == ("better", 0)
    assert decide(np.zeros(40), margin=0.0001).verdict == "equivalent"
    # of 2 test images, 30 pairs that happen to be equal say little
    assert decide(np.zeros(40), margin=0.01, resolution=1 / 2).verdict == "undecided"
    assert decide(np.zeros(40), margin=0.0001, resolution=1e-4).verdict == "equivalent"
    # two runs that happen to be equal say little: a count is rounded by an SD of 0.29 images
    two, higher = {0: 0.97, 1: 0.96}, {0: 0.9701, 1: 0.9601}
    got = compare(higher, two, margin=0.0001, resolution=1e-4)
    half = scipy.stats.t.ppf(0.975, 1) * 1e-4 / math.sqrt(12)
    assert got.verdict == "undecided"
    assert got.difference == pytest.approx((1e-4, 1e-4 - half, 1e-4 + half))
    apart = compare({0: 0.9701, 1: 0.9701}, {2: 0.97, 3: 0.97}, margin=0.0001, resolution=1e-4)
    assert apart.verdict == "undecided"
    # by Welch with 4 degrees of freedom, at any accuracy: not those of the last bits of fractions
    half = scipy.stats.t.ppf(0.975, 4) / math.sqrt(12) * math.sqrt(2 / 3)
    for n, right in ((130, 101), (130, 104), (10_000, 9_726), (10_000, 9_731)):
        a, b = ({seed + j: (right - j) / n for seed in (0, 10, 20)} for j in (0, 1))
        got = compare(a, b, margin=0.0001, resolution=1 / n).difference
        assert got == pytest.approx((1 / n, (1 - half) / n, (1 + half) / n))
    with pytest.raises(ValueError, match="needs two runs"):
        compare(same, {0: 1.0}, margin=0)


def test_sd_over_test_sets_of_runs_that_share_seeds():
    """What a seed moves in both A and B is no noise of p_A - p_B."""
    rng = np.random.default_rng(6)
    n, draws, labels = 405, 300, np.zeros(405, int)
    found, ignored, variances = [], [], []
    for _ in range(draws):
        p = rng.beta(0.3, 2, (n, 1)) * np.ones(2)
        p[:, 1] *= rng.uniform(0.4, 1.6, n)
        luck = rng.random((25, n))
        wrong = [(luck[:20] < p[:, 0]).astype(np.uint8), (luck[5:] < p[:, 1]).astype(np.uint8)]
        a, b = (count_predictions([side], labels, n_classes=2) for side in wrong)
        right = np.packbits(wrong[0][5:] == 0, axis=1), np.packbits(wrong[1][:15] == 0, axis=1)
        covariance = predictions.error_covariance(zip(*right, strict=True), n)
        images = zip(wrong[0][5:].T, wrong[1][:15].T, strict=True)
        each = [np.cov(*image)[0, 1] for image in images]
        assert covariance == pytest.approx(np.mean(each))
        sd = predictions.sd_over_test_sets(a, b, pairs=15, covariance=covariance)
        found.append(sd**2 * n)
        ignored.append(predictions.sd_over_test_sets(a, b) ** 2 * n)
        variances.append(p.clip(max=1) @ [1, -1])
    want = np.var(variances, axis=1, ddof=1).mean()
    assert np.mean(found) == pytest.approx(want, rel=0.05)
    assert np.mean(ignored) < 0.7 * want
    assert predictions.error_covariance([], n) == 0


def test_sd_over_test_sets_is_that_of_simulated_test_sets():
    rng = np.random.default_rng(5)
    n, runs, draws = 400, 10, 400
    found, means = [], []
    for _ in range(draws):
        ease = rng.beta(3, 0.5, n)
        p = np.stack([ease, np.clip(ease + rng.normal(0.02, 0.1, n), 0, 1)])
        wrong = (rng.random((2, runs, n)) >= p[:, None]).astype(np.uint8)
        labels = np.zeros(n, int)
        a, b = (count_predictions([side], labels, n_classes=2) for side in wrong)
        found.append([predictions.sd_over_test_sets(a), predictions.sd_over_test_sets(a, b)])
        means.append([p[0].mean(), p[0].mean() - p[1].mean()])
    want = np.std(means, axis=0, ddof=1)  # known to sqrt(1 / 800), 3.5 %
    np.testing.assert_allclose(np.mean(found, axis=0), want, rtol=0.14)
    one = count_predictions([wrong[0, :1]], labels, n_classes=2)
    assert math.isnan(predictions.sd_over_test_sets(one))
    perfect = count_predictions([np.zeros((runs, n), np.uint8)], labels, n_classes=2)
    assert math.isnan(predictions.sd_over_test_sets(perfect))
    assert math.isnan(predictions.sd_over_test_sets(perfect, perfect))


def test_sampling_of_images_at_few_errors():
    """The interval from FEW_ERRORS on, over images that are hard or not."""
    rng, n, missed = np.random.default_rng(6), 1000, 0
    for _ in range(400):
        hard = rng.random(n) < 2 * 15 / n  # missed by half of the runs
        wrong = (rng.random((10, n)) < np.where(hard, rng.random(n), 0)).astype(np.uint8)
        sd = predictions.sd_over_test_sets(count_predictions([wrong], hard * 0, n_classes=2))
        few = wrong.sum() / 10 < predictions.FEW_ERRORS
        assert math.isnan(sd) == few
        missed += not few and abs(wrong.mean() - 15 / n) > 1.96 * sd
    assert missed / 400 < 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)


def test_holm_is_statsmodels():
    p = np.random.default_rng(6).random(12) ** 3
    np.testing.assert_allclose(comparing.holm(p), multipletests(p, method="holm")[1])
    assert comparing.holm([]).size == 0


def test_sign_test_golden():
    # 5 wins, 1 loss and a tie: 2 (1 + 6) / 64
    assert comparing.sign_test([1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1]) == pytest.approx(
        14 / 64
    )
    assert comparing.sign_test([1, 2], [1, 2]) == 1


def test_the_confidence_sequence_is_its_formula():
    d = np.random.default_rng(7).normal(0.001, 0.002, 120) + 5
    low, high = confidence_sequence(d)
    assert np.isinf(low[:29]).all()
    assert np.isfinite(low[29:]).all()

    def half(t, rho2):
        return math.sqrt(
            2 * (t * rho2 + 1) / (t**2 * rho2) * math.log(math.sqrt(t * rho2 + 1) / 0.05)
        )

    best = scipy.optimize.minimize_scalar(lambda r: half(50, r), (0.01, 0.1, 1)).x
    for t in (30, 77, 120):
        mean, sd = d[:t].mean(), d[:t].std(ddof=1)
        ends = mean - sd * half(t, best), mean + sd * half(t, best)
        np.testing.assert_allclose((low[t - 1], high[t - 1]), ends, rtol=1e-7)


def test_a_decision_is_the_first_and_stays():
    rng = np.random.default_rng(8)
    d = rng.normal(0.001, 0.001, 400)
    got = decide(d, margin=0)
    assert (got.verdict, decide(d[: got.pairs], margin=0)) == ("better", got)
    before = decide(d[: got.pairs - 1], margin=0)
    assert (before.verdict, before.pairs) == ("undecided", got.pairs - 1)
    assert decide(-d, margin=0).verdict == "worse"
    assert decide(d - 0.001, margin=0.0005).verdict == "equivalent"
    few = decide(d[:5], margin=1)
    assert few.verdict == "undecided"
    line = format_decision(few, 5, "a", "b")
    assert re.fullmatch(r"5 pairs: .* \(too few for an interval\) points: undecided", line)
    line = format_decision(got, got.pairs + 1, "a", "b")
    assert line.startswith(f"{got.pairs} of {got.pairs + 1} pairs: +")
    assert line.endswith(") points: a is better")
    json.dumps(to_json(few), allow_nan=False)


DRAWS = {
    "normal": lambda rng, size: rng.normal(size=size),
    "heavy tails": lambda rng, size: rng.standard_t(5, size=size) / math.sqrt(5 / 3),
    "equally skewed": lambda rng, size: (
        (rng.exponential(size=size) - rng.exponential(size=size)) / math.sqrt(2)
    ),
    "skewed": lambda rng, size: (rng.gamma(4, size=size) - 4) / 2,
}


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("truth", [0, 0.25])
def test_wrong_at_most_5_percent_of_the_time_in_1000_looks(kind, truth):
    """At no difference, and at exactly the margin, which no verdict may call equivalent."""
    rng, n, wrong = np.random.default_rng(9), 1500, 0
    claims = {0: ("better", "worse"), 0.25: ("worse", "equivalent")}[truth]
    for d in DRAWS[kind](rng, (n, 1000)):
        # a look that comes after the decision changes nothing, so that all looks are in it
        wrong += decide(d + truth, margin=0.25 if truth else 1e-9).verdict in claims
    assert wrong / n < 0.05 + 2 * math.sqrt(0.05 * 0.95 / n)


def test_peeking_with_student_is_wrong_often():
    rng, t = np.random.default_rng(10), np.arange(1, 1001)
    d = rng.normal(size=(300, 1000))
    mean = d.cumsum(axis=1) / t
    sd = np.sqrt(((d**2).cumsum(axis=1) - t * mean**2) / np.maximum(t - 1, 1))
    far = np.abs(mean) > sd * scipy.stats.t.ppf(0.975, np.maximum(t - 1, 1)) / np.sqrt(t)
    assert far[:, 19:].any(axis=1).mean() > 0.3


def test_sign_e_values_are_a_martingale():
    # over all outcomes of 8 pairs, ties included, the mean is 1 at every length
    outcomes = np.array(list(itertools.product([1, 0, -1], repeat=8)))
    values = np.array([comparing.sign_e_values(each) for each in outcomes])
    chance = np.where(outcomes, 0.4, 0.2).prod(axis=1)
    np.testing.assert_allclose(chance @ values, 1)
    # 2^3 B(4, 1) = 8 / 4; of 2,000 wins: too large for a float, and still one
    assert comparing.sign_e_values([1, 1, 1])[-1] == pytest.approx(2)
    assert np.isfinite(comparing.sign_e_values(np.ones(2000))).all()
    rng = np.random.default_rng(11)
    ever = [(comparing.sign_e_values(rng.normal(size=1000)) >= 20).any() for _ in range(1000)]
    assert np.mean(ever) < 0.05


def test_the_figure_counts_runs_in_whole_images():
    a, b = ({seed: (9700 + seed) / 10_000 for seed in range(first, 31)} for first in (0, 10))
    left, _ = figures.draw_comparison(
        *values(a, b), compare(a, b, margin=0), ("new", "old"), 10_000
    ).axes
    heights = [[bar.get_height() for bar in bars] for bars in left.containers]
    assert heights[0] == [1] * 31
    assert heights[1] == [0] * 10 + [1] * 21


def test_the_figure_shows_the_interval_and_the_margin():
    a, b = shifted(0.001)
    got = compare(a, b, margin=0.0005, sd_over_test_sets=0.0004)
    left, right = figures.draw_comparison(*values(a, b), got, ("new", "old"), 10_000).axes
    (bars,) = right.containers
    seeds, images = bars.lines[0].get_xdata()
    assert seeds == images == pytest.approx(100 * got.difference.estimate)
    assert list(bars.lines[1][0].get_xdata()) == pytest.approx(
        [100 * got.difference.low, 100 * got.over_test_sets.low]
    )
    (box,) = right.patches
    assert box.get_x() == pytest.approx(-0.05)
    assert "A against B: better, 40 shared seeds" in left.figure.get_suptitle()
    assert left.get_legend_handles_labels()[1] == ["A: new", "B: old"]
    unknown = got._replace(over_test_sets=Interval(0.001, math.nan, math.nan))
    figures.draw_comparison(*values(a, b), unknown, ("new", "old"), 10_000)


def test_the_table_of_pairs_to_decide_follows_from_the_rows():
    record = json.loads((ROOT / "results" / "decide.json").read_text())
    script = runpy.run_path(str(ROOT / "scripts" / "decide_table.py"))
    kinds = [(row["recipe"], row["margin"], row["true_difference"]) for row in record["rows"]]
    asked = itertools.product(script["RECIPES"], script["SIZES"])
    assert kinds == [(*each, truth) for each in asked for truth in (each[1], 0)]
    assert all(row["wrong"] < 0.07 * row["simulations"] for row in record["rows"])
    budget = script["Args"](ROOT).budget
    for row, kind in zip(record["rows"], kinds, strict=True):
        if row["recipe"] == "keras-sgd" and row["margin"] == 0.05:
            assert script["simulate"](*kind, row["simulations"], budget) == pytest.approx(row)
        else:  # a part: their median is near that of all
            part = script["simulate"](*kind, 20, budget)
            assert 0.5 < part["median_pairs"] / row["median_pairs"] < 2
