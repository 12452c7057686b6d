"""README's numbers follow from results/, and these from the committed rows.

Without the images, what the rows alone determine is recomputed, with NumPy and SciPy instead of
stats.py; with them (`-m network`), the whole report is made again.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import scipy.stats
from quoting import README, ROOT, close, points, read, row

from mlp_jax import results
from mlp_jax.analysis.summary import compare_to_reference, to_json
from mlp_jax.data.dataset import load_dataset
from mlp_jax.records import rows
from mlp_jax.records.directory import read_metadata
from mlp_jax.records.provenance import describe_environment
from mlp_jax.records.rows import checked_files, read_runs
from mlp_jax.report import main as report_main
from mlp_jax.training.config import RECIPES, REFERENCES, Config
from mlp_jax.training.fit import fit
from mlp_jax.training.parallel import Placement
from mlp_jax.training.run import make_run
from mlp_jax.verify import TOLERANCES, same_machine

TRIED = ("tried", "survived", "lost")
RECORDS = sorted(path.parent for path in ROOT.glob("results/*/summary.json"))
CROSSED = [each for each in RECORDS if each.name.endswith("-crossed")]
SWEEPS = [each for each in RECORDS if each not in CROSSED]
QUESTIONS = sorted(ROOT.glob("results/questions/*/comparison.json"))
FASHION = ROOT / "results" / "keras-rmsprop-fashion"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
OLDER = [ROOT / "results" / name for name in ("keras-rmsprop", "keras-sgd", "short")]
GOALS = {"sprint": 9726, "sprint-98": 9840, "sprint-99": 9900}
"""Of a speedrun: correct test images that its mean has to exceed."""
FRESH = 1000
"""The first seed of a speedrun's record: its settings were chosen with lower ones."""


def by_name(path):
    return path.name


def count_epochs(summary):
    return "1 epoch" if summary["epochs"] == 1 else f"{summary['epochs']} epochs"


def record_line(directory):
    """The row of README's table on a sweep's runs at the recipe's own settings."""
    summary = json.loads((directory / "summary.json").read_text())
    family = summary["families"][0]
    reference = beside = "-"
    if family["reference"]:
        reference = f"{100 * family['reference']:.2f}"
        beside = "{runs_below} / {runs_equal} / {runs_above}".format(**family)
    return row(
        f"[`{directory.name}`](results/{directory.name}), {count_epochs(summary)}",
        f"{family['runs']:,}",
        points(family["mean"]),
        f"{100 * family['over_test_sets']:.2f}",
        points(family["sd"]),
        f"{100 * family['min']:.2f} to {100 * family['max']:.2f}",
        f"{100 * family['vote_accuracy']:.2f}",
        reference,
        beside,
    )


def endless_line():
    """README's words on what the spread would be on an endless test set."""
    said = []
    for directory in SWEEPS:
        if directory == FASHION:  # five runs say nothing of it
            continue
        family = json.loads((directory / "summary.json").read_text())["families"][0]
        errors = f"{100 * family['independent_sd']:.3f}"
        rest = points(family["distribution_sd"])
        said.append(f"`{directory.name}`: {errors} of independent errors, {rest} distribution-wise")
    signed = "Signed square roots of estimated variances, which can be negative, in points"
    return f"{signed}. {'; '.join(said)}."


def crossed_lines():
    """README's table on which randomness makes the spread."""
    for directory in CROSSED:
        (crossed,) = json.loads((directory / "summary.json").read_text())["crossed"]
        for name in [*crossed["streams"], "interactions"]:
            cells = []
            for of in (crossed["test"], crossed["distribution"]):
                shares = (of["indices"].get(name, of["interactions"]), of["total"].get(name))
                cells += [
                    "{:.2f} ({:.2f} to {:.2f})".format(*s.values()) if s else "" for s in shares
                ]
            yield row(f"[`{directory.name}`](results/{directory.name})", name, *cells)


