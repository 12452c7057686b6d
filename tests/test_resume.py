"""What is stopped and gone on with ends at the bytes of what was left alone."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mlp_jax import sweep, train
from mlp_jax.cli import StopSignals
from mlp_jax.records import rows as store
from mlp_jax.records.checkpoint import Checkpoints
from mlp_jax.training.config import UserError, stream_seeds
from mlp_jax.training.fit import fit, make_runs
from mlp_jax.training.parallel import Placement

TINY = [
    *("--dataset", "kmnist", "--hidden", "16", "8", "--quiet"),
    *("--batch-size", "32", "--learning-rate", "0.1"),
]
# seed 3 on the images of conftest.py, by epoch; other machines differ in the last digits
GOLDEN_CORRECT = [77, 94, 129, 130, 130, 130]
GOLDEN_TRAIN_LOSS = [1.2723594, 0.98230916, 0.7114249, 0.5765546, 0.46556246, 0.38138413]


def train_fleet(config, dataset, *, lanes=1, n_devices=2, stop_after=None, **options):
    """Three seeds, ended after `stop_after` epochs as by a signal."""
    trained = []
    return fit(
        config,
        dataset,
        make_runs([stream_seeds(seed) for seed in (3, 4, 5)], [config.learning_rate] * 3),
        placement=Placement(tuple(jax.devices()[:n_devices]), lanes),
        on_epoch=lambda epoch, metrics, seconds: trained.append(epoch),
        stop=lambda: len(trained) == stop_after,
        **options,
    ), trained


def left(result):
    """All bytes of a training but those of the clock."""
    return [leaf.tobytes() for leaf in jax.tree.leaves(result.progress._replace(seconds=None))]


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "rmsprop", "adam"])
def test_a_resumed_fleet_is_the_unbroken_one_bit_for_bit(optimizer, config, small, tmp_path):
    config = dataclasses.replace(config, optimizer=optimizer, learning_rate=0.01, epochs=5)
    whole, _ = train_fleet(config, small)
    for stop_after in (1, 3, 4):
        checkpoints = Checkpoints(tmp_path / str(stop_after), {}, every=0)
        part, _ = train_fleet(config, small, stop_after=stop_after)
        assert part.epochs == stop_after
        checkpoints.save(part.epochs, part.progress)
        checkpoints.close()
        # on another number of devices too
        rest, epochs = train_fleet(config, small, n_devices=1, checkpoints=checkpoints)
        checkpoints.close()
        assert epochs == [1, 2, 3, 4, 5]
        assert left(rest) == left(whole)
        np.testing.assert_array_equal(rest.seconds[:stop_after], part.seconds[:stop_after])


def test_a_fleet_saves_as_it_goes_and_keeps_the_newest(config, small, tmp_path):
    config = dataclasses.replace(config, epochs=7)
    checkpoints = Checkpoints(tmp_path, {}, every=2)
    whole, _ = train_fleet(config, small, checkpoints=checkpoints)
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["6"]
    epoch, progress = checkpoints.restore(whole.progress)
    checkpoints.close()
    assert epoch == 6
    np.testing.assert_array_equal(
        progress.history.train_loss[:, :6], whole.history.train_loss[:, :6]
    )
    assert not progress.history.train_loss[:, 6].any()


@pytest.fixture
def saved(tmp_path, config, small):
    part, _ = train_fleet(config, small, stop_after=1)
    checkpoints = Checkpoints(tmp_path / "c", {"batch_size": 32}, every=0)
    checkpoints.save(1, part.progress)
    checkpoints.close()
    return checkpoints, part.progress


def test_a_checkpoint_of_other_settings_is_refused(saved):
    checkpoints, progress = saved
    other = Checkpoints(checkpoints.directory, {"batch_size": 64}, every=0)
    with pytest.raises(UserError, match="c holds a checkpoint with batch size 32, not 64"):
        other.restore(progress)
    other.close()
    assert checkpoints.restore(progress)[0] == 1
    checkpoints.close()


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_checkpoint_is_set_aside(seed, saved, capsys):
    """Each array is hashed; of the rest orbax finds what it needs, and needs not all it writes."""
    checkpoints, progress = saved
    rng = np.random.default_rng(seed)
    files = sorted(path for path in checkpoints.directory.rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    path = largest if seed % 2 else files[seed // 2 % len(files)]
    content = bytearray(path.read_bytes())
    if seed % 3 and content:
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    else:
        content = content[: len(content) // 2]
    path.write_bytes(content)
    found = checkpoints.restore(progress)
    checkpoints.close()
    said = capsys.readouterr().err
    if found:
        epoch, restored = found
        assert epoch == 1
        assert said == ""
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(progress), strict=True):
            np.testing.assert_array_equal(a, b)
    else:
        assert "c is damaged (" in said
        assert "set aside as _c.corrupt, made anew" in said
        assert not checkpoints.directory.exists()
    assert found is None or path != largest


def metrics(directory):
    lines = Path(directory, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def rows(directory):
    return store.read_runs(Path(directory)).drop_columns("seconds").to_pylist()


def stopping(monkeypatch, after):
    """The fronts see a SIGTERM after so many epochs."""
    asked = []

    def requested(self):
        asked.append(1)
        return signal.SIGTERM if len(asked) > after else 0

    monkeypatch.setattr(
        StopSignals, "requested", property(requested, lambda self, value: None), raising=False
    )


def test_train_is_stopped_and_resumed(small_dir, here, monkeypatch, capsys):
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "6", "--seed", "3"]
    train.main([*flags, "--out", "whole"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        stopping(patch, 4)
        train.main([*flags, "--out", "a b"])
    assert left.value.code == 128 + signal.SIGTERM
    said = capsys.readouterr().err.splitlines()
    line = "SIGTERM: 4 of 6 epochs are saved; go on with: python -m mlp_jax.train "
    assert said[-1].startswith(line)
    assert said[-1].endswith("--out 'a b' --resume")
    assert len(metrics("a b")) == 4
    assert not Path("a b/summary.json").exists()
    again = shlex.split(said[-1].partition("mlp_jax.train ")[2])
    with pytest.raises(UserError, match="a b holds results: add --resume"):
        train.main([*flags, "--out", "a b"])
    with pytest.raises(UserError, match="a b holds results of batch size 32, not 16; name another"):
        train.main([*flags, "--out", "a b", "--resume", "--batch-size", "16"])
    with pytest.raises(UserError, match="a b holds results of seed 3, not 4"):
        train.main([*flags, "--out", "a b", "--resume", "--seed", "4"])
    train.main(again)
    assert metrics("a b") == metrics("whole")
    assert [row["test_correct"] for row in metrics("a b")] == GOLDEN_CORRECT
    losses = [row["train_loss"] for row in metrics("a b")]
    np.testing.assert_allclose(losses, GOLDEN_TRAIN_LOSS, rtol=1e-5)
    before = Path("a b/metrics.jsonl").read_bytes()
    train.main([*flags, "--out", "a b", "--resume"])  # trains nothing
    assert Path("a b/metrics.jsonl").read_bytes() == before


def test_the_line_on_how_to_go_on_overwrites_nothing(small_dir, here, monkeypatch, capsys):
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "2", "--out", "a", "--overwrite"]
    train.main(flags)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stopping(patch, 1)
        train.main(flags)
    said = capsys.readouterr().err.splitlines()[-1]
    train.main(shlex.split(said.partition("mlp_jax.train ")[2]))
    assert len(metrics("a")) == 2


def test_a_killed_overwrite_can_be_repeated(small_dir, here, monkeypatch):
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "1", "--out", "a"]
    train.main(flags)
    # as if it were killed when all but the last of the old files were gone
    monkeypatch.setattr(Path, "unlink", unlinks_all_but("config.json"))
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags, "--overwrite"])
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert [path.name for path in Path("a").glob("[!.]*")] == ["config.json"]
    train.main([*flags, "--overwrite"])
    assert len(metrics("a")) == 1


def unlinks_all_but(name, unlink=Path.unlink):
    def killed(self, missing_ok=False):
        if self.name == name:
            raise KeyboardInterrupt
        unlink(self, missing_ok=missing_ok)

    return killed


def test_a_sweep_is_no_place_for_a_run(small_dir, here):
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "1", "--out", "s"]
    sweep.main([*flags, "--seeds", "0:1"])
    before = rows("s")
    for more in ("--overwrite", "--resume"):
        with pytest.raises(UserError, match="s holds a sweep: name another --out"):
            train.main([*flags, more])
    assert rows("s") == before


def test_train_resumes_what_is_not_there_yet(small_dir, here):
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "1", "--out", "a", "--resume"]
    train.main(flags)
    assert len(metrics("a")) == 1


def test_train_starts_over_from_a_damaged_checkpoint(small_dir, here, monkeypatch, capsys):
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "4"]
    train.main([*flags, "--out", "whole"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stopping(patch, 2)
        train.main([*flags, "--out", "a"])
    for path in Path("a/checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:7])
    Path("a/config.json").write_bytes(b"{")
    train.main([*flags, "--out", "a", "--resume"])
    said = capsys.readouterr().err
    assert "a/checkpoints is damaged" in said
    assert "a/config.json is damaged" in said
    assert metrics("a") == metrics("whole")


def test_a_sweep_goes_on_in_the_middle_of_a_chunk(small_dir, here, monkeypatch, capsys):
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "4", "--seeds", "0:5"]
    flags += ["--vary", "all", "init", "--chunk", "4"]
    sweep.main([*flags, "--out", "whole"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        stopping(patch, 7)  # the fourth of the first chunk's checks ends nothing; then 3 epochs
        sweep.main([*flags, "--out", "s"])
    assert left.value.code == 128 + signal.SIGTERM
    line = "SIGTERM: 4 of 10 runs are whole, 4 after epoch 3, all saved; go on with: "
    assert line in capsys.readouterr().err
    trained = []
    monkeypatch.setattr("mlp_jax.records.checkpoint.Checkpoints.restore", watch(trained))
    sweep.main([*flags, "--out", "s"])
    assert trained == [3, None]
    assert rows("s") == rows("whole")
    assert not Path("s/checkpoints").exists()


def watch(epochs, restore=Checkpoints.restore):
    """Checkpoints.restore that notes the epochs it found."""

    def watched(self, like):
        found = restore(self, like)
        epochs.append(found and found[0])
        return found

    return watched


def test_a_sweep_redoes_a_damaged_chunk(small_dir, here, capsys):
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "1", "--seeds", "0:6"]
    sweep.main([*flags, "--chunk", "2", "--out", "s"])
    before = rows("s")
    path = store.chunk_paths(Path("s"))[1]
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes([content[100] ^ 4]) + content[101:])
    sweep.main([*flags, "--chunk", "2", "--out", "s"])
    assert capsys.readouterr().err.count("is damaged (its SHA-256 is another): set aside as") == 1
    assert rows("s") == before


def test_the_second_signal_ends_a_process_that_cannot_listen():
    """Its main thread is in C, as it is in a compiled program, and runs no handler for hours."""
    code = (
        "import hashlib, signal\nfrom mlp_jax.cli import StopSignals\n"
        # which a shell's background jobs inherit as ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with StopSignals():\n"
        "    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'a', b'b', 2**31 - 1)\n"
    )
    for number in StopSignals.NUMBERS:
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True)
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        said = process.stderr.readline() + process.stderr.readline()
        assert "stopping after this epoch; once more to leave now" in said
        assert process.poll() is None
        process.send_signal(number)
        process.communicate(timeout=10)
        assert process.returncode == 128 + number


def test_signals_are_as_before_after_the_block():
    before = [signal.getsignal(number) for number in StopSignals.NUMBERS]
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.requested == signal.SIGTERM
    assert [signal.getsignal(number) for number in StopSignals.NUMBERS] == before
    assert not [t for t in threading.enumerate() if "_listen" in t.name]
