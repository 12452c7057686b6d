"""Sweeps that answer a question: crossed streams, grids, and whether A scores higher than B."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import mlp_jax as mj
from mlp_jax.analysis import figures
from mlp_jax.analysis.compare import FIRST_LOOK
from mlp_jax.analysis.ranking import rank
from mlp_jax.compare import main as compare_main
from mlp_jax.records.rows import predictions, read_metadata, row_files
from mlp_jax.report import main as report_main
from mlp_jax.sweep import main as sweep_main
from mlp_jax.train import main as train_main
from mlp_jax.training.arrays import make_dataset

TINY = [
    *("--dataset", "kmnist", "--hidden", "16", "8", "--quiet", "--batch-size", "32"),
    *("--epochs", "1", "--learning-rate", "0.1", "--recipe", "short"),
]


@pytest.fixture
def sweep(small_dir, here, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(small_dir))
    return lambda *flags: sweep_main([*TINY, *flags])


def test_a_report_on_crossed_streams_is_the_design_by_hand(sweep, small):
    sweep("--crossed", "12", "--chunk", "7", "--out", "s")
    report_main(["s"])
    summary = json.loads(Path("s/summary.json").read_text())
    assert summary["families"] == []
    (crossed,) = summary["crossed"]
    assert crossed["streams"] == ["init", "order", "dropout"]
    assert (crossed["runs"], crossed["runs_in_broken_blocks"]) == (96, 0)
    table = mj.read_runs("s")
    seeds = zip(*(table[f"{name}_seed"].to_pylist() for name in crossed["streams"]), strict=True)
    scores = dict(zip(seeds, (table["test_correct"].to_numpy() / 130).tolist(), strict=True))
    y = np.array(
        [
            [scores[tuple(np.add(2 * block, bits))] for bits in itertools.product((0, 1), repeat=3)]
            for block in range(12)
        ]
    ).reshape(-1, 2, 2, 2)
    # total index of init: half the mean squared difference along its edges
    total = ((y[:, 1] - y[:, 0]) ** 2).mean() / 2
    variance = crossed["test"]["variance"]["estimate"]
    assert crossed["test"]["total"]["init"]["estimate"] == pytest.approx(total / variance)
    # the variance is that of two runs which share no seed
    apart = ((y - y[:, ::-1, ::-1, ::-1]) ** 2).mean() / 2
    assert variance == pytest.approx(apart)
    assert Path("s/figures/crossed.png").stat().st_size > 10_000


def test_unfinished_blocks_are_left_out(sweep, here, capsys):
    sweep("--crossed", "2", "--chunk", "2", "--out", "s")
    row_files(Path("s"))[0].unlink()
    report_main(["s"])
    (crossed,) = json.loads(Path("s/summary.json").read_text())["crossed"]
    assert (crossed["runs"], crossed["runs_in_broken_blocks"]) == (8, 6)
    assert "6 more are in blocks that are not finished" in capsys.readouterr().out
    next(Path("s/runs").glob("*-seed32-*")).unlink()
    report_main(["s"])
    (crossed,) = json.loads(Path("s/summary.json").read_text())["crossed"]
    assert crossed["runs"] == 0


def test_a_grid_is_ranked_with_intervals_for_all_at_once(sweep, capsys):
    sweep("--seeds", "0:4", "--dropout", "0", "0.9", "--learning-rate", "0.1", "0.02", "--out", "g")
    report_main(["g"])
    summary = json.loads(Path("g/summary.json").read_text())
    cells = summary["cells"]
    assert len(cells) == 4
    means = [cell["mean"]["estimate"] for cell in cells]
    assert means == sorted(means, reverse=True)
    for cell in cells:
        table = mj.read_runs(Path("g", cell["settings"])).to_pylist()
        rate = cell["learning_rate"]
        scores = [row["test_correct"] / 130 for row in table if row["learning_rate"] == rate]
        sd = max(np.std(scores, ddof=1), 1 / 130 / math.sqrt(12))  # at least that of rounding
        half = stats.t.ppf(1 - 0.05 / 8, 3) * sd / math.sqrt(4)
        assert cell["mean"]["estimate"] == pytest.approx(np.mean(scores))
        assert cell["mean"]["high"] == pytest.approx(np.mean(scores) + half)
    assert "dropout=0.0, learning rate 0.1: 4 runs" in capsys.readouterr().out
    assert Path("g/figures/grid.png").stat().st_size > 5_000
    report_main(["g", "--html"])
    assert "<dt>learning_rate</dt><dd>0.02, 0.1</dd>" in Path("g/report.html").read_text()


def test_equal_runs_of_a_grid_have_an_sd_of_0():
    cells = {f"{k}": {("all", 0.1, seed): k / 130 for seed in range(3)} for k in range(131)}
    assert {cell["sd"] for cell in rank(cells, resolution=1 / 130)["cells"]} == {0.0}


def test_a_grid_that_diverged_has_no_figure(sweep, capsys):
    sweep("--seeds", "0:2", "--dropout", "0", "0.9", "--learning-rate", "1e30", "--out", "g")
    report_main(["g"])
    assert "dropout=0.0, learning rate 1e+30: 0 runs, 2 diverged" in capsys.readouterr().out
    assert not list(Path("g/figures").glob("*"))


def test_a_ranking_says_what_the_records_say(sweep, small, tmp_path, monkeypatch, capsys):
    sweep("--seeds", "0:2", "--dropout", "0", "0.9", "--out", "g")
    sweep("--seeds", "0:2", "--dropout", "0.3", "--epochs", "2", "--out", "g/dropout=0.3")
    Path("g/dropout=0.9").rename("g/dropout=0.5")
    Path("g/dropout=0.0/config.json").unlink()
    report_main(["g"])
    names = [f"dropout={p},epochs={n}" for p, n in ((0.0, 1), (0.3, 2), (0.9, 1))]
    found = json.loads(Path("g/summary.json").read_text())
    assert sorted(cell["settings"] for cell in found["cells"]) == names
    # what is not ranked is named
    (rows,) = row_files(Path("g/dropout=0.3"))
    foreign = Path("g/dropout=0.5/runs", rows.name)
    rows.rename(foreign)
    with pytest.raises(
        mj.UserError, match=r"has dropout=0.3, and other rows here have dropout=0.9"
    ):
        mj.report("g")
    foreign.unlink()
    capsys.readouterr()
    report_main(["g"])
    line = f"not ranked (no finished runs with vary=all): {names[1]}\n"
    assert line in capsys.readouterr().out
    shutil.copytree("g/dropout=0.5", "g/copy=1")
    with pytest.raises(mj.UserError, match=r"g/copy=1 and g/dropout=0.5 have the same settings"):
        mj.report("g")
    train_main([*TINY, "--dropout", "0.2", "--out", "t/d=1"])
    sweep("--seeds", "0:2", "--dropout", "0.3", "--out", "t/d=2")
    capsys.readouterr()
    report_main(["t"])
    assert "dropout=0.3, learning rate 0.1: 2 runs" in capsys.readouterr().out
    shutil.copytree("g/dropout=0.5", "h/dropout=0.5")  # alone with its copy
    shutil.move("g/copy=1", "h/copy=1")
    with pytest.raises(mj.UserError, match=r"h/copy=1 and h/dropout=0.5 have the same settings"):
        mj.report("h")
    for rate in ("0.1", "0.2"):
        sweep("--seeds", "0:2", "--learning-rate", rate, "--out", f"r/lr={rate}")
    report_main(["r"])
    found = json.loads(Path("r/summary.json").read_text())
    names = [cell["settings"] for cell in found["cells"]]
    assert sorted(names) == ["learning_rate=0.1", "learning_rate=0.2"]
    other = make_dataset(small.name, small.test, small.test, small.n_classes)
    config = mj.Config(hidden=(16, 8), batch_size=32, epochs=1, dropout=0.7, learning_rate=0.1)
    mj.sweep(config, other, "g/dropout=0.7", seeds=[0])
    with pytest.raises(mj.UserError, match=r"0.7 .* trained on different data named kmnist"):
        mj.report("g")
    with pytest.raises(mj.UserError, match="g has a grid of sweeps"):
        mj.sweep(config, small, "g", seeds=[0])
    shutil.copytree("g/dropout=0.7/runs", "g/runs")
    with pytest.raises(mj.UserError, match="g has runs of its own and a grid"):
        mj.report("g")


def test_crossed_sweeps_of_a_grid_are_not_ranked(sweep):
    sweep("--crossed", "1", "--dropout", "0.1", "0.2", "--out", "g")
    with pytest.raises(mj.UserError, match="g has no runs to rank: report on each"):
        report_main(["g"])


def test_compare_is_the_paired_t_test_and_names_what_differs(sweep, capsys):
    sweep("--seeds", "0:8", "--out", "a")
    sweep("--seeds", "0:9", "--dropout", "0.6", "--out", "b")
    compare_main(["a", "b", "--out", "c"])
    said = capsys.readouterr().out
    assert "over 8 shared seeds" in said
    assert "They differ in dropout (0.2, 0.6); p = " in said
    (found,) = json.loads(Path("c/comparison.json").read_text())["comparisons"]
    a, b = (mj.read_runs(name)["test_correct"].to_numpy()[:8] / 130 for name in ("a", "b"))
    assert found["difference"]["estimate"] == pytest.approx(np.mean(a - b))
    assert found["p_value"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    right = [
        predictions(mj.read_runs(name)["predictions"]) == small_labels() for name in ("a", "b")
    ]
    noise = sum(side.var(axis=0, ddof=1).mean() / len(side) for side in right)
    shared = np.mean([np.cov(*both)[0, 1] for both in zip(right[0].T, right[1][:8].T, strict=True)])
    noise -= 2 * shared * 8 / (8 * 9)
    apart = right[0].mean(axis=0) - right[1].mean(axis=0)
    spread = math.sqrt(max(0, apart.var(ddof=1) - noise) / 130)
    own = stats.sem(a - b) * stats.t.ppf(0.975, 7)
    wide = math.hypot(own, stats.norm.ppf(0.975) * spread)
    assert found["over_test_sets"]["high"] - np.mean(a - b) == pytest.approx(wide)
    assert Path("c/comparison.png").stat().st_size > 5_000
    assert mj.compare("a", "b", margin=5).verdict in ("better", "worse", "equivalent", "undecided")


def small_labels():
    return mj.load_dataset("kmnist").test.labels


def test_families_and_rates_are_compared_and_holm_adjusts(sweep):
    flags = ["--seeds", "0:5", "--vary", "all", "order", "--learning-rate", "0.1", "0.001"]
    sweep(*flags, "--out", "s")
    compare_main(["s@0.1", "s:order@0.1", "s@0.001", "--out", "c"])
    found = json.loads(Path("c/comparison.json").read_text())["comparisons"]
    assert len(found) == 3
    p = np.array([each["p_value"] for each in found])
    adjusted = np.array([each["p_value_holm"] for each in found])
    assert adjusted.min() == pytest.approx(min(1, 3 * p.min()))
    assert found[0]["differences"] == {"family": ["all", "order"]}
    assert found[1]["differences"] == {"learning_rate": [0.1, 0.001]}
    assert {path.name for path in Path("c").glob("*.png")} == {
        f"comparison-{i}.png" for i in (1, 2, 3)
    }


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["s"], "name two or more sweeps"),
        (["s", "nowhere"], "nowhere contains no mlp_jax results"),
        (["s", "s:chaos"], "s:chaos: a family is all or one of"),
        (["s", "s@3"], "s@3: the learning rates of family 'all' are 0.1: name one"),
        (["s", "s:order"], "s:order: the learning rates of family 'order' are none"),
        (["s", "v"], "s has split=test, and v split=validation"),
        (["s", "s", "--margin", "0"], "--margin must be between 0 and 100"),
        (["s", "s", "s", "--until-decided"], "name two sweeps"),
    ],
)
def test_what_cannot_be_compared_is_one_line(sweeps, message, sweep):
    sweep("--seeds", "0:2", "--out", "s")
    sweep("--seeds", "0:2", "--split", "validation", "--out", "v")
    with pytest.raises(mj.UserError, match=message):
        compare_main(sweeps)


def test_the_weights_of_more_seeds_are_kept_where_those_of_the_first_are(sweep):
    sweep("--seeds", "0:2", "--keep-weights", "--out", "a")
    sweep("--seeds", "0:2", "--learning-rate", "0.001", "--out", "b")
    compare_main(["a", "b", "--until-decided"])
    assert len(list(Path("a/weights").glob("*.npz"))) == len(mj.read_runs("a")) == FIRST_LOOK
    assert not Path("b/weights").exists()


def test_sweeps_with_lanes_are_extended_with_them(sweep):
    sweep("--seeds", "0:40", "--lanes", "20", "--out", "a")
    sweep("--seeds", "0:4", "--lanes", "2", "--learning-rate", "0.001", "--out", "b")
    compare_main(["a", "b", "--until-decided"])
    for name, lanes, runs in (("a", 20, 40), ("b", 2, FIRST_LOOK)):
        found = {read_metadata(path).environment["lanes"] for path in row_files(Path(name))}
        assert (found, len(mj.read_runs(name))) == ({lanes}, runs)


def test_a_comparison_is_drawn_of_the_runs_compared(sweep, monkeypatch):
    sweep("--seeds", "0:4", "--out", "a")
    sweep("--seeds", "2:6", "--learning-rate", "0.05", "--out", "b")
    drawn, draw = [], figures.draw_comparison
    monkeypatch.setattr(figures, "draw_comparison", lambda *a: drawn.append(a) or draw(*a))
    compare_main(["a", "b", "--out", "c"])
    ours, theirs, comparison, *_ = drawn[0]
    assert comparison.pairs == len(ours) == len(theirs) == 2
    assert np.mean(ours) - np.mean(theirs) == pytest.approx(comparison.difference.estimate)


def test_seeds_are_trained_until_it_is_decided(sweep, capsys):
    sweep("--seeds", "5", "--out", "a")
    sweep("--seeds", "3,4", "--learning-rate", "0.001", "--out", "b")
    compare_main(["a", "b", "--until-decided"])
    assert f"\n{FIRST_LOOK} pairs: +" in "\n" + capsys.readouterr().out
    trained = [mj.read_runs(name)["seed"].to_pylist() for name in ("a", "b")]
    assert trained[0] == trained[1] == [3, 4, 5, *range(6, 33)]
    # of more pairs than that took, the first decide
    sweep("--seeds", "33:35", "--out", "a")
    sweep("--seeds", "33:35", "--learning-rate", "0.001", "--out", "b")
    compare_main(["a", "b", "--until-decided"])
    printed = capsys.readouterr().out
    assert f"\n{FIRST_LOOK} of 32 pairs: +" in "\n" + printed
    assert f"sequence after {FIRST_LOOK} pairs." in printed
    # too like to tell within the budget
    sweep("--seeds", "0:50", "--out", "c")
    sweep("--seeds", "0:2", "--dropout", "0.21", "--out", "d")
    compare_main(["c", "d", "--until-decided", "--max-seeds", "34", "--margin", "0.001"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("30 pairs: ")
    assert lines[0].endswith("undecided")
    assert lines[1].startswith("34 pairs: ")
    assert mj.read_runs("d")["seed"].to_pylist() == [*range(34)]