def crossed_line():
    """README's words on how many runs its table on the streams rests on."""
    said, machines = [], {}
    for directory in CROSSED:
        summary = json.loads((directory / "summary.json").read_text())
        (crossed,) = summary["crossed"]
        sd = points({k: math.sqrt(max(0, v)) for k, v in crossed["test"]["variance"].items()})
        said.append(
            f"`{directory.name}`, {count_epochs(summary)}: {crossed['test']['blocks']} blocks of"
            f" {2 ** len(crossed['streams'])} runs, whose SD is {sd} points"
        )
        machines |= summary["processors"]
    (machine,) = machines
    machine = re.fullmatch(r"(.+), (.+), cpu", machine).expand(r"\2 of \1")
    return "; ".join(said) + f". All ran on {machine}."


def held_line():
    """README's words on the variance of one stream, where the others keep seed 0."""
    families = read("results/short/summary.json")["families"]
    variance = {each["vary"]: each["sd"]["estimate"] ** 2 for each in families}
    names = "init", "order", "dropout"
    return ", ".join(f"{name} {variance[name] / variance['all']:.2f}" for name in names)


def crossed_words():
    """README's sentences on `short-crossed`."""
    (crossed,) = read("results/short-crossed/summary.json")["crossed"]
    test, distribution = crossed["test"], crossed["distribution"]
    least = min(each["total"]["order"]["low"] for each in (test, distribution))
    own = [each["indices"]["order"]["estimate"] for each in (test, distribution)]
    assert all(0.43 <= share <= 0.47 for share in own)  # "about 45 %"
    most = max(test["indices"][name]["high"] for name in ("init", "dropout"))
    left = distribution["variance"]["estimate"] / test["variance"]["estimate"]
    return (
        f"in at least {math.floor(100 * least)} % of it",
        f"({most:.2f} at most)",
        f"{100 * left:.0f} % of the variance would remain on an infinite test set",
    )


def decide_lines():
    """README's table on the pairs of runs that a decision takes: better by it, or equivalent."""
    rows = read("results/decide.json")["rows"]
    for recipe in dict.fromkeys(each["recipe"] for each in rows):
        mine = [each for each in rows if each["recipe"] == recipe]
        cells = [
            f"{each['median_pairs']:,.0f} ({each['pairs_of_90_percent']:,.0f})" for each in mine
        ]
        both = (" / ".join(two) for two in zip(cells[::2], cells[1::2], strict=True))
        yield row(f"`{recipe}`", f"{mine[0]['sd']:.3f}", *both)


def question_lines():
    """README's table on the questions that were asked until they were decided."""
    answers = {"better": "A is better", "worse": "B is better"}
    for path in QUESTIONS:
        (comparison,) = read(path)["comparisons"]
        metadata, decision = read_metadata(ROOT / comparison["a"]), comparison["until_decided"]
        a, b = (Path(comparison[side]).name for side in ("a", "b"))
        yield row(
            f"`{metadata.recipe}`, {metadata.config.epochs:g} epochs",
            f"`{a}`",
            f"`{b}`",
            str(decision["pairs"]),
            points(decision["difference"]),
            answers.get(decision["verdict"], decision["verdict"]),
        )


def beyond_line():
    """README's words on the answers that other test images could change."""
    said = []
    for path in QUESTIONS:
        (comparison,) = read(path)["comparisons"]
        ends, margin = comparison["over_test_sets"], comparison["margin"]
        if comparison["verdict"] == "equivalent" and max(-ends["low"], ends["high"]) > margin:
            name, n = path.parent.name, comparison["runs_a"]
            said.append(f"`{name}` {points(ends)}, of all {n} pairs")
    return (
        "Over all images like these, A and B that were judged equivalent may differ by more than"
        f" the margin: {'; '.join(said)}, as if their number had been fixed in advance."
    )


def hardware_line():
    """README's words on where the rows come from."""
    said = []
    for directory in SWEEPS:
        summary = json.loads((directory / "summary.json").read_text())
        where = (f"{n:,} on {name}" for name, n in sorted(summary["processors"].items()))
        said.append(f"`{directory.name}`: {' and '.join(where)}")
    return f"Rows of {'; '.join(said)}."


