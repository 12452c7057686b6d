"""The crossed design against arithmetic done by hand, statsmodels, and known components.

Every Monte Carlo draw is seeded; its tolerance is four or more of its own standard errors.
"""

import itertools
import json
import math

import numpy as np
import pandas
import pytest
from counting import squared_contrasts, sum_blocks
from statsmodels.formula.api import mixedlm, ols
from statsmodels.stats.anova import anova_lm

from mlp_jax.analysis import crossed, figures
from mlp_jax.analysis.stats import FEW_RUNS
from mlp_jax.analysis.summary import to_json

STREAMS = ("init", "order", "dropout", "augment", "data")
VARIANCES = {
    "init": 0.1,
    "order": 0.4,
    "dropout": 0.0,
    "init x order": 0.2,
    "init x dropout": 0.05,
    "order x dropout": 0.1,
    "init x order x dropout": 0.3,
}


def draw(rng, blocks, variances, k=3, skewed=False):
    """Scores [blocks, 2, ...] of k streams, with the components asked for."""
    scores = np.zeros((blocks, *(2,) * k))
    for name, variance in variances.items():
        own = [stream in name.split(" x ") for stream in STREAMS[:k]]
        shape = (blocks, *(2 if here else 1 for here in own))
        effect = 1 - rng.exponential(size=shape) if skewed else rng.normal(size=shape)
        scores = scores + math.sqrt(variance) * effect
    return scores


def indices(scores, **options):
    squares = squared_contrasts(scores)
    return crossed.sobol_indices(squares, STREAMS[: scores.ndim - 1], **options)


def test_components_golden():
    # y = 1 2 / 4 9: contrasts 1 + 2 - 4 - 9 = -10, 1 - 2 + 4 - 9 = -6, 1 - 2 - 4 + 9 = 4, over 2;
    # V_IO = 4, V_I = (25 - 4) / 2, V_O = (9 - 4) / 2
    got = indices(np.array([[[1, 2], [4, 9]]]))
    estimates = {name: each.estimate for name, each in got.components.items()}
    assert estimates == {"init": 10.5, "order": 2.5, "init x order": 4}
    assert got.variance.estimate == 17
    assert got.indices["order"].estimate == 2.5 / 17
    assert [each.estimate for each in got.total.values()] == [14.5 / 17, 6.5 / 17]
    assert got.interactions.estimate == 4 / 17
    assert math.isnan(got.variance.low)  # of one block


def test_three_streams_are_the_published_formulas():
    scores = np.random.default_rng(0).normal(size=(40, 2, 2, 2))
    signs = np.array([1, -1])
    mean_squares = {}
    for u in itertools.product([0, 1], repeat=3):
        i, o, d = (signs if here else np.ones(2) for here in u)
        contrast = np.einsum("biod,i,o,d->b", scores, i, o, d) / 2**1.5
        mean_squares["".join(itertools.compress("IOD", u))] = np.mean(contrast**2)
    ms, got = mean_squares, indices(scores)
    components = {name: each.estimate for name, each in got.components.items()}
    assert components["init x order x dropout"] == pytest.approx(ms["IOD"])
    assert components["init x order"] == pytest.approx((ms["IO"] - ms["IOD"]) / 2)
    main = (ms["I"] - ms["IO"] - ms["ID"] + ms["IOD"]) / 4
    assert components["init"] == pytest.approx(main)
    assert got.variance.estimate == pytest.approx(sum(components.values()))
    # Jansen: half the mean squared difference over all edges of the stream
    jansen = np.mean((scores[:, 0] - scores[:, 1]) ** 2) / 2
    assert got.total["init"].estimate * got.variance.estimate == pytest.approx(jansen)


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_components_are_unbiased(k):
    names = [
        " x ".join(u) for size in range(1, k + 1) for u in itertools.combinations(STREAMS[:k], size)
    ]
    sizes = (1 + np.random.default_rng(k).permutation(len(names))) / 10
    truth = dict(zip(names, sizes, strict=True))
    scores = draw(np.random.default_rng(1), 20_000, truth, k)
    of_blocks = crossed.variance_components(squared_contrasts(scores))
    for name, want in truth.items():
        drawn = of_blocks[:, *(int(stream in name.split(" x ")) for stream in STREAMS[:k])]
        assert abs(drawn.mean() - want) < 4.5 * drawn.std() / math.sqrt(len(drawn))
    got = indices(scores, n_resamples=20)
    assert list(got.components) == names
    total = sum(v for name, v in truth.items() if "init" in name) / sum(truth.values())
    assert got.total["init"].estimate == pytest.approx(total, abs=0.02)


