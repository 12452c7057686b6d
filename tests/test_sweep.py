"""Sweeps: rows that are the single runs, go-on after any stop, refusals, grids and families."""

import dataclasses
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from mlp_jax import experiment, machine
from mlp_jax.console import Bar, accuracy_line
from mlp_jax.errors import UserError
from mlp_jax.records import rows as store
from mlp_jax.sweep import main as sweep_main
from mlp_jax.train import main as train_main
from mlp_jax.training import programs
from mlp_jax.training.config import Config
from mlp_jax.training.parallel import n_cores
from mlp_jax.training.run import STREAMS, crossed_seeds, make_run, used_streams

TINY = [
    *("--dataset", "kmnist", "--hidden", "16", "8"),
    *("--batch-size", "32", "--epochs", "3", "--learning-rate", "0.1"),
]


def run(small_dir, *flags):
    sweep_main([*TINY, "--data-dir", str(small_dir), "--quiet", *flags])


def rows(directory):
    """All that is stored but for the clock."""
    return store.read_runs(Path(directory)).drop_columns("seconds").to_pylist()


def test_a_row_is_the_run_of_the_train_command(small_dir, here):
    run(small_dir, "--seeds", "0:3", "--out", "s")
    for row in rows("s"):
        out = f"t{row['seed']}"
        train_main(
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
    assert len(store.row_files(Path("whole"))) < len(store.row_files(Path("pieces")))


def test_a_finished_sweep_trains_nothing(small_dir, here, monkeypatch):
    run(small_dir, "--seeds", "0:2", "--out", "s")
    before = {path: path.read_bytes() for path in Path("s").rglob("*") if path.is_file()}
    monkeypatch.setattr(machine, "fit", None)
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
    for path in store.row_files(Path("s")):
        assert set(pq.read_table(path)["vary"].to_pylist()) == {"all", "init", "order", "dropout"}


def test_a_grid_is_one_program(small_dir, here, small):
    programs._compile.cache_clear()
    rates = ["0.03", "0.1", "0.3"]
    run(small_dir, "--seeds", "0:2", "--learning-rate", *rates, "--chunk", "4", "--out", "grid")
    assert programs._compile.cache_info().misses == 1
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
    (path,) = store.row_files(Path("s"))
    about = json.loads(pq.read_schema(path).metadata[b"about"])["environment"]
    assert about["backend"] == "cpu"
    assert about["cores"] == n_cores()
    assert table["recipe"].to_pylist() == ["keras-sgd"] * 3
    assert all(seconds > 0 for seconds in table["seconds"].to_pylist())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 2", "s has epochs=3; you asked for epochs=2"),
        ("--hidden 16", r"s has hidden=\(16, 8\); you asked for hidden=\(16,\)"),
        ("--recipe short", "s has recipe=keras-sgd; you asked for recipe=short"),
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
        ("--seeds 4294967295:4294967297 --out s", "seeds must be from 0 to"),
        ("--seeds 0:4294967296 --out s", "at most 10,000,000 runs, not 4,294,967,296"),
        ("--vary al --out s", "invalid choice 'al'"),
        ("--learning-rate 0.1 -1 --out s", "learning rate must be positive"),
        ("--learning-rate 0.1 0.1000000001 --out s", "two learning rates are equal"),
        ("--dropout 0.2 0.2 --out s", "two values of a setting are equal"),
        ("--dropout 0 1 --out s", r"dropout must be in \[0, 1\), not 1"),
        ("--crossed 2 --vary init --out s", "crossed sets all seeds"),
        ("--crossed -1 --out s", "--crossed must be at least 0"),
        ("--learning-rate --out s", "Missing "),
        ("--vary --out s", "vary needs at least one value"),
        ("--data-dir= --out s", "--data-dir"),
        ("--shard 2/2 --out s", "--shard 2/2: shards are numbered from 0"),
        ("--shard 1of2 --out s", "--shard takes I/N"),
        ("--devices 0 --out s", "--devices must be at least 1"),
        ("--devices 3 --out s", "devices 3: only 2 here"),
        ("--lanes two --out s", "^--lanes: no type matching {auto}.INT"),
        ("--chunk 0 --out s", "--chunk must be at least 1"),
        ("--checkpoint-every -1 --out s", "--checkpoint-every must be at least 0"),
        ("--seed 0:3 --out s", "did you mean --seeds"),
        ("--seeds 0:3", "--out"),
        ("--out full", "full is not empty and contains no mlp_jax results"),
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
    flags = ["--seeds", "0:200", "--chunk", "2", "--data-dir", str(small_dir), "--quiet"]
    command = [sys.executable, "-m", "mlp_jax.sweep", *TINY, *flags, "--out"]
    subprocess.run([*command, "whole"], check=True)
    rng = np.random.default_rng(0)
    process = subprocess.Popen([*command, "killed"])
    while not store.row_files(Path("killed")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(rows("killed")) < 200
    subprocess.run([*command, "killed"], check=True)
    assert rows("whole") == rows("killed")


def test_crossed_blocks_have_two_seeds_of_each_used_stream(small_dir, here):
    run(small_dir, "--crossed", "2", "--epochs", "1", "--out", "s")
    stored = rows("s")
    names = [f"{stream}_seed" for stream in STREAMS]
    seeds = [tuple(row[name] for name in names) for row in stored]
    ones, threes = itertools.product((0, 1), repeat=3), itertools.product((2, 3), repeat=3)
    assert sorted(seeds) == [(*s, 0, 0) for s in ones] + [(*s, 2, 2) for s in threes]
    for row in stored:
        made = make_run(row["seed"], row["learning_rate"], row["vary"])
        assert made.seeds == tuple(row[name] for name in names)
        assert made.seed == row["seed"]
    losses = {seeds: row["test_loss"] for seeds, row in zip(seeds, stored, strict=True)}
    assert len(set(losses.values())) == 16
    run(small_dir, "--seeds", "0:2", "--epochs", "1", "--out", "t")
    assert [row["test_loss"] for row in rows("t")] == [losses[0, 0, 0, 0, 0], losses[1, 1, 1, 0, 0]]
    run(small_dir, "--crossed", "3", "--epochs", "1", "--out", "s")
    assert len(rows("s")) == 24


def test_crossed_blocks_can_be_added_and_dealt_out(small_dir, here):
    run(small_dir, "--crossed", "2", "--epochs", "1", "--out", "whole")
    run(small_dir, "--crossed", "1", "--epochs", "1", "--out", "s")
    for shard in ("1/2", "0/2"):
        run(small_dir, "--crossed", "2", "--epochs", "1", "--out", "s", "--shard", shard)
    assert rows("s") == rows("whole")
    assert len(rows("s")) == 16


def test_streams_are_crossed_where_they_are_used():
    plain = Config(dropout=0)
    assert used_streams(plain) == ("init", "order")
    assert crossed_seeds(2, plain) == [0, 1, 2, 3, 32, 33, 34, 35]
    every = dataclasses.replace(plain, vat=1.0, shift=1.0, examples="half")
    assert used_streams(every) == STREAMS
    assert crossed_seeds(2, every) == list(range(64))


def test_a_grid_has_a_sweep_for_each_combination(small_dir, here):
    flags = ["--seeds", "0:2", "--epochs", "1", "--dropout", "0", "0.5", "--out", "g"]
    run(small_dir, *flags, "--hidden", "16x8", "8", "--learning-rate", "0.1", "0.2")
    names = [f"hidden={net},dropout={rate}" for net in ("16x8", "8") for rate in ("0.0", "0.5")]
    assert sorted(path.name for path in Path("g").glob("[!.]*")) == names
    run(small_dir, "--seeds", "0:2", "--epochs", "1", "--dropout", "0.5", "--out", "alone")
    cell = [row for row in rows("g/hidden=16x8,dropout=0.5") if row["learning_rate"] == 0.1]
    assert cell == rows("alone")
    before = {path: path.read_bytes() for path in Path("g").rglob("*.parquet")}
    run(small_dir, *flags, "--hidden", "16x8", "8", "4", "--learning-rate", "0.1", "0.2")
    after = {path: path.read_bytes() for path in Path("g").rglob("*.parquet")}
    assert before.items() < after.items()
    with pytest.raises(UserError, match="g has a grid of sweeps"):
        run(small_dir, "--out", "g")
    with pytest.raises(UserError, match="alone has a sweep"):
        run(small_dir, "--dropout", "0", "0.5", "--out", "alone")


def test_a_copied_grid_can_be_resumed_without_its_locks(small_dir, here):
    """As git and most copying tools make it: they know nothing of files in use."""
    flags = ("--epochs", "1", "--dropout", "0", "0.5", "--out")
    run(small_dir, "--seeds", "0:2", *flags, "g")
    shutil.copytree("g", "copy", ignore=shutil.ignore_patterns(".*"))
    run(small_dir, "--seeds", "0:3", *flags, "copy")
    assert [row["seed"] for row in rows("copy/dropout=0.5")] == [0, 1, 2]
    with pytest.raises(UserError, match="copy has a grid of sweeps"):
        train_main(["--data-dir", str(small_dir), "--out", "copy"])
    assert not Path("copy/config.json").exists()


def test_a_stop_at_the_end_of_a_cell_ends_the_grid(small_dir, here, monkeypatch, capsys):
    def train_cell(*args):
        trained.append(os.kill(os.getpid(), signal.SIGTERM))
        return 0

    trained = []
    monkeypatch.setitem(sweep_main.__globals__, "train_cell", train_cell)
    with pytest.raises(SystemExit) as stop:
        run(small_dir, "--seeds", "0:2", "--epochs", "1", "--dropout", "0", "0.5", "--out", "g")
    assert (stop.value.code, len(trained)) == (143, 1)
    assert "1 of 2 sweeps finished; resume with: " in capsys.readouterr().err


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


def test_learning_rates_can_be_added(small_dir, here):
    run(small_dir, "--seeds", "0:2", "--out", "s")
    run(small_dir, "--seeds", "0:2", "--learning-rate", "0.1", "0.03", "--out", "s")
    assert [row["learning_rate"] for row in rows("s")] == [0.03, 0.03, 0.1, 0.1]
    assert len(store.row_files(Path("s"))) == 2


def test_a_grid_checks_all_its_sweeps_before_it_trains_one(small_dir, here):
    flags = ("--seeds", "0:2", "--epochs", "1", "--out", "g")
    run(small_dir, *flags, "--dropout", "0", "0.5")
    stored = Path("g/dropout=0.5")
    stored.rename("g/dropout=0.9")
    with pytest.raises(UserError, match=r"g/dropout=0.9 has dropout=0.5; you asked for .*=0.9"):
        run(small_dir, *flags, "--dropout", "0.3", "0.9")
    assert not Path("g/dropout=0.3").exists()


def test_a_stop_is_heard_after_the_epoch_of_a_group(small_dir, here, small):
    """Not after that of a whole chunk: the finished runs of the chunk are stored, and the rest
    resumes."""
    config = Config(hidden=(16, 8), batch_size=32, epochs=3, learning_rate=0.1)
    wanted = [make_run(seed, 0.1) for seed in range(8)]
    options = {"recipe": "custom", "chunk": 8, "devices": 2}
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > 4  # after each epoch and group: in the second group's first epoch

    with experiment.open_experiment(Path("s"), config, small, wanted, **options) as opened:
        seen = [len(epoch.progress.runs) for epoch in opened.train(wanted, stop)]
        assert len(opened.missing(wanted)) == 6
    assert seen == [2] * 4
    assert len(rows("s")) == 2
    assert len(list(Path("s/checkpoints").glob("*.npz"))) == 1
    with experiment.open_experiment(Path("s"), config, small, wanted, **options) as opened:
        resumed = [epoch.progress.epoch for epoch in opened.train(wanted)]
    assert resumed == [2, 3, 1, 2, 3, 1, 2, 3]
    with experiment.open_experiment(Path("t"), config, small, wanted, **options) as opened:
        list(opened.train(wanted))
    assert rows("s") == rows("t")
    assert not Path("s/checkpoints").exists()


def test_runs_resume_in_other_groups(small, here):
    config = Config(hidden=(16, 8), batch_size=32, epochs=4, learning_rate=0.1)
    runs = [make_run(seed, 0.1) for seed in range(5)]

    def train(out, runs, stop_after=99, **options):
        """The seeds and the epoch after each epoch; the last is saved if it is not the fourth."""
        seen = []
        options |= {"recipe": "custom"}
        with experiment.open_experiment(Path(out), config, small, runs, **options) as opened:
            for epoch in opened.train(runs, lambda: len(seen) >= stop_after):
                seen.append(([run.seed for run in epoch.progress.runs], epoch.progress.epoch))
        return seen

    train("whole", runs, devices=1)
    # with more seeds: 2 was alone
    assert train("s", runs[:3], 6, devices=2)[-1] == ([2], 2)
    assert train("s", runs, devices=2)[:4] == [([2], 3), ([2], 4), ([3, 4], 1), ([3, 4], 2)]
    assert rows("s") == rows("whole")
    # on fewer devices, and as shards
    assert train("t", runs, 2, devices=2)[-1] == ([0, 1], 2)
    assert train("t", runs, 3, devices=1) == [([0], 3), ([0], 4), ([1], 3)]
    shard = {"shard": (1, 2), "devices": 2}
    assert train("t", runs[1::2], 3, **shard) == [([1], 4), ([3], 1), ([3], 2)]
    assert train("t", runs, devices=2)[:3] == [([3], 3), ([3], 4), ([2, 4], 1)]
    assert rows("t") == rows("whole")
    assert not Path("s/checkpoints").exists()
    assert not Path("t/checkpoints").exists()
    # for their weights, while others are trained without
    assert train("s", runs, 2, devices=2, keep_weights=True)[-1] == ([0, 1], 2)
    train("s", [*runs, make_run(5, 0.1)], devices=2)
    assert train("s", runs, devices=2, keep_weights=True)[0] == ([0, 1], 3)
    assert not Path("s/checkpoints").exists()
    # also beside a new run, which is finished without
    shutil.rmtree("s/weights")
    more = [*runs, *(make_run(seed, 0.1) for seed in (5, 6, 7))]
    assert train("s", [runs[0], more[6]], 2, devices=2, keep_weights=True)[-1] == ([0, 6], 2)
    assert train("s", more[1:], devices=2)[0] == ([6], 3)
    assert train("s", runs, devices=1, keep_weights=True)[0] == ([0], 3)


def test_seconds_are_those_that_passed(small_dir, here):
    began = time.perf_counter()
    run(small_dir, "--seeds", "0:6", "--devices", "1", "--out", "s")
    passed = time.perf_counter() - began
    seconds = store.read_runs(Path("s"))["seconds"].to_pylist()
    assert len(set(seconds)) == 6
    assert 0 < sum(seconds) < passed


def test_a_sweep_on_validation_images_goes_on(small_dir, here):
    run(small_dir, "--split", "validation", "--seeds", "0:2", "--out", "s")
    with pytest.raises(UserError, match="s has split=validation; you asked for split=test"):
        run(small_dir, "--seeds", "0:3", "--out", "s")
    run(small_dir, "--split", "validation", "--seeds", "0:3", "--out", "s")
    assert len(rows("s")) == 3


def test_the_bar_counts_the_epochs_before_a_resume(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    config = Config(epochs=50)
    metadata = SimpleNamespace(config=config)
    opened = SimpleNamespace(finished={}, metadata=metadata, compile_seconds=0.0)
    bar = Bar(opened, n_runs=2, n_missing=2, quiet=False)
    for runs in (("a",), ("b",)):
        for epoch in range(41, 51):
            progress = SimpleNamespace(runs=runs, epoch=epoch)
            bar.update(SimpleNamespace(progress=progress, n_new=1, nodes=1))
            finished = (runs == ("b",)) + (epoch == 50)
            assert f"{finished} of 2 runs" in bar._bar.desc
        assert bar._bar.n == 50 * finished
    assert bar._trained == 20


def test_progress_line():
    def row(correct, loss=1.0):
        return {"test_correct": correct, "finite": np.isfinite(loss)}

    finished = {make_run(seed, 0.1): row(right) for seed, right in enumerate((91, 93, 95))}
    finished |= {make_run(1, 0.1, "order"): row(9), make_run(2, 0.1, "order"): row(10, np.nan)}
    assert accuracy_line(finished, 100) == (
        "all at 0.1: 3 runs, mean 93.000 %, SD 2.000 points;"
        " order at 0.1: 2 runs, mean 9.000 %, 1 diverged"
    )


@pytest.mark.parametrize(
    ("wanted", "epochs", "width", "size"),
    [("auto", 50, 2, 2), ("auto", 20, 2, 6), ("auto", 1, 2, 100), (3, 1, 2, 4), (1, 50, 256, 256)],
)
def test_chunk_size(wanted, epochs, width, size):
    assert experiment.chunk_size(wanted, epochs, width) == size