def fault_lines():
    """README's table on what was lost."""
    faults = {}
    for trial in read("results/faults.json")["faults"]:
        faults.setdefault(trial["fault"], []).append(trial)
    for fault, both in faults.items():
        tried = ", ".join(f"{trial['tried']} of {trial['command']}" for trial in both)
        n, survived, lost = (sum(trial[name] for trial in both) for name in TRIED)
        assert not lost
        yield row(fault, tried, str(survived), f"0, at most {upper_limit(n)}")


def upper_limit(n):
    """The share that is lost 0 times in n with a chance of 5 %."""
    return f"{100 * (1 - 0.05 ** (1 / n)):.2g} %"


def headline():
    """README's answer to: is the reference a fair number?"""
    family = read("results/keras-sgd/summary.json")["families"][0]
    side = "below" if family["z"] < 0 else "above"
    return (
        f"**{family['runs']} seeds reach {points(family['mean'], 2)} % on average, with an SD of"
        f" {points(family['sd'])} points; 97.26 % lies {abs(family['z']):.1f} SDs {side} that mean:"
        f" {family['runs_below']} of the runs lie below it, {family['runs_equal']} equal it and"
        f" {family['runs_above']} lie above.**"
    )


@pytest.mark.parametrize("directory", SWEEPS, ids=by_name)
def test_summaries_follow_from_the_rows(directory):
    summary = json.loads((directory / "summary.json").read_text())
    rows = read_runs(directory, ["test_correct"]).to_pylist()
    assert len(rows) == sum(f["runs"] + len(f["diverged"]) for f in summary["families"])
    for family in summary["families"]:
        where = (family["vary"], family["learning_rate"])
        accuracy = [
            row["test_correct"] / summary["n_test"]
            for row in rows
            if (row["vary"], row["learning_rate"]) == where
            and row["seed"] not in family["diverged"]
        ]
        assert len(accuracy) == family["runs"]
        n, sd = len(accuracy), np.std(accuracy, ddof=1)
        mean = family["mean"]
        assert mean["estimate"] == pytest.approx(statistics.mean(accuracy), rel=1e-12)
        half = scipy.stats.t.ppf(0.975, n - 1) * sd / math.sqrt(n)
        assert mean["high"] - mean["estimate"] == pytest.approx(half, rel=1e-6)
        assert family["sd"]["estimate"] == pytest.approx(sd, rel=1e-9)
        plain = sd * math.sqrt((n - 1) / scipy.stats.chi2.ppf(0.025, n - 1))
        assert plain * (1 - 1e-9) <= family["sd"]["high"] < 1.1 * plain
        assert (family["min"], family["max"]) == (min(accuracy), max(accuracy))
        p = (10_000 - np.array(accuracy) * summary["n_test"]).mean() / 10_000
        assert 0 < family["over_test_sets"] < 1.96 * math.sqrt(p * (1 - p) / summary["n_test"])
        if below := family["share_below"]:
            right, _ = REFERENCES[summary["recipe"]]
            signs = [np.sign(round(a * summary["n_test"]) - right) for a in accuracy]
            counted = [family[f"runs_{where}"] for where in ("below", "equal", "above")]
            assert counted == [signs.count(-1), signs.count(0), signs.count(1)]
            share = (signs.count(-1) + signs.count(0) / 2) / n
            assert below["estimate"] == pytest.approx(share)
            ends = scipy.stats.beta.ppf([0.025, 0.975], share * n + 0.5, (1 - share) * n + 0.5)
            ends = np.where([share == 0, share == 1], [0, 1], ends)
            assert [below["low"], below["high"]] == pytest.approx(ends.tolist())


@pytest.mark.parametrize("directory", OLDER, ids=by_name)
def test_a_record_without_a_newer_setting_is_still_that_of_its_recipe(directory):
    recorded = json.loads((directory / "config.json").read_text())["config"]
    assert "schedule" in {field.name for field in dataclasses.fields(Config)} - recorded.keys()
    metadata = read_metadata(directory)
    assert metadata.config == RECIPES[metadata.recipe]
    # so the report still compares it with the reference
    stored = json.loads((directory / "summary.json").read_text())["families"][0]
    ids = {name: stored[name] for name in ("vary", "learning_rate")}
    rows = read_runs(directory, ["test_correct"]).to_pylist()
    correct = np.array([row["test_correct"] for row in rows if ids.items() <= row.items()])
    counts = SimpleNamespace(labels=range(10_000))
    family = SimpleNamespace(vary="all", rate=ids["learning_rate"], correct=correct, counts=counts)
    made = to_json(compare_to_reference(family, metadata.recipe, metadata.config))
    names = ("reference", "runs_below", "runs_equal", "runs_above", "share_below", "z")
    names = names if metadata.recipe in REFERENCES else ()
    assert close(made, {name: stored[name] for name in names})