@pytest.mark.parametrize(("blocks", "skewed"), [(32, False), (100, False), (100, True)])
def test_intervals_cover(blocks, skewed):
    rng, hits, n = np.random.default_rng(blocks + skewed), [], 300
    whole = sum(VARIANCES.values())
    first = {name: v / whole for name, v in VARIANCES.items()}
    total = {s: sum(v for name, v in first.items() if s in name) for s in STREAMS[:3]}
    for _ in range(n):
        got = indices(draw(rng, blocks, VARIANCES, skewed=skewed), n_resamples=500, rng=rng)
        both = [(got.indices[name], first[name]) for name in first]
        both += [(got.total[name], total[name]) for name in total]
        hits.append([each.low <= want <= each.high for each, want in both])
    covered = np.mean(hits, axis=0)
    # a percentile bootstrap covers .91 to .96; 4 standard errors are .06
    assert covered.min() > 0.85
    assert 0.90 < covered.mean() < 0.97


def test_equal_runs_give_zeros_without_an_interval():
    scores = np.full((FEW_RUNS, 2, 2, 2), 0.1) * np.arange(1, FEW_RUNS + 1)[:, None, None, None]
    got = indices(scores)
    for interval in (got.variance, *got.components.values()):
        assert interval.estimate == 0
        assert np.isnan(interval[1:]).all()
    nothing = dict.fromkeys(("estimate", "low", "high"))
    assert to_json(got)["total"]["init"] == to_json(got)["interactions"] == nothing


def test_a_variance_of_exactly_0_has_no_shares():
    """Rounding would give it either sign, and shares of 1e15."""
    rng, found = np.random.default_rng(8), []
    for _ in range(200):
        right = rng.random((2, 8, 12)) < 0.5
        sums = crossed.BlockSums(
            *map(np.stack, zip(*map(crossed.sum_block, right), strict=True)), 12
        )
        # in multiples of 1/8, which floats hold
        whole = crossed.variance_components((sums.contrasts**2 - sums.squares).astype(float))
        got = crossed.crossed_indices(sums, STREAMS[:3], n_resamples=2).distribution
        is_zero = whole.sum() == whole[:, 0, 0, 0].sum()
        assert (got.variance.estimate == 0) == is_zero
        if is_zero:
            assert math.isnan(got.total["init"].estimate)
            found.append(got)
    assert found


