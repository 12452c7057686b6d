"""Every number of results/ and README.md is recomputed here from the committed rows."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from mlp_jax import report, stats, store
from mlp_jax.config import REFERENCES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SWEEPS = sorted(path.parent for path in ROOT.glob("results/*/summary.json"))


def read(path):
    return json.loads((ROOT / path).read_text())


def by_name(path):
    return path.name


def close(a, b):
    """Equal but for the last bits, which another processor or NumPy may round otherwise."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-9) if isinstance(a, float) else a == b


def points(interval, digits=3):
    """An interval in percentage points."""
    return "{} ({} to {})".format(*(f"{100 * end:.{digits}f}" for end in interval.values()))


def record_line(directory):
    """The row of README's table on a sweep's runs at the recipe's own settings."""
    summary = json.loads((directory / "summary.json").read_text())
    family = summary["families"][0]
    epochs = "1 epoch" if summary["epochs"] == 1 else f"{summary['epochs']} epochs"
    reference = below = "-"
    if family["reference"]:
        reference = f"{100 * family['reference']:.2f}"
        below = "{:.0f} % ({:.0f} to {:.0f})".format(
            *(100 * end for end in family["share_below"].values())
        )
    return row(
        f"[`{directory.name}`](results/{directory.name}), {epochs}",
        f"{family['runs']:,}",
        points(family["mean"]),
        points(family["sd"]),
        f"{100 * family['min']:.2f} to {100 * family['max']:.2f}",
        f"{100 * family['vote_accuracy']:.2f}",
        reference,
        below,
    )


def row(*cells):
    return "| " + " | ".join(cells) + " |"


def source_lines():
    """README's table on which randomness makes the spread."""
    for family in read("results/short/summary.json")["families"]:
        ratio = family["sd_over_all"]
        yield row(
            f"`{family['vary']}`",
            f"{family['runs']:,}",
            points(family["sd"]),
            "{:.2f} ({:.2f} to {:.2f})".format(*ratio.values()) if ratio else "1",
            points(family["distribution_sd"]),
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
        tried = " and ".join(f"{trial['tried']} of {trial['command']}" for trial in both)
        ends = (str(sum(trial[name] for trial in both)) for name in ("survived", "lost"))
        yield row(fault, tried, *ends)


def headline():
    """README's answer to: is the reference a fair number?"""
    family = read("results/keras-sgd/summary.json")["families"][0]
    below = family["share_below"]
    return (
        f"**{family['runs']} seeds reach {points(family['mean'], 2)} % on average, with an SD of"
        f" {points(family['sd'])} points; 97.26 % lies {family['z']:+.1f} SDs from that mean,"
        f" above {100 * below['estimate']:.0f} % of the runs"
        f" ({100 * below['low']:.0f} to {100 * below['high']:.0f} %).**"
    )


def speed_lines():
    """README's table on speed."""
    speed = read("results/speed.json")
    epoch = {row["what"]: row for row in speed["epoch"]}
    sweep = {row["what"]: row for row in speed["sweep"]}
    lines = []

    def add(what, ratio, low, high, goal):
        lines.append(f"| {what} | {ratio:.2f} ({low:.2f} to {high:.2f}) | {goal} |")

    keras = epoch["Keras on JAX"]
    # a ratio of Keras to mlp_jax, turned over
    ends = (1 / keras[name] for name in ("ratio", "ratio max", "ratio min"))
    add("an epoch of one run, in times of Keras 3 on JAX", *ends, "0.75 at most")
    goals = {"mlp_jax, single runs": "1.25", "Keras on JAX": "1.8", "Keras on TF": "3"}
    for name, goal in goals.items():
        best = min((row for what, row in sweep.items() if name in what), key=lambda r: r["ratio"])
        ends = (best[column] for column in ("ratio", "ratio min", "ratio max"))
        add(f"seeds an hour of a sweep, in times of {best['what']}", *ends, f"{goal} at least")
    whole = {row["what"]: row for row in speed["whole sweep"]}
    row = whole["mlp_jax.train, one after another"]
    ends = (row[column] for column in ("ratio", "ratio min", "ratio max"))
    add("the same in times of single runs, as whole processes of 5 epochs", *ends, "")
    for row, goal in zip(speed["process"], ("1 s", "8 s, 1,500 MB"), strict=True):
        low, high = row["seconds min"], row["seconds max"]
        seconds = f"{row['seconds']:.1f} s ({low:.1f} to {high:.1f})"
        lines.append(
            f"| `{row['what']}`, data cached | {seconds}, {row['peak MB']:.0f} MB | {goal} |"
        )
    return lines


def time_line():
    """README's row on what to expect: 50 median epochs."""
    seconds = 50 * read("results/speed.json")["epoch"][0]["seconds"]
    return f"| 2 cores of an AMD EPYC | {seconds:.0f} s |"


@pytest.mark.parametrize("directory", SWEEPS, ids=by_name)
def test_summaries_follow_from_the_rows(directory):
    """What needs no images; NumPy and the standard library stand in for stats.py."""
    summary = json.loads((directory / "summary.json").read_text())
    rows = store.read_runs(directory, ["test_correct"]).to_pylist()
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
        assert family["mean"]["estimate"] == pytest.approx(statistics.mean(accuracy), rel=1e-12)
        assert family["sd"]["estimate"] == pytest.approx(np.std(accuracy, ddof=1), rel=1e-9)
        assert (family["min"], family["max"]) == (min(accuracy), max(accuracy))
        if family["share_below"]:
            right, _ = REFERENCES[summary["recipe"]]
            correct = [round(a * summary["n_test"]) for a in accuracy]
            below = stats.share_below(right, np.array(correct))
            assert family["share_below"]["estimate"] == pytest.approx(below.estimate)


@pytest.mark.network
@pytest.mark.parametrize("directory", SWEEPS, ids=by_name)
def test_summaries_are_what_the_report_makes(directory, mnist):
    about = store.read_config(directory)
    assert about["fingerprint"] == mnist.fingerprint
    families = report.read_families(directory, mnist.test.labels, mnist.n_classes)
    made = report.summarize(
        families, about["recipe"], about["config"], store.processors(directory, about)
    )
    assert close(json.loads(json.dumps(made)), json.loads((directory / "summary.json").read_text()))


@pytest.mark.parametrize("directory", SWEEPS, ids=by_name)
def test_the_readme_quotes_the_records(directory):
    assert record_line(directory) in README


def test_the_readme_quotes_its_headline_and_speed():
    assert headline() in README.replace("\n", " ")
    assert hardware_line() in README.replace("\n", " ")
    for line in [time_line(), *source_lines(), *speed_lines()]:
        assert line in README


def test_ratios_of_speed_have_their_accuracy_beside_them():
    for part in ("epoch", "sweep"):
        rows = read("results/speed.json")[part]
        accuracies = [row["test accuracy"] for row in rows if "products" not in row["what"]]
        assert max(accuracies) - min(accuracies) < 0.005
        for row in rows:
            assert row["ratio min"] <= row["ratio"] <= row["ratio max"]


def test_there_are_records():
    assert {"keras-sgd", "keras-rmsprop", "short"} <= {directory.name for directory in SWEEPS}


def test_nothing_was_lost():
    faults = read("results/faults.json")["faults"]
    kills = [trial for trial in faults if trial["fault"].startswith("kill -9")]
    assert [(trial["command"], trial["tried"]) for trial in kills] == [("train", 25), ("sweep", 25)]
    for trial in faults:
        assert trial["tried"] == trial["survived"] > 0
        assert trial["lost"] == 0
    for line in fault_lines():
        assert line in README