@pytest.mark.parametrize("directory", CROSSED, ids=by_name)
def test_indices_of_crossed_streams_follow_from_the_rows(directory):
    """From differences of runs that share all streams but one, or none (Jansen 1999)."""
    (crossed,) = json.loads((directory / "summary.json").read_text())["crossed"]
    streams = crossed["streams"]
    table = read_runs(directory, [*(f"{name}_seed" for name in streams), "test_correct"])
    seeds = np.stack([table[f"{name}_seed"].to_numpy() for name in streams], axis=1)
    scores = dict(
        zip(map(tuple, seeds.tolist()), table["test_correct"].to_numpy() / 1e4, strict=True)
    )
    blocks = range(seeds.max() // 2 + 1)
    cells = list(itertools.product((0, 1), repeat=len(streams)))
    y = np.array([[scores[tuple(2 * b + np.array(cell))] for cell in cells] for b in blocks])
    y = y.reshape(-1, *(2,) * len(streams))
    axes = tuple(range(1, y.ndim))
    variance = ((y - np.flip(y, axes)) ** 2).mean() / 2
    assert crossed["test"]["variance"]["estimate"] == pytest.approx(variance)
    for axis, name in zip(axes, streams, strict=True):
        others = tuple(other for other in axes if other != axis)
        total = ((y - np.flip(y, axis)) ** 2).mean() / 2 / variance
        first = 1 - ((y - np.flip(y, others)) ** 2).mean() / 2 / variance
        assert crossed["test"]["total"][name]["estimate"] == pytest.approx(total)
        assert crossed["test"]["indices"][name]["estimate"] == pytest.approx(first)


@pytest.mark.network
@pytest.mark.parametrize("directory", RECORDS, ids=by_name)
def test_summaries_are_what_the_report_makes(directory, tmp_path, monkeypatch):
    if directory == FASHION:
        if not DEBIAN.exists():
            pytest.skip("Debian's dataset-fashion-mnist is not installed")
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
        load_dataset("fashion_mnist", manual_dir=DEBIAN)
    report_main([str(directory), "--out", str(tmp_path)])
    made, stored = (
        json.loads((place / "summary.json").read_text()) for place in (tmp_path, directory)
    )
    assert close(made, stored)


@pytest.mark.parametrize("directory", SWEEPS, ids=by_name)
def test_the_readme_quotes_the_records(directory):
    assert record_line(directory) in README


def test_the_readme_quotes_its_headline():
    assert headline() in README.replace("\n", " ")
    zero = read("results/keras-sgd/summary.json")["families"][0]["distribution_sd"]["high"]
    assert f"consistent with zero, and at most {100 * zero:.3f} points" in README.replace("\n", " ")
    wrong = max(each["wrong"] for each in read("results/decide.json")["rows"])
    assert f"wrong in {wrong} of 1,000 at most" in README.replace("\n", " ")
    undecided = max(each["undecided"] for each in read("results/decide.json")["rows"])
    assert f"{undecided} of 1,000 at most were undecided" in README.replace("\n", " ")
    for words in (hardware_line(), endless_line(), crossed_line(), held_line(), *crossed_words()):
        assert words in README.replace("\n", " ")
    for line in [*crossed_lines(), *decide_lines()]:
        assert line in README


def test_five_epochs_show_what_the_readme_says():
    (crossed,) = read("results/keras-rmsprop-crossed/summary.json")["crossed"]
    own, total = crossed["test"]["indices"], crossed["test"]["total"]
    assert max(total, key=lambda name: total[name]["estimate"]) == "order"
    assert [name for name in total if own[name]["low"] > 0] == ["order"]
    assert min(each["estimate"] for each in total.values()) > 0.5


def test_the_readme_judges_as_the_records_do():
    """Its sentences on the spread that have no number of their own."""
    sgd, rmsprop = (
        read(f"results/{name}/summary.json")["families"][0]
        for name in ("keras-sgd", "keras-rmsprop")
    )
    # "on the low side of what its recipe gives", and "an ordinary one"
    assert 0.025 < sgd["share_below"]["estimate"] < 0.25
    assert 0.25 < rmsprop["share_below"]["estimate"] < 0.75
    # "consistent with zero", "most of the spread", and "too few to tell"
    for family in (sgd, rmsprop):
        assert family["distribution_sd"]["low"] < 0 < family["distribution_sd"]["high"]
    assert sgd["independent_sd"] ** 2 > sgd["sd"]["estimate"] ** 2 / 2
    assert rmsprop["distribution_sd"]["high"] ** 2 > rmsprop["sd"]["estimate"] ** 2 / 2


def first_losses(directory, names):
    """Test loss after the first epoch, by the seeds of the streams `names`."""
    table = read_runs(ROOT / "results" / directory, [*names, "vary", "test_loss_by_epoch"])
    rows = [row for row in table.to_pylist() if row["vary"] in ("all", "crossed")]
    return {tuple(row[name] for name in names): row["test_loss_by_epoch"][0] for row in rows}


def rounding_line():
    """README's words on the seeds that a processor without AVX-512 trained, too."""
    said = []
    for recipe, directory in (
        ("keras-rmsprop", "questions/epsilon/optimizer=rmsprop"),
        ("keras-sgd", "questions/dropout/dropout=0.2"),
        ("short", "short-crossed"),
    ):
        if directory.endswith("crossed"):
            there = first_losses(directory, ("init_seed", "order_seed", "dropout_seed"))
            there = {seeds[:1]: loss for seeds, loss in there.items() if len(set(seeds)) == 1}
        else:
            there = first_losses(directory, ("seed",))
        here = first_losses(recipe, ("seed",))
        shared = here.keys() & there.keys()
        same = sum(here[seed] == there[seed] for seed in shared)
        said.append(f"{same} of {len(shared)} seeds of `{recipe}`")
    return f"{', '.join(said[:2])} and {said[2]}"


@pytest.mark.parametrize("path", QUESTIONS, ids=lambda path: path.parent.name)
def test_the_answer_to_a_question_follows_from_its_rows(path):
    """The confidence sequence of Waudby-Smith et al., arXiv 2103.06476, pair by pair."""
    (comparison,) = read(path)["comparisons"]
    tables = [read_runs(ROOT / comparison[side], ["test_correct"]) for side in ("a", "b")]
    columns = ([table[n].to_pylist() for n in ("seed", "test_correct")] for table in tables)
    a, b = (dict(zip(*each, strict=True)) for each in columns)
    assert a.keys() == b.keys()
    d = np.array([a[seed] - b[seed] for seed in sorted(a)]) / 1e4
    rho = math.sqrt((-scipy.special.lambertw(-(0.05**2) / math.e, -1).real - 1) / 50)
    for t in range(30, len(d) + 1):
        mean, spread = d[:t].mean(), d[:t].std(ddof=1)
        grown = t * rho**2 + 1
        half = spread * math.sqrt(2 * grown / (t * rho) ** 2 * math.log(math.sqrt(grown) / 0.05))
        if abs(mean) > half or abs(mean) + half < comparison["margin"]:
            break
    else:
        assert len(d) == 100
    decision = comparison["until_decided"]
    ends = {"estimate": mean, "low": mean - half, "high": mean + half}
    assert decision["pairs"] == t
    assert decision["difference"] == pytest.approx(ends)
    verdict = "equivalent" if abs(mean) + half < comparison["margin"] else "undecided"
    if abs(mean) > half:
        verdict = "better" if mean > 0 else "worse"
    assert decision["verdict"] == comparison["verdict"] == verdict
    paired = scipy.stats.ttest_rel([a[seed] for seed in sorted(a)], [b[seed] for seed in sorted(a)])
    assert comparison["p_value"] == pytest.approx(paired.pvalue)


def test_the_readme_quotes_the_answers():
    assert {path.parent.name for path in QUESTIONS} == {"dropout", "epsilon", "products"}
    for line in question_lines():
        assert line in README
    assert beyond_line() in README.replace("\n", " ")


def test_a_recipe_on_another_data_set_has_no_reference():
    metadata = read_metadata(FASHION)
    assert metadata.config == dataclasses.replace(RECIPES["keras-rmsprop"], dataset="fashion_mnist")
    (family,) = json.loads((FASHION / "summary.json").read_text())["families"]
    assert family["reference"] is None
    assert f"{points(family['mean'], 2)} % test accuracy on Fashion-MNIST" in README.replace(
        "\n", " "
    )


def test_the_search_is_that_of_its_rows():
    search = read("results/search.json")
    assert [line["sweep"] for line in search["sweeps"]] == sorted(
        directory.name for directory in (ROOT / "results" / "search").iterdir()
    )
    for line in search["sweeps"]:
        directory = ROOT / "results" / "search" / line["sweep"]
        config = read_metadata(directory).config
        recipe = dataclasses.replace(RECIPES[line["recipe"]], split=line["split"])
        assert Config.from_json(dataclasses.asdict(recipe) | line["settings"]) == config
        rows = read_runs(directory, ["seed", "test_correct"])
        assert line["seeds"] == rows["seed"].to_pylist()
        correct = rows["test_correct"].to_pylist()
        assert line["mean"] == pytest.approx(np.mean(correct) / 100)
        sd = np.std(correct, ddof=1) / 100 if len(correct) > 1 else None
        assert line["sd"] == pytest.approx(sd)
    two = [line["sd"] for line in search["sweeps"] if len(line["seeds"]) > 1]
    assert {len(line["seeds"]) for line in search["sweeps"]} == {1, 2}
    assert search["sd within settings"] == pytest.approx(np.sqrt(np.mean(np.square(two))))
    said = f"one or two runs of each setting, whose SD is {search['sd within settings']:.3f} points"
    (tested,) = (line for line in search["sweeps"] if line["split"] == "test")
    own = RECIPES["best-augmented"]
    assert tested["settings"]["epochs"] < own.epochs
    assert tested["settings"]["elastic"] < own.elastic
    scores = read_runs(ROOT / "results" / "search" / tested["sweep"], ["test_correct"])
    first, second = (correct / 100 for correct in scores["test_correct"].to_pylist())
    for words in (said, f"scored on the test set: {first:.2f} and {second:.2f} %"):
        assert words in README.replace("\n", " ")


def test_there_are_records():
    assert {"keras-sgd", "keras-rmsprop", "short"} <= {directory.name for directory in SWEEPS}


def test_another_processor_trains_the_same_rows():
    ours, theirs = (ROOT / "results" / name for name in ("keras-sgd", "keras-sgd-epyc"))
    metadata = read_metadata(ours)
    here, there = (
        results.count_processors(checked_files(directory), metadata).keys()
        for directory in (ours, theirs)
    )
    assert not here & there
    rows, others = (
        {row.pop("seed"): row | {"seconds": 0} for row in read_runs(directory).to_pylist()}
        for directory in (ours, theirs)
    )
    assert others == {seed: rows[seed] for seed in others}
    assert f"the {len(others)} seeds of `keras-sgd` that an AMD EPYC" in README.replace("\n", " ")
    assert rounding_line() in README.replace("\n", " ")


def test_nothing_was_lost():
    faults = read("results/faults.json")["faults"]
    kills = [trial for trial in faults if trial["fault"].startswith("kill -9")]
    assert [(trial["command"], trial["tried"]) for trial in kills] == [
        ("train", 100),
        ("sweep", 100),
        ("sweep --ray", 25),
    ]
    for trial in faults:
        assert trial["tried"] == trial["survived"] > 0
        assert trial["lost"] == 0
    n, kinds = sum(trial["tried"] for trial in faults), {trial["fault"] for trial in faults}
    assert f"**In {n} trials of {len(kinds)} kinds nothing" in README
    n_kills = sum(trial["tried"] for trial in kills)
    limit = f"`kill -9` lost nothing in {n_kills} trials (at most {upper_limit(n_kills)} of"
    assert limit in README.replace("\n", " ")
    tried = {name: sum(each["tried"] for each in faults if each["fault"] == name) for name in kinds}
    of_ray = {trial["fault"] for trial in faults if trial["command"] == "sweep --ray"}
    assert tried["a Ray node killed, another joins"] == 25
    assert all(n >= (10 if name in of_ray else 30) for name, n in tried.items())
    for line in fault_lines():
        assert line in README


def test_the_oldest_training_losses_are_products():
    """README: no float32 sum divided by 60,000 gives all of them, and later ones are quotients."""
    oldest = ("keras-sgd", "keras-sgd-epyc", "keras-rmsprop", "short")
    assert f"(`{'`, `'.join(oldest)}`)" in README.replace("\n", " ")
    for name in (*oldest, "best", "best-augmented", "best-distilled", "sprint-99"):
        table = read_runs(ROOT / "results" / name, ["train_loss_by_epoch"])
        stored = np.float32(np.concatenate(table["train_loss_by_epoch"].to_pylist()))
        low = high = np.float32(stored * np.float64(60_000))
        sums = [low]
        for _ in range(3):
            low, high = np.nextafter(low, np.float32(0)), np.nextafter(high, np.float32(1e9))
            sums += [low, high]
        quotients = np.any([each / np.float32(60_000) == stored for each in sums], axis=0)
        products = np.any([each * np.float32(1 / 60_000) == stored for each in sums], axis=0)
        assert (products if name in oldest else quotients).all(), name
        assert not (quotients if name in oldest else products).all(), name


@pytest.mark.network
@pytest.mark.parametrize(
    ("recipe", "seed"),
    [(directory.name, 3) for directory in OLDER] + [(recipe, FRESH) for recipe in GOALS],
)
def test_a_seed_is_the_committed_row(recipe, seed, mnist):
    """Its first two epochs: bit for bit where that is promised, else in the first one's losses."""
    config = RECIPES[recipe]
    placement = Placement(tuple(jax.devices()[:1]), lanes=1)
    training = fit(config, mnist, [make_run(seed, config.learning_rate)], placement=placement)
    *_, progress = itertools.islice(training, 2)
    paths = rows.checked_files(ROOT / "results" / recipe)
    path, row = rows.find_row(paths, ("all", config.learning_rate, seed))
    there = rows.read_metadata(path).environment
    names = ("train_loss", "test_loss", "test_correct")
    stored = {name: row[f"{name}_by_epoch"][:2] for name in names}
    if same_machine(there, describe_environment(placement.devices)):
        assert {name: progress.history[name][0].tolist() for name in names} == stored
    else:
        for name, most in TOLERANCES.items():
            assert progress.history[name][0, 0] == pytest.approx(stored[name][0], rel=most)


@pytest.mark.network
def test_a_new_setting_leaves_a_committed_record_as_it_is(tmp_path):
    """Somebody's Config has one more field: the record is read, and resumed, as before."""
    shutil.copytree(ROOT / "mlp_jax", tmp_path / "mlp_jax")
    config, field = tmp_path / "mlp_jax/training/config.py", "    n_classes: Annotated"
    new = '    gradient_clip: float = 0.0\n    """None."""\n'
    text = config.read_text()
    assert text.count(field) == 1
    config.write_text(text.replace(field, new + field))
    record = shutil.copytree(ROOT / "results" / "sprint", tmp_path / "sprint")
    before = {path: path.read_bytes() for path in (record / "runs").iterdir()}
    settings = json.loads((record / "config.json").read_text())["config"]
    family = json.loads((record / "summary.json").read_text())["families"][0]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for command in (
        ["sweep", "--recipe", "sprint", "--seeds", "1000:1200", "--allow-mixed", "--out", "sprint"],
        ["report", "sprint"],
    ):
        run = [sys.executable, "-m", f"mlp_jax.{command[0]}", *command[1:]]
        done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in (record / "runs").iterdir()} == before
    now = json.loads((record / "config.json").read_text())["config"]
    assert now | settings == now
    (again,) = json.loads((record / "summary.json").read_text())["families"]
    for name in ("mean", "reference", "z"):
        assert again[name] == pytest.approx(family[name])
