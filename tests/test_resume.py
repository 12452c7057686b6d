"""A training that is stopped and resumed ends with the bytes of one that never stopped."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mlp_jax import experiment, machine
from mlp_jax.cli import StopSignals, command_line
from mlp_jax.errors import UserError
from mlp_jax.files import load_arrays
from mlp_jax.records import rows as store
from mlp_jax.records.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from mlp_jax.records.provenance import Metadata, describe_environment
from mlp_jax.sweep import main as sweep_main
from mlp_jax.train import main as train_main
from mlp_jax.training.fit import fit
from mlp_jax.training.parallel import Placement
from mlp_jax.training.run import make_run

TINY = [
    *("--dataset", "kmnist", "--hidden", "16", "8", "--quiet"),
    *("--batch-size", "32", "--learning-rate", "0.1"),
]
# seed 3 on the images of conftest.py, by epoch; other machines differ in the last digits
GOLDEN_CORRECT = [77, 94, 129, 130, 130, 130]
GOLDEN_TRAIN_LOSS = [1.2723594, 0.98230916, 0.7114249, 0.5765546, 0.46556246, 0.38138413]


RUNS = tuple(make_run(seed, 0.01) for seed in (3, 4, 5))


def train(config, dataset, *, n_devices=2, epochs=None, start=None):
    """Three seeds after some epochs, on the host."""
    placement = Placement(tuple(jax.devices()[:n_devices]), 1)
    for progress in fit(config, dataset, RUNS, placement=placement, start=start):
        if progress.epoch == (epochs or config.epochs):
            return progress.snapshot()


def content(snapshot):
    arrays = (snapshot.states, snapshot.history, snapshot.predictions)
    return [leaf.tobytes() for leaf in jax.tree.leaves(arrays)]


def metadata(config, **changes):
    here = describe_environment(jax.devices())
    config = dataclasses.replace(config, dataset="kmnist")
    return Metadata("custom", config, "0" * 64, here)._replace(**changes)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "rmsprop", "adam"])
def test_a_resumed_training_is_the_unbroken_one_bit_for_bit(optimizer, config, small, tmp_path):
    config = dataclasses.replace(config, optimizer=optimizer, learning_rate=0.01, epochs=5)
    unbroken, about = train(config, small), metadata(config, fingerprint=small.fingerprint)
    for epochs in (1, 3, 4):
        path = tmp_path / f"{epochs}.npz"
        save_checkpoint(path, train(config, small, epochs=epochs), [1.5] * epochs, about, False)
        start, seconds = load_checkpoint(path, RUNS, about)
        assert (start.epoch, seconds) == (epochs, [1.5] * epochs)
        assert load_checkpoint(path, RUNS[1:2], about)[1] == [0.5] * epochs  # its share
        # on another number of devices too
        assert content(train(config, small, n_devices=1, start=start)) == content(unbroken)


@pytest.fixture
def saved(tmp_path, config, small):
    path, about = tmp_path / "c.npz", metadata(config)
    save_checkpoint(path, train(config, small, epochs=1), [1.0], about, False)
    return path, about


def test_a_checkpoint_of_other_settings_is_refused(saved, config):
    path, about = saved
    other = metadata(dataclasses.replace(config, batch_size=64))
    with pytest.raises(UserError, match=r"c\.npz has batch_size=32; you asked for batch_size=64"):
        load_checkpoint(path, RUNS, other)
    assert load_checkpoint(path, RUNS, about)[0].epoch == 1


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_checkpoint_is_quarantined(seed, saved, caplog):
    path, about = saved
    unharmed = load_checkpoint(path, RUNS, about)
    rng = np.random.default_rng(seed)
    damaged = bytearray(path.read_bytes())
    if seed % 3:
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
    else:
        damaged = damaged[: rng.integers(len(damaged))]
    path.write_bytes(damaged)
    found = load_checkpoint(path, RUNS, about)
    if found:  # the zip's own bookkeeping has bytes that nothing depends on
        assert content(found[0]) == content(unharmed[0])
        assert (found[0].epoch, found[1]) == (1, [1.0])
    else:
        assert "c.npz is damaged (" in caplog.text
        assert "renamed to _c.npz.corrupt" in caplog.text
        assert [each.name for each in path.parent.iterdir()] == ["_c.npz.corrupt"]


def metrics(directory):
    lines = Path(directory, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def rows(directory):
    return store.read_runs(Path(directory)).drop_columns("seconds").to_pylist()


def stopping(monkeypatch, after):
    """The commands see a SIGTERM when they ask for the n-th time, once an epoch."""
    asked = []

    def requested(self):
        asked.append(1)
        return signal.SIGTERM if len(asked) >= after else 0

    monkeypatch.setattr(
        StopSignals, "requested", property(requested, lambda self, value: None), raising=False
    )


@pytest.mark.parametrize("activated", [True, False])
def test_the_command_that_resumes_runs_as_it_is_printed(monkeypatch, activated):
    """Its interpreter is named as it was called, unless `python` is that one."""
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", "-m", "mlp_jax.train"])
    found = sys.executable if activated else "/usr/bin/python"
    monkeypatch.setattr("shutil.which", {"python": found}.get)
    python = "python" if activated else ".venv/bin/python"
    line = command_line("python -m mlp_jax.train", ["--out", "a b", "--overwrite"], "--resume")
    assert line == f"{python} -m mlp_jax.train --out 'a b' --resume"


def test_train_is_stopped_and_resumed(small_dir, here, monkeypatch, capsys):
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "6", "--seed", "3"]
    train_main([*flags, "--out", "whole"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        stopping(patch, 4)
        train_main([*flags, "--out", "a b"])
    assert left.value.code == 128 + signal.SIGTERM
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("SIGTERM: 4 of 6 epochs saved; resume with: ")
    assert said[-1].endswith("--out 'a b' --resume")
    assert len(metrics("a b")) == 4
    assert not Path("a b/summary.json").exists()
    again = shlex.split(said[-1].partition("mlp_jax.train ")[2])
    with pytest.raises(UserError, match="a b has results: add --resume"):
        train_main([*flags, "--out", "a b"])
    with pytest.raises(UserError, match="a b has batch_size=32; you asked for batch_size=16"):
        train_main([*flags, "--out", "a b", "--resume", "--batch-size", "16"])
    with pytest.raises(UserError, match="a b has seed=3; you asked for seed=4"):
        train_main([*flags, "--out", "a b", "--resume", "--seed", "4"])
    train_main(again)
    assert metrics("a b") == metrics("whole")
    assert [row["test_correct"] for row in metrics("a b")] == GOLDEN_CORRECT
    losses = [row["train_loss"] for row in metrics("a b")]
    np.testing.assert_allclose(losses, GOLDEN_TRAIN_LOSS, rtol=1e-5)
    before = Path("a b/metrics.jsonl").read_bytes()
    train_main([*flags, "--out", "a b", "--resume"])  # trains nothing
    assert Path("a b/metrics.jsonl").read_bytes() == before


def test_the_line_that_resumes_overwrites_nothing(small_dir, here, monkeypatch, capsys):
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "2", "--out", "a", "--overwrite"]
    train_main(flags)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stopping(patch, 1)
        train_main(flags)
    said = capsys.readouterr().err.splitlines()[-1]
    train_main(shlex.split(said.partition("mlp_jax.train ")[2]))
    assert len(metrics("a")) == 2


def test_an_overwrite_that_cannot_train_leaves_what_is_there(small_dir, here, monkeypatch):
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "2", "--out", "a"]
    train_main(flags)
    before = {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file()}

    def run_out_of_memory(*_, **__):
        raise MemoryError
        yield

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(machine, "fit", run_out_of_memory)
        train_main([*flags, "--overwrite", "--tensorboard", "--hidden", "17", "8"])
    assert {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file()} == before
    train_main([*flags, "--overwrite", "--hidden", "17", "8"])
    assert json.loads(Path("a/config.json").read_bytes())["config"]["hidden"] == [17, 8]
    (row,) = rows("a")
    assert row["test_correct"] == metrics("a")[-1]["test_correct"]


def test_a_killed_overwrite_can_be_repeated(small_dir, here, monkeypatch):
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "1", "--out", "a"]
    train_main(flags)
    # as if it were killed when all but the last of the old files were gone
    monkeypatch.setattr(Path, "unlink", unlinks_all_but("config.json"))
    with pytest.raises(KeyboardInterrupt):
        train_main([*flags, "--overwrite"])
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert [path.name for path in Path("a").glob("[!.]*") if path.is_file()] == ["config.json"]
    train_main([*flags, "--overwrite"])
    assert len(metrics("a")) == 1


def unlinks_all_but(name, unlink=Path.unlink):
    def killed(self, missing_ok=False):
        if self.name == name:
            raise KeyboardInterrupt
        unlink(self, missing_ok=missing_ok)

    return killed


def test_a_sweep_is_no_place_for_a_run(small_dir, here):
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "1", "--out", "s"]
    sweep_main([*flags, "--seeds", "0:1"])
    before = rows("s")
    for more in ("--overwrite", "--resume"):
        with pytest.raises(UserError, match="s has a sweep: name another --out"):
            train_main([*flags, more])
    assert rows("s") == before


def test_train_resumes_what_is_not_there_yet(small_dir, here):
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "1", "--out", "a", "--resume"]
    train_main(flags)
    assert len(metrics("a")) == 1


def test_train_starts_over_from_a_damaged_checkpoint(small_dir, here, monkeypatch, caplog):
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "4"]
    train_main([*flags, "--out", "whole"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stopping(patch, 2)
        train_main([*flags, "--out", "a"])
    (path,) = Path("a/checkpoints").iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    written = Path("a/config.json").read_bytes()
    Path("a/config.json").write_bytes(b"{")  # then nothing shows whose the rest is
    with pytest.raises(
        UserError, match=r"a/config\.json was not written by mlp_jax, or is damaged"
    ):
        train_main([*flags, "--out", "a", "--resume"])
    Path("a/config.json").write_bytes(written)
    train_main([*flags, "--out", "a", "--resume"])
    assert f"{path} is damaged" in caplog.text
    assert metrics("a") == metrics("whole")


def test_a_sweep_resumes_in_the_middle_of_a_run(small_dir, here, monkeypatch, capsys):
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "4", "--seeds", "0:5"]
    flags += ["--vary", "all", "init", "--chunk", "4"]
    sweep_main([*flags, "--out", "whole"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        stopping(patch, 12)  # two groups of 4 epochs, asked after each group and chunk, too
        sweep_main([*flags, "--out", "s"])
    assert left.value.code == 128 + signal.SIGTERM
    line = "SIGTERM: 4 of 10 runs finished, the epochs of the others saved; resume with: "
    assert line in capsys.readouterr().err
    found = []
    monkeypatch.setattr(experiment, "load_checkpoint", watch(found))
    sweep_main([*flags, "--out", "s"])
    assert found == [1, None, None]
    assert rows("s") == rows("whole")
    assert not Path("s/checkpoints").exists()


def test_a_checkpoint_is_found_by_its_runs(small_dir, here, monkeypatch):
    """Earlier code derived its name from the fields of a class."""
    assert checkpoint_path(Path("a"), RUNS) == Path("a/checkpoints/1ecce5968d74e6fb.npz")
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "4", "--seeds", "0:2"]
    sweep_main([*flags, "--out", "whole"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stopping(patch, 2)
        sweep_main([*flags, "--out", "s"])
    (path,) = Path("s/checkpoints").iterdir()
    theirs = {"backup.npz": path.read_bytes(), "0" * 16 + ".npz": b"damaged"}
    for name, content in theirs.items():
        path.with_name(name).write_bytes(content)
    path.rename(path.with_name("f" * 16 + ".npz"))
    found = []
    monkeypatch.setattr(experiment, "load_checkpoint", watch(found))
    sweep_main([*flags, "--out", "s"])
    assert found == [2]
    assert rows("s") == rows("whole")
    assert {path.name: path.read_bytes() for path in path.parent.iterdir()} == theirs


def test_a_damaged_checkpoint_costs_only_the_epochs_since_an_earlier_one(
    small_dir, here, monkeypatch, caplog
):
    """Groups of another size have checkpoints of their own, beside that of the larger group."""
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "4", "--seeds", "0:2"]
    sweep_main([*flags, "--out", "whole"])
    for name in ("e" * 16, "f" * 16):  # saved after one epoch and after two
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stopping(patch, 1)
            sweep_main([*flags, "--out", "s"])
        path = checkpoint_path(Path("s"), [make_run(0, 0.1), make_run(1, 0.1)])
        further = shutil.copy(path, path.with_name(f"{name}.npz"))
    path.unlink()
    content, predictions = further.read_bytes(), load_arrays(further)[0]["predictions"].tobytes()
    further.write_bytes(content.replace(predictions, predictions[::-1]))
    found = []
    monkeypatch.setattr(experiment, "load_checkpoint", watch(found))
    sweep_main([*flags, "--out", "s"])
    assert found == [None, 1]
    assert f"{further} is damaged" in caplog.text
    assert rows("s") == rows("whole")


def watch(epochs):
    """load_checkpoint that notes the epochs it found."""

    def watched(*args):
        found = load_checkpoint(*args)
        epochs.append(found and found[0].epoch)
        return found

    return watched


def test_a_sweep_trains_a_damaged_chunk_again(small_dir, here, caplog):
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "1", "--seeds", "0:6"]
    sweep_main([*flags, "--chunk", "2", "--out", "s"])
    before = rows("s")
    path = store.row_files(Path("s"))[1]
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes([content[100] ^ 4]) + content[101:])
    sweep_main([*flags, "--chunk", "2", "--out", "s"])
    assert caplog.text.count("is damaged (its SHA-256 differs): renamed to") == 1
    assert rows("s") == before


def test_the_second_signal_ends_the_process():
    code = (
        "import os, signal, time\nfrom mlp_jax.cli import StopSignals\n"
        # which a shell's background jobs inherit as ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with StopSignals():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(300)\n"
    )
    for number in StopSignals.NUMBERS:
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True)
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        printed = process.stderr.readline() + process.stderr.readline()
        assert "finishing this epoch; send it again to exit at once" in printed
        assert process.poll() is None
        process.send_signal(number)
        process.communicate(timeout=10)
        assert process.returncode == 128 + number


def test_signals_are_as_before_after_the_block():
    before = [signal.getsignal(number) for number in StopSignals.NUMBERS]
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == signal.SIGTERM
    assert [signal.getsignal(number) for number in StopSignals.NUMBERS] == before
