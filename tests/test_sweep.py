"""Sweeps: rows that are the single runs, go-on after any stop, refusals, grids and families."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mlp_jax import sweep, train
from mlp_jax.records import rows as store
from mlp_jax.training import fit as fit_module
from mlp_jax.training.config import UserError

TINY = [
    *("--dataset", "kmnist", "--hidden", "16", "8"),
    *("--batch-size", "32", "--epochs", "3", "--learning-rate", "0.1"),
]


def run(small_dir, *flags):
    sweep.main([*TINY, "--data-dir", str(small_dir), "--quiet", *flags])


def rows(directory):
    """All that is stored but for the clock."""
    return store.read_runs(Path(directory)).drop_columns("seconds").to_pylist()


def test_a_row_is_the_run_of_the_train_command(small_dir, here):
    run(small_dir, "--seeds", "0:3", "--out", "s")
    for row in rows("s"):
        out = f"t{row['seed']}"
        train.main(
            [
                *TINY,
                "--data-dir",
                str(small_dir),
                "--quiet",
                "--out",
                out,
                "--seed",
                str(row["seed"]),
            ]
        )
        epochs = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
        for name in ("train_loss", "test_loss", "test_correct"):
            assert row[f"{name}_by_epoch"] == [epoch[name] for epoch in epochs]
            assert row[name] == epochs[-1][name]


def test_chunks_order_and_stops_change_nothing(small_dir, here):
    run(small_dir, "--seeds", "0:5", "--out", "whole")
    run(small_dir, "--seeds", "4,2", "--chunk", "1", "--out", "pieces")
    run(small_dir, "--seeds", "0:5", "--chunk", "2", "--devices", "1", "--out", "pieces")
    assert rows("whole") == rows("pieces")
    assert [row["seed"] for row in rows("whole")] == [0, 1, 2, 3, 4]
    assert len(store.chunk_paths(Path("whole"))) < len(store.chunk_paths(Path("pieces")))


def test_a_finished_sweep_trains_nothing(small_dir, here, monkeypatch):
    run(small_dir, "--seeds", "0:2", "--out", "s")
    before = {path: path.read_bytes() for path in Path("s").rglob("*") if path.is_file()}
    monkeypatch.setattr(fit_module, "fit", None)
    run(small_dir, "--seeds", "0:2", "--out", "s")
    assert before == {path: path.read_bytes() for path in Path("s").rglob("*") if path.is_file()}


def test_families_are_interleaved_and_move_one_stream(small_dir, here, small):
    run(
        small_dir,
        "--seeds",
        "0:3",
        "--vary",
        "all",
        "init",
        "order",
        "dropout",
        "--chunk",
        "4",
        "--out",
        "s",
    )
    stored = rows("s")
    assert len(stored) == 12
    # seed 0 is the seed that is held: all four families share that run
    losses = {(row["vary"], row["seed"]): row["test_loss"] for row in stored}
    assert len({losses[vary, 0] for vary in ("all", "init", "order", "dropout")}) == 1
    assert len(set(losses.values())) == 9
    for path in store.chunk_paths(Path("s")):
        assert set(pq.read_table(path)["vary"].to_pylist()) == {"all", "init", "order", "dropout"}


def test_a_grid_is_one_program(small_dir, here, small):
    fit_module.compile_programs.cache_clear()
    rates = ["0.03", "0.1", "0.3"]
    run(small_dir, "--seeds", "0:2", "--learning-rate", *rates, "--chunk", "4", "--out", "grid")
    assert fit_module.compile_programs.cache_info().misses == 1
    stored = rows("grid")
    assert sorted({row["learning_rate"] for row in stored}) == [0.03, 0.1, 0.3]
    run(small_dir, "--seeds", "0:2", "--learning-rate", "0.3", "--out", "alone")
    assert [row for row in stored if row["learning_rate"] == 0.3] == rows("alone")


def test_what_is_stored_reads_as_it_is(small_dir, here, small):
    run(small_dir, "--seeds", "0:3", "--out", "s")
    table = store.read_runs(Path("s"))
    predictions = store.predictions(table["predictions"])
    assert predictions.shape == (3, 130)
    correct = (predictions == small.test.labels).sum(1)
    np.testing.assert_array_equal(correct, table["test_correct"].to_numpy())
    (path,) = store.chunk_paths(Path("s"))
    about = json.loads(pq.read_schema(path).metadata[b"about"])["environment"]
    assert about["backend"] == "cpu"
    assert about["cores"] == os.cpu_count()
    assert table["recipe"].to_pylist() == ["keras-sgd"] * 3
    assert all(seconds > 0 for seconds in table["seconds"].to_pylist())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 2", "s holds results of epochs 3, not 2; name another --out"),
        ("--hidden 16", r"s holds results of hidden \[16, 8\], not \[16\]"),
        ("--recipe short", "s holds results of recipe keras-sgd, not short"),
        ("--learning-rate 0.1 0.2", r"learning rate \[0.1\], not \[0.1, 0.2\]"),
    ],
)
def test_another_config_is_refused(flags, message, small_dir, here):
    run(small_dir, "--seeds", "0:1", "--out", "s")
    before = rows("s")
    # --recipe changes defaults, all of which TINY sets but the optimizer: the recipe comes first
    with pytest.raises(UserError, match=message):
        run(small_dir, "--seeds", "0:2", "--out", "s", *flags.split())
    assert rows("s") == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seeds 5:5 --out s", "--seeds 5:5 names no seed"),
        ("--seeds 5-7 --out s", "--seeds takes first:end or a list"),
        ("--seeds 0:4294967297 --out s", "a seed must lie in 0"),
        ("--seeds 0:4294967296 --out s", "at most 10,000,000 runs, not 4,294,967,296"),
        ("--vary al --out s", "invalid choice 'al'"),
        ("--learning-rate 0.1 -1 --out s", "learning rate must be positive"),
        ("--learning-rate 0.1 0.1 --out s", "different"),
        ("--devices 0 --out s", "--devices must be at least 1"),
        ("--devices 3 --out s", "--devices 3: there are 2"),
        ("--lanes two --out s", "^--lanes: no type matching {auto}.INT"),
        ("--chunk 0 --out s", "--chunk must be at least 1"),
        ("--checkpoint-every -1 --out s", "--checkpoint-every must be at least 0"),
        ("--seed 0:3 --out s", "did you mean --seeds"),
        ("--seeds 0:3", "--out"),
        ("--out full", "full is not empty, and holds no results"),
        ("--out full/mine.txt", "mine.txt is not a directory"),
    ],
)
def test_bad_input_is_one_line_and_creates_nothing(flags, message, small_dir, here):
    Path("full").mkdir()
    Path("full/mine.txt").touch()
    with pytest.raises(UserError, match=message) as caught:
        run(small_dir, *flags.split())
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in here.rglob("*")) == ["full", "mine.txt"]


def test_killed_anywhere_and_rerun_gives_the_same_rows(small_dir, here):
    flags = ["--seeds", "0:40", "--chunk", "2", "--data-dir", str(small_dir), "--quiet"]
    command = [sys.executable, "-m", "mlp_jax.sweep", *TINY, *flags, "--out"]
    subprocess.run([*command, "whole"], check=True)
    rng = np.random.default_rng(0)
    process = subprocess.Popen([*command, "killed"])
    while not store.chunk_paths(Path("killed")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(rows("killed")) < 40
    subprocess.run([*command, "killed"], check=True)
    assert rows("whole") == rows("killed")


@pytest.mark.network
def test_a_row_of_mnist_is_the_run_of_the_train_command(mnist, here):
    """In processes of their own, as users run them: two devices there, one device here."""
    flags = ["--epochs", "1", "--quiet", "--out"]
    subprocess.run(
        [sys.executable, "-m", "mlp_jax.sweep", *flags, "s", "--seeds", "0:3"], check=True
    )
    for row in rows("s"):
        out = f"t{row['seed']}"
        command = [sys.executable, "-m", "mlp_jax.train", *flags, out, "--seed", str(row["seed"])]
        subprocess.run(command, check=True)
        (epoch,) = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
        for name in ("train_loss", "test_loss", "test_correct"):
            assert row[name] == epoch[name]


def test_progress_line():
    done = {("all", 0.1, 0): 91, ("all", 0.1, 1): 93, ("all", 0.1, 2): 95, ("order", 0.1, 1): 9}
    line = sweep.progress([("all", 0.1, 1), ("order", 0.1, 1), ("all", 0.1, 2)], done)
    assert (
        line == "all at 0.1: 3 runs, mean 93.0 right, SD 2.0; order at 0.1: 1 runs, mean 9.0 right"
    )


@pytest.mark.parametrize(
    ("wanted", "epochs", "width", "size"),
    [
        ("auto", 50, 2, 2),
        ("auto", 20, 2, 6),
        ("auto", 1, 2, 100),
        (3, 1, 2, 4),
        (1, 50, 256, 256),
    ],
)
def test_chunk_size(wanted, epochs, width, size):
    assert sweep.chunk_size(wanted, epochs, width) == size