def test_two_streams_are_statsmodels_anova_and_mixed_model():
    truth = {"init": 0.5, "order": 0.3, "init x order": 0.2}
    scores = draw(np.random.default_rng(2), 40, truth, 2)
    block, init, order = np.indices(scores.shape).reshape(3, -1)
    table = pandas.DataFrame({"y": scores.ravel(), "b": block, "i": init, "o": order})
    fitted = ols("y ~ C(b) + C(b):C(i) + C(b):C(o)", table).fit()
    rows = anova_lm(fitted)
    square = rows["sum_sq"] / rows["df"]
    both = square["Residual"]
    got = {name: each.estimate for name, each in indices(scores).components.items()}
    assert got["init x order"] == pytest.approx(both)
    assert got["init"] == pytest.approx((square["C(b):C(i)"] - both) / 2)
    assert got["order"] == pytest.approx((square["C(b):C(o)"] - both) / 2)
    # REML of balanced data is the same
    parts = {"init": "0 + C(i)", "order": "0 + C(o)"}
    model = mixedlm("y ~ 0 + C(b)", table, groups="b", vc_formula=parts, re_formula="0").fit()
    found = dict(zip(model.model.exog_vc.names, model.vcomp, strict=True)) | {
        "init x order": model.scale
    }
    assert found == pytest.approx(got, rel=1e-3)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_distribution_wise_squares_are_a_double_loop_over_images(k):
    rng, n = np.random.default_rng(k), 7
    blocks = rng.random((3, 2**k, n)) < 0.6
    sums = sum_blocks(iter(blocks))
    test, distribution = crossed.squared_contrasts(sums)
    for block, of_test, of_distribution in zip(blocks, test, distribution, strict=True):
        for u in itertools.product([0, 1], repeat=k):
            images = np.zeros(n)
            for run, seeds in enumerate(itertools.product([0, 1], repeat=k)):
                images += (-1) ** np.dot(u, seeds) * block[run] / 2 ** (k / 2)
            pairs = [a * b for i, a in enumerate(images) for j, b in enumerate(images) if i != j]
            assert of_distribution[u] == pytest.approx(np.mean(pairs))
            assert of_test[u] == pytest.approx(images.mean() ** 2)
    accuracy = blocks.mean(axis=2).reshape(3, *(2,) * k)
    np.testing.assert_allclose(squared_contrasts(accuracy), test, atol=1e-15)


@pytest.mark.parametrize("shift", [0, 0.05])
def test_distribution_wise_variance_leaves_the_images_out(shift):
    """Errors are independent but for a shift of all images by one stream's seed."""
    rng, n, many = np.random.default_rng(3), 100, 2000
    rate = np.linspace(0.2, 0.8, n)
    moved = shift * rng.choice([-1, 1], size=(many, 1, 2, 1))
    runs = np.broadcast_to(moved, (many, 2, 2, 1)).reshape(many, 4, 1)
    sums = sum_blocks(rng.random((4, n)) < rate + of_block for of_block in runs)
    got = crossed.crossed_indices(sums, ("init", "order"), n_resamples=400)
    order, init = (got.distribution.components[name] for name in ("order", "init"))
    assert order.low < shift**2 < order.high
    assert init.low < 0 < init.high
    independent = np.mean(rate * (1 - rate)) / n
    of_test = got.test.variance
    assert of_test.low < independent + shift**2 < of_test.high
    assert order.high - order.low < 0.05**2 / 4  # sharp enough to tell the two cases apart


def test_blocks_are_counted_one_after_another():
    with pytest.raises(ValueError, match="not crossed in 3 streams"):
        crossed.sobol_indices(np.zeros((4, 2, 2)), STREAMS[:3])
    sums = sum_blocks(np.ones((4, 3), bool) for _ in range(5))
    assert sums.contrasts[:, 0, 0].tolist() == [12] * 5
    assert sums.squares[:, 0, 0].tolist() == [3 * 16] * 5
    assert not sums.contrasts[:, 1:].any()


def test_the_figure_draws_a_row_a_stream():
    rng = np.random.default_rng(4)
    sums = sum_blocks(rng.random((8, 50)) < 0.5 + 0.1 * rng.normal() for _ in range(30))
    found = crossed.crossed_indices(sums, STREAMS[:3], n_resamples=50)
    json.dumps(to_json(found), allow_nan=False)
    left, right = figures.draw_indices(found, "short").axes
    assert [text.get_text() for text in left.get_yticklabels()] == [*STREAMS[:3], "interactions"]
    drawn = [bars.lines[0].get_xdata().tolist() for bars in left.containers]
    first = [100 * found.test.indices[stream].estimate for stream in STREAMS[:3]]
    assert drawn[0] == pytest.approx(first)
    assert "infinite" in right.get_xlabel()
    assert "30 blocks of 8 runs" in left.figure.get_suptitle()
