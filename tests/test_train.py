"""The single run's front: what is seen, what is left, what bad input and a bad loss end in."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlp_jax.console import table_line, verdict
from mlp_jax.errors import UserError
from mlp_jax.sweep import main as sweep_main
from mlp_jax.train import main as train_main
from mlp_jax.training.config import RECIPES

TINY = [
    *("--dataset", "kmnist", "--hidden", "16", "8"),
    *("--batch-size", "32", "--epochs", "3", "--learning-rate", "0.1"),
]


def run(small_dir, *flags):
    train_main([*TINY, "--data-dir", str(small_dir), *flags])


def python(*args, cwd=None, **env):
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        env=os.environ | env,
    )


def test_what_is_left(small_dir, here, capsys):
    run(small_dir, "--out", "a", "--seed", "3")
    names = ["config.json", "curve.png", "metrics.jsonl", "runs", "summary.json", "weights"]
    assert sorted(path.name for path in Path("a").glob("[!.]*")) == names
    rows = [json.loads(line) for line in Path("a/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert set(row) == {
            "epoch",
            "train_loss",
            "test_loss",
            "test_correct",
            "test_accuracy",
            "seconds",
        }
        assert row["test_accuracy"] == row["test_correct"] / 130
    summary = json.loads(Path("a/summary.json").read_text())
    assert summary["test_correct"] == rows[-1]["test_correct"]
    assert summary["parameters"] == 785 * 16 + 17 * 8 + 9 * 4
    assert (summary["seed"], summary["epochs"], summary["n_test"]) == (3, 3, 130)
    assert summary["train_seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    about = json.loads(Path("a/config.json").read_text())
    assert about["config"]["hidden"] == [16, 8]
    assert about["config"]["n_classes"] == 4
    assert about["environment"]["versions"]["jax"]
    assert {"recipe", "seed", "fingerprint", "environment"} <= set(about)
    said = capsys.readouterr().out
    assert re.search(r"hidden_0 \(Dense, ReLU\) +\(batch, 16\) +12,560", said)
    assert re.search(r"^ +3 / 3 ", said, re.MULTILINE)
    assert f"test accuracy {summary['test_correct']} / 130" in said.splitlines()[-2]


def test_the_same_command_twice_leaves_the_same(small_dir, here):
    for out in ("a", "b"):
        run(small_dir, "--out", out, "--quiet")
    for name, timed in (("metrics.jsonl", r'"seconds": [^}]+'), ("summary.json", r'_seconds": .*')):
        a, b = (re.sub(timed, "", Path(out, name).read_text()) for out in ("a", "b"))
        assert a == b
    assert "seconds" not in re.sub(r'"seconds": [^}]+', "", Path("a/metrics.jsonl").read_text())


def test_runs_get_directories_of_their_own(small_dir, here, capsys):
    for _ in range(2):
        run(small_dir, "--epochs", "1", "--quiet")
    names = sorted(path.name for path in Path("runs").iterdir())
    assert names == ["keras-sgd-seed0", "keras-sgd-seed0-2"]
    assert len(capsys.readouterr().out.splitlines()) == 2  # --quiet: a line a run


def test_a_used_directory_is_kept_unless_told(small_dir, here):
    run(small_dir, "--out", "a", "--quiet")
    Path("a/mine.txt").write_text("not ours")
    (weights,) = Path("a/weights").iterdir()
    copy = shutil.copy(weights, weights.with_name("my-best.npz"))
    before = Path("a/config.json").read_text()
    with pytest.raises(UserError, match="a has results: add --resume or --overwrite, or name"):
        run(small_dir, "--out", "a", "--seed", "1")
    assert Path("a/config.json").read_text() == before
    run(small_dir, "--out", "a", "--seed", "1", "--overwrite", "--quiet")
    assert json.loads(Path("a/config.json").read_text())["seed"] == 1
    assert Path("a/mine.txt").exists()
    assert copy.exists()


@pytest.mark.parametrize("main", [train_main, sweep_main])
def test_a_directory_of_another_project_is_never_overwritten(main, small_dir, here):
    theirs = {"config.json": '{"model": "bert"}', "checkpoints/1": "weights", ".a.tmp": "draft"}
    Path("a/checkpoints").mkdir(parents=True)
    for name, text in theirs.items():
        Path("a", name).write_text(text)
    flags = ["--overwrite"] if main is train_main else []
    with pytest.raises(UserError, match="was not written by mlp_jax, or is damaged"):
        main([*TINY, "--data-dir", str(small_dir), "--quiet", "--out", "a", *flags])
    assert {name: Path("a", name).read_text() for name in theirs} == theirs
    assert sorted(path.name for path in Path("a").iterdir()) == [
        ".a.tmp",
        "checkpoints",
        "config.json",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epoch 3", r"--epoch.*did you mean --epochs\?"),
        ("--recipe keras-sdg", "invalid choice 'keras-sdg' for argument '--recipe'.*keras-sgd"),
        ("--recipe", "--recipe"),
        (
            "--dataset fasion_mnist",
            r"unknown data set 'fasion_mnist'; did you mean fashion_mnist\?",
        ),
        ("--epochs 0", "epochs must be positive and finite, not 0"),
        ("--epochs 3000000000", "3000000000 epochs are 30000000000 steps; the limit is"),
        ("--epochs three", "--epochs.*three"),
        ("--batch-size 0", "batch size must be at least 1, not 0"),
        ("--batch-size 301", "batch size 301 is larger than the 300 training examples of kmnist"),
        ("--dropout 1", r"dropout must be in \[0, 1\), not 1"),
        ("--dropout -0.1", "dropout must be in"),
        ("--dropout nan", "dropout must be in"),
        ("--learning-rate 0", "learning rate must be positive and finite in float32, not 0"),
        ("--learning-rate inf", "learning rate must be positive and finite in float32, not inf"),
        ("--learning-rate nan", "learning rate must be positive and finite in float32, not nan"),
        ("--learning-rate 1e39", "finite in float32, not 1e"),
        ("--learning-rate 1e-46", "finite in float32, not 1e-46"),
        ("--hidden 16 0", "hidden widths must be from 1 to"),
        ("--seed -1", "seeds must be from 0 to"),
        ("--seed 4294967296", "seeds must be from 0 to"),
        ("--optimizer adm", "invalid choice 'adm'.*rmsprop"),
        ("--out file/below", "cannot write to file/below: file is not a directory"),
        ("--out file", "cannot write to file: file is not a directory"),
        ("--manual-dir nowhere", "nowhere"),
        ("--resume", "--resume needs --out"),
        ("--resume --overwrite --out a", "--resume needs --out, and cannot be combined"),
        ("--checkpoint-every -1", "--checkpoint-every must be at least 0, not -1"),
        ("--out .", "is not empty and contains no mlp_jax results"),
        ("--out . --overwrite", "is not empty and contains no mlp_jax results"),
    ],
)
def test_bad_input_is_one_line_and_creates_nothing(flags, message, small_dir, here):
    Path("file").touch()
    with pytest.raises(UserError, match=message) as caught:
        run(small_dir, *flags.split())
    assert "\n" not in str(caught.value)
    assert caught.value.status == 2
    assert [path.name for path in here.iterdir()] == ["file"]


def test_bad_input_as_a_process(here):
    done = python("-m", "mlp_jax.train", "--epocks", "3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "did you mean --epochs?" in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run(small_dir, here):
    with pytest.raises(UserError, match="not finite after epoch 1") as caught:
        run(small_dir, "--learning-rate", "1e30", "--out", "a", "--quiet")
    assert caught.value.status == 1
    (line,) = Path("a/metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["test_loss"] is None
    assert json.loads(Path("a/config.json").read_text())["config"]["learning_rate"] == 1e30
    assert not Path("a/summary.json").exists()
    with pytest.raises(UserError, match="not finite after epoch"):
        run(small_dir, "--learning-rate", "1e30", "--out", "a", "--quiet", "--resume")


def test_help_needs_no_jax():
    code = (
        "import sys; from mlp_jax.train import main as train_main\n"
        "try: train_main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'jax', 'flax', 'pyarrow', 'tensorflow_datasets'} & set(sys.modules)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "--learning-rate" in done.stdout


def test_a_run_needs_no_tensorflow(small_dir, here):
    code = (
        "import sys; from mlp_jax.train import main as train_main\n"
        f"train_main({[*TINY, '--data-dir', str(small_dir), '--quiet']!r})\n"
        "assert not {'tensorflow', 'tensorflow_datasets', 'orbax'} & set(sys.modules)"
    )
    done = python("-c", code, cwd=here)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("recipe", "changed", "words"),
    [
        ("keras-sgd", {}, "the Keras README reports 97.26% (+0.10 points)"),
        ("keras-sgd", {"epochs": 3}, "settings changed from keras-sgd"),
        ("short", {}, "9736 / 10000 = 97.36%"),
    ],
)
def test_verdict(recipe, changed, words):
    config = dataclasses.replace(RECIPES[recipe], **changed)
    assert words in verdict(recipe, config, {"test_correct": 9736, "n_test": 10_000})


def test_the_time_left_is_that_of_median_epochs():
    rows = [
        {"epoch": i + 1, "train_loss": 1.0, "test_loss": 1.0, "test_accuracy": 0.5, "seconds": s}
        for i, s in enumerate([90.0, 30.0, 30.0])
    ]
    assert table_line(rows, 6).split() == [
        "3",
        "/",
        "6",
        "1.0000",
        "1.0000",
        "50.00%",
        "30.00",
        "1:30",
    ]
    rows[-1]["train_logit"] = 2.5  # a metric that loss_fn returns in a fork
    assert table_line(rows, 6).endswith("1:30  train_logit 2.5")


@pytest.mark.network
def test_two_epochs_of_mnist(mnist, here, capsys):
    """What the default recipe has reached after two epochs, whatever the machine."""
    train_main(["--epochs", "2", "--out", "a"])
    summary = json.loads(Path("a/summary.json").read_text())
    assert summary["parameters"] == 669_706
    assert 8950 <= summary["test_correct"] <= 9060
    assert json.loads(Path("a/config.json").read_text())["fingerprint"] == mnist.fingerprint
