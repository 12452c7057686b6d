"""A record proves itself: stored runs trained again are equal, and forged ones are found out."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

import mlp_jax
from mlp_jax.errors import UserError
from mlp_jax.files import write_signed_json
from mlp_jax.records import rows as store
from mlp_jax.records.directory import read_metadata
from mlp_jax.records.provenance import describe_environment, differs_in_code
from mlp_jax.sweep import main as sweep_main
from mlp_jax.train import main as train_main
from mlp_jax.training import step
from mlp_jax.verify import TOLERANCES, compare_rows, is_rounding, same_machine
from mlp_jax.verify import main as verify_main

TINY = [
    *("--dataset", "kmnist", "--hidden", "16", "8", "--quiet"),
    *("--batch-size", "32", "--epochs", "2", "--learning-rate", "0.1"),
]


def outcome(*args, **options):
    """The line of `compare_rows`, which must agree with its verdict."""
    equal, line = compare_rows(*args, **options)
    assert equal == line.startswith("equal")
    return line


def verify(small_dir, *flags):
    verify_main([*flags, "--data-dir", str(small_dir)])


def test_runs_of_every_kind_are_equal(small_dir, here, capsys):
    flags = [*TINY, "--data-dir", str(small_dir)]
    train_main([*flags, "--seed", "3", "--out", "a"])
    families = ["--vary", "all", "order", "--learning-rate", "0.1", "0.03"]
    sweep_main([*flags, "--seeds", "0:2", *families, "--out", "s"])
    capsys.readouterr()
    verify(small_dir, "a")
    verify(small_dir, "s", "--rows", "20")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 8
    assert all("equal bit for bit" in line for line in lines)


def forge(directory, change):
    """Rows that were changed, and hashed again, as a forger would."""
    metadata = read_metadata(Path(directory))
    (path,) = store.row_files(Path(directory))
    rows = pq.read_table(path).to_pylist()
    change(rows[0])
    for row in rows:
        for name in ("test_correct", "test_loss", "train_loss"):
            kind = np.int32 if name == "test_correct" else np.float32
            row[f"{name}_by_epoch"] = np.array(row[f"{name}_by_epoch"], kind)
            row[name] = kind(row[name])
    path.unlink()
    store.write_rows(Path(directory), rows, metadata)


@pytest.mark.parametrize("name", ["test_correct_by_epoch", "train_loss_by_epoch", "predictions"])
def test_a_forged_row_is_found_out(name, small_dir, here, capsys):
    sweep_main([*TINY, "--data-dir", str(small_dir), "--seeds", "0:2", "--out", "s"])

    def change(row):
        if name == "predictions":
            row[name] = bytes([(row[name][0] + 1) % 4]) + row[name][1:]
        else:
            row[name][0] += 1

    forge("s", change)
    with pytest.raises(SystemExit) as left:
        verify(small_dir, "s")
    assert left.value.code == 1
    first, second = capsys.readouterr().out.splitlines()
    assert "DIFFERENT" in first
    assert "equal bit for bit" in second


def test_other_hardware_may_round_otherwise(small_dir, here, small):
    import mlp_jax as mj

    sweep_main([*TINY, "--data-dir", str(small_dir), "--seeds", "0:1", "--out", "s"])
    row = mj.read_runs("s").to_pylist()[0]
    config = read_metadata(Path("s")).config
    *_, progress = mj.fit(config, small, seeds=[0])
    row["train_loss_by_epoch"][0] *= 1 + 1e-5
    assert outcome(row, progress, exact=True).startswith("DIFFERENT")
    assert outcome(row, progress, exact=False).startswith("equal within the tolerance")
    for name, most in TOLERANCES.items():
        first = row[f"{name}_by_epoch"][0]
        row[f"{name}_by_epoch"][0] = first * (1 + 2 * most)
        assert outcome(row, progress, exact=False).startswith("DIFFERENT")
        row[f"{name}_by_epoch"][0] = first


def test_a_metric_that_this_code_lacks_is_named(small_dir, here):
    import mlp_jax as mj

    sweep_main([*TINY, "--data-dir", str(small_dir), "--seeds", "0:1", "--out", "s"])
    row = mj.read_runs("s").to_pylist()[0] | {"train_margin": 0.5}
    *_, progress = mj.fit(read_metadata(Path("s")).config, mj.load_dataset("kmnist", small_dir))
    with pytest.raises(UserError, match="the stored rows have train_margin, which this code"):
        outcome(row, progress, exact=True)


def test_the_mean_training_loss_of_older_rows_was_rounded_otherwise(small_dir, here):
    import mlp_jax as mj

    sweep_main([*TINY, "--data-dir", str(small_dir), "--seeds", "0:1", "--out", "s"])
    row = mj.read_runs("s").to_pylist()[0]
    *_, progress = mj.fit(read_metadata(Path("s")).config, mj.load_dataset("kmnist", small_dir))
    losses = row["train_loss_by_epoch"]
    losses[0] = np.nextafter(np.float32(losses[0]), np.float32(9)).item()
    assert outcome(row, progress, exact=True, older=True).startswith("equal but for the last bit")
    assert outcome(row, progress, exact=True).startswith("DIFFERENT")
    assert not is_rounding("predictions", b"12", b"13")
    for name in ("train_loss_by_epoch", "test_loss_by_epoch"):
        changed = [np.nextafter(np.float32(row[name][0]), np.float32(9)).item(), row[name][1]]
        assert outcome(row | {name: changed}, progress, exact=True, older=True).startswith("DIFF")


def test_edited_code_is_no_other_hardware(small_dir, here, monkeypatch, capsys):
    """Its first epoch may be the same."""
    sweep_main([*TINY, "--data-dir", str(small_dir), "--seeds", "0:1", "--out", "s"])

    def edited(state, *args, config, **options):
        new, metrics = train_step(state, *args, config=config, **options)
        return jax.tree.map(lambda a, b: jnp.where(state.step < 10, a, b), new, state), metrics

    train_step = step.train_step
    monkeypatch.setattr(step, "train_step", edited)
    for environ in (os.environ, mlp_jax._ENVIRON):
        monkeypatch.setitem(environ, "XLA_FLAGS", "--xla_cpu_foo=1")
    with pytest.raises(SystemExit):
        verify(small_dir, "s")
    assert "the test loss by 0.0e+00): trained with different" in capsys.readouterr().out
    metadata = read_metadata(Path("s"))
    other = metadata._replace(program="0" * 64)
    assert differs_in_code(metadata, other)
    assert not differs_in_code(
        metadata, other._replace(environment=other.environment | {"x64": True})
    )


def test_a_config_that_was_changed_and_signed_is_found_out(small_dir, here):
    sweep_main([*TINY, "--data-dir", str(small_dir), "--seeds", "0:1", "--out", "s"])
    config = json.loads(Path("s/config.json").read_text())
    del config["sha256"]
    config["config"]["dropout"] = 0.5
    write_signed_json(Path("s/config.json"), config)
    with pytest.raises(mlp_jax.UserError, match=r"parquet has dropout=0.2, .* have dropout=0.5"):
        verify(small_dir, "s")


def test_two_rows_of_a_run_are_one_line(small_dir, here):
    """Of which one alone would be compared."""
    for out in ("a", "b"):
        sweep_main([*TINY, "--data-dir", str(small_dir), "--seeds", "0:1", "--out", out])
    (path,) = Path("b/runs").iterdir()  # whose seconds are others
    shutil.copy(path, "a/runs")
    with pytest.raises(mlp_jax.UserError, match="contain the same run: remove"):
        verify(small_dir, "a")


def test_equal_bits_are_promised_of_the_same_instructions_alone():
    here = describe_environment(jax.devices()) | {"processor": "AMD EPYC", "instructions": "avx2"}
    assert same_machine(here, dict(here))
    assert not same_machine(here | {"instructions": "avx2 avx512f"}, here)
    assert not same_machine(here | {"cores": 99}, here)
    older = {name: value for name, value in here.items() if name != "instructions"}
    assert not same_machine(older, here)
    xeon = {"processor": "Intel(R) Xeon(R) Processor"}
    assert same_machine(older | xeon, here | xeon)
    assert not same_machine(older | xeon, here)
