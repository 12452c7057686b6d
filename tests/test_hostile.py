"""Hostile surroundings end in one line, and never in a lost row."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlp_jax import files
from mlp_jax.data.dataset import load_dataset
from mlp_jax.errors import UserError
from mlp_jax.records import rows as store
from mlp_jax.records.directory import new_directory
from mlp_jax.report import main as report_main

TINY = [
    *("--dataset", "kmnist", "--hidden", "16", "8"),
    *("--batch-size", "32", "--epochs", "1", "--learning-rate", "0.1"),
]


def run(module, *flags, cwd, before="", **env):
    """A command as a process, in which `before` is executed first."""
    code = (
        f"import sys; {before}\nfrom mlp_jax.cli import run_cli\nfrom mlp_jax.{module} import main"
    )
    code += f"\nrun_cli(lambda: main({list(flags)!r}))"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=os.environ | env
    )


@pytest.mark.parametrize("platform", ["cuda", "tpu", "abacus"])
def test_a_platform_that_is_not_there(platform, small_dir, tmp_path):
    flags = [*TINY, "--data-dir", str(small_dir), "--out", "s", "--seeds", "0:1"]
    done = run("sweep", *flags, cwd=tmp_path, JAX_PLATFORMS=platform)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: JAX finds no device (platforms: {platform}): ")
    assert not list(tmp_path.iterdir())


def test_jax_may_add_flags_of_a_tpu_when_it_is_imported(small_dir, tmp_path):
    """As it does on every TPU machine."""
    flags = [*TINY, "--data-dir", str(small_dir), "--out", "a", "--quiet"]
    done = run("train", *flags, cwd=tmp_path, JAX_FORCE_TPU_INIT="1", JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    environment = json.loads((tmp_path / "a" / "config.json").read_text())["environment"]
    assert "xla_tpu" in environment["library_flags"]


def test_too_large_a_net(small_dir, tmp_path):
    flags = [*TINY, "--hidden", "2000000000", "--data-dir", str(small_dir), "--out", "a"]
    done = run("train", *flags, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: out of memory: try fewer --lanes or a smaller network"
    )


def test_a_debugger_that_compiles_nothing(small_dir, tmp_path):
    flags = [*TINY, "--data-dir", str(small_dir), "--out", "a"]
    done = run("train", *flags, cwd=tmp_path, JAX_DISABLE_JIT="1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "compiled programs only: unset JAX_DISABLE_JIT" in done.stderr


def test_a_checkout_that_is_not_installed(small_dir, tmp_path):
    before = "import importlib.metadata as m; v = m.version\n"
    before += "def version(name):\n    if name == 'mlp_jax': raise m.PackageNotFoundError(name)\n"
    before += "    return v(name)\nm.version = version"
    flags = [*TINY, "--data-dir", str(small_dir), "--out", "a"]
    done = run("train", *flags, cwd=tmp_path, before=before)
    assert done.returncode == 0, done.stderr


def test_no_home(monkeypatch):
    def expanduser(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expanduser)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with pytest.raises(UserError, match=r"Could not determine home directory.*name a --data-dir"):
        load_dataset("mnist")


@pytest.mark.parametrize("stream", ["1", "2"])
def test_a_closed_stream_loses_no_row(stream, small_dir, tmp_path):
    flags = [*TINY, "--data-dir", str(small_dir), "--out", "s", "--seeds", "0:4"]
    command = [sys.executable, "-m", "mlp_jax.sweep", *flags]
    done = subprocess.run(["sh", "-c", f'exec "$@" {stream}>&-', "sh", *command], cwd=tmp_path)
    assert done.returncode == 0
    assert len(store.read_runs(tmp_path / "s")) == 4


def test_a_report_whose_reader_left_has_all_its_files(swept, data):
    """As of `report s | head`."""
    swept("--seeds", "0:3", "--out", "s")
    unread, stdout = os.pipe()
    os.close(unread)
    command = [sys.executable, "-u", "-m", "mlp_jax.report", "s", "--html", *data]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    os.close(stdout)
    assert "Traceback" not in done.stderr
    made = set(Path("s").rglob("*"))
    assert Path("s/figures/accuracy.png") in made
    report_main(["s", "--html", *data])
    assert made == set(Path("s").rglob("*"))


def test_a_name_that_is_no_text_is_refused_before_anything_is_trained(small_dir, here):
    with pytest.raises(UserError, match="its name is not valid text"):
        files.check_writable(Path("a\udcff"))


def test_two_commands_at_once_number_their_directories(here):
    assert [new_directory(Path("runs/a")).name for _ in range(3)] == ["a", "a-2", "a-3"]


def test_an_unwritable_data_directory_is_told_before_the_download(here, monkeypatch):
    monkeypatch.setattr("mlp_jax.data.sources.prepare", None)
    Path("file").touch()
    with pytest.raises(UserError, match="cannot write to file/data: file is not a directory"):
        load_dataset("mnist", "file/data")


def test_more_lanes_than_runs_train_no_padding(config, small):
    from mlp_jax.training.parallel import RunBytes, place

    assert place(2, RunBytes(10**6, 10**7), lanes=300).width == 2


def test_a_disk_that_fails_is_no_damage(small_dir, here, monkeypatch, caplog):
    path = Path("c.npz")
    files.save_arrays(path, {}, {})

    def fails(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(PermissionError):
        files.load_arrays(path)
    assert path.exists()
    assert not caplog.text
