"""scripts/committee.py: votes by summed probabilities."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from mlp_jax.errors import UserError
from mlp_jax.records.rows import read_runs
from mlp_jax.sweep import main as sweep_main

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import committee as script

RESULTS = Path(__file__).parents[1] / "results"


def test_committees_are_counted():
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet(np.ones(4), (3, 50))
    labels = rng.integers(4, size=50)

    def right(members):
        return (np.argmax(sum(probabilities[m] for m in members), axis=1) == labels).sum()

    correct = script.count_correct(probabilities, labels, 300)
    assert correct.shape == (300, 3)
    assert correct[0].tolist() == [right(range(n)) for n in (1, 2, 3)]
    assert set(correct[:, 2]) == {right(range(3))}
    for size in (1, 2):
        every = [right(members) for members in itertools.combinations(range(3), size)]
        assert set(correct[:, size - 1]) == set(every)
        assert correct[:, size - 1].mean() == pytest.approx(np.mean(every), abs=0.5)


def train(small_dir, *flags):
    settings = ["--dataset", "kmnist", "--hidden", "16", "--batch-size", "32", "--epochs", "2"]
    sweep_main([*settings, "--data-dir", str(small_dir), "--keep-weights", "--quiet", *flags])


def test_the_record_is_that_of_the_sweep(small_dir, here, small, capsys):
    train(small_dir, "--seeds", "0:3", "--out", "s")
    script.main(script.Args(Path("s"), Path("c.json"), small_dir))
    record = json.loads(Path("c.json").read_text())
    n_test = len(small.test.labels)
    assert record["n_test"] == n_test
    assert record["seeds"] == [0, 1, 2]
    by_members = record["by_members"]
    assert [each["members"] for each in by_members] == [1, 2, 3]
    assert by_members[2]["mean"] == by_members[2]["low"] == record["accuracy"]["estimate"]
    assert record["correct_together"] == round(n_test * record["accuracy"]["estimate"])
    alone = by_members[0]
    assert round(n_test * alone["low"]) in record["correct_alone"]
    assert alone["mean"] == pytest.approx(np.mean(record["correct_alone"]) / n_test, abs=0.02)
    assert script.make_curve(script.read_members(Path("c.parquet")), small.test.labels) == {
        name: record[name] for name in record if name not in ("command", "config", "backend")
    }
    assert Path("c.png").stat().st_size > 1000
    assert f"together {record['correct_together']}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["best", "best-augmented", "best-distilled"])
def test_a_committee_is_of_the_committed_runs(name):
    record = json.loads((RESULTS / f"committee-{name}.json").read_text())
    rows = read_runs(RESULTS / name, ["seed", "test_correct"]).to_pylist()
    assert record["seeds"] == [row["seed"] for row in rows]
    assert record["correct_alone"] == [row["test_correct"] for row in rows]
    curve, last = record["by_members"], record["correct_together"] / record["n_test"]
    assert [each["members"] for each in curve] == [*range(1, len(rows) + 1)]
    assert curve[0]["mean"] == pytest.approx(np.mean(record["correct_alone"]) / 1e4, abs=2e-4)
    assert [curve[-1][end] for end in ("mean", "low", "high")] == [last] * 3


@pytest.mark.network
def test_the_vote_of_the_students_follows_from_its_members(mnist):
    path, labels = RESULTS / "committee-best-distilled.json", mnist.test.labels
    record, members = (
        json.loads(path.read_text()),
        script.read_members(path.with_suffix(".parquet")),
    )
    assert script.make_curve(members, labels) == {
        name: record[name] for name in record if name not in ("command", "config", "backend")
    }
    for member in members.values():  # some probabilities are equal in thousandths
        correct = (member.probabilities.argmax(axis=-1) == labels).sum()
        assert correct == pytest.approx(member.correct, abs=3)


def test_members_stay_when_their_weights_are_gone(small_dir, here):
    def record(directory, out):
        script.main(script.Args(Path(directory), Path(out), small_dir))
        return json.loads(Path(out).read_text()) | {"command": None}

    train(small_dir, "--seeds", "0:2", "--out", "s")
    assert record("s", "c.json")["seeds"] == [0, 1]
    shutil.rmtree("s/weights")
    train(small_dir, "--seeds", "2:4", "--out", "s")
    train(small_dir, "--seeds", "0:4", "--out", "t")
    assert record("s", "c.json") == record("t", "d.json")
    train(small_dir, "--seeds", "0:1", "--epochs", "1", "--out", "u")
    with pytest.raises(UserError, match=r"c\.parquet has members of other settings or data"):
        record("u", "c.json")
