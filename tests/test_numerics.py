"""Rows that other code, versions or numerics trained are never pooled without a word."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlp_jax
from mlp_jax.records import rows as store
from mlp_jax.records.provenance import Metadata, check_same, describe_environment
from mlp_jax.training.config import Config
from mlp_jax.training.programs import trace_code

TINY = [
    *("--dataset", "kmnist", "--hidden", "16", "8", "--quiet", "--optimizer", "momentum"),
    *("--batch-size", "32", "--epochs", "1", "--learning-rate", "0.1"),
]


def sweep(small_dir, cwd, *flags, package=None, **env):
    """A sweep in a process of its own, of this package or of a copy in `package`."""
    path = {"PYTHONPATH": str(package or Path(mlp_jax.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-m", "mlp_jax.sweep", *TINY, "--data-dir", str(small_dir), *flags],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | path | env,
    )


@pytest.fixture(scope="module")
def swept(small_dir, tmp_path_factory):
    """A copy of the package, and a sweep of two seeds that it trained."""
    root = tmp_path_factory.mktemp("swept")
    shutil.copytree(Path(mlp_jax.__file__).parent, root / "code" / "mlp_jax")
    done = sweep(small_dir, root, "--seeds", "0:2", "--out", "s", package=root / "code")
    assert done.returncode == 0, done.stderr
    return root


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return lambda: path.write_text(text)


def test_an_edited_optimizer_is_refused_and_an_edited_comment_is_not(swept, small_dir):
    flags = ("--seeds", "0:3", "--out", "s")
    training = swept / "code" / "mlp_jax" / "training"
    restore = edit(training / "optim.py", "trace(decay=0.9)", "trace(decay=0.5)")
    done = sweep(small_dir, swept, *flags, package=swept / "code")
    restore()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "was trained with different training code" in done.stderr
    assert "--allow-mixed" in done.stderr
    edit(training / "optim.py", '"""Update rules', '"""Here are update rules')
    edit(training / "step.py", "def body(i: jax.Array,", "def a_step(i: jax.Array,")
    edit(training / "step.py", "lax.fori_loop(0, taken, body,", "lax.fori_loop(0, taken, a_step,")
    done = sweep(small_dir, swept, *flags, package=swept / "code")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [
        ("JAX_THREEFRY_PARTITIONABLE", "0", "threefry_partitionable=True"),
        ("JAX_RANDOM_SEED_OFFSET", "7", "random_seed_offset=0"),
        ("JAX_ENABLE_X64", "1", "x64=False"),
        ("JAX_DEFAULT_MATMUL_PRECISION", "bfloat16", "matmul_precision=default"),
        ("JAX_DEFAULT_MATMUL_PRECISION", "default", "matmul_precision=default"),
        ("XLA_FLAGS", "--xla_cpu_enable_fast_math=true", "xla_flags="),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16", "library_flags="),
    ],
)
def test_other_numerics_are_refused(variable, value, name, swept, small_dir):
    flags = ("--seeds", "0:9", "--out", "s")
    done = sweep(small_dir, swept, *flags, package=swept / "code", **{variable: value})
    assert done.returncode == 2
    assert f"was trained with {name}" in done.stderr
    assert done.stderr.count("\n") == 1


def test_allow_mixed_marks_the_rows(small_dir, tmp_path):
    assert not sweep(small_dir, tmp_path, "--seeds", "0:2", "--out", "s").returncode
    flags = ("--seeds", "0:4", "--out", "s", "--allow-mixed")
    done = sweep(small_dir, tmp_path, *flags, JAX_RANDOM_SEED_OFFSET="7")
    assert done.returncode == 0, done.stderr
    marks = [store.read_metadata(path).mixed for path in store.row_files(tmp_path / "s")]
    assert sorted(marks) == [False, True]


def test_a_version_is_bound(config):
    import jax

    metadata = Metadata("custom", config, "a" * 64, describe_environment(jax.devices()))
    for package in ("jax", "jaxlib", "flax", "optax"):
        versions = metadata.environment["versions"] | {package: "9.9"}
        other = metadata._replace(environment=metadata.environment | {"versions": versions})
        with pytest.raises(mlp_jax.UserError, match=f"was trained with {package}=9.9"):
            check_same(Path("s"), other, metadata)


def test_other_labels_are_other_data(config, small):
    import jax

    from mlp_jax.training.arrays import make_dataset

    other = small.test._replace(labels=(small.test.labels + 1) % 4)
    swapped = make_dataset("kmnist", small.train, other, 4)
    assert swapped.image_fingerprint == small.image_fingerprint
    here = describe_environment(jax.devices())
    a, b = (
        Metadata("custom", config, d.fingerprint, here, images=d.image_fingerprint)
        for d in (small, swapped)
    )
    with pytest.raises(mlp_jax.UserError, match="s has data="):
        check_same(Path("s"), a, b)
    # a record that names the training images alone
    old = a._replace(fingerprint=small.image_fingerprint, images=None)
    check_same(Path("s"), old, a)


def test_too_many_classes_are_refused(small):
    from mlp_jax.training.arrays import make_dataset

    with pytest.raises(mlp_jax.UserError, match="many has 257 classes; at most 256"):
        make_dataset("many", small.train, small.test, 257)


def test_the_program_depends_on_what_changes_numbers_alone(small, monkeypatch):
    base = Config(hidden=(8,), batch_size=32)
    monkeypatch.setattr("jax._src.pretty_printer.CAN_USE_COLOR", True)  # as on a terminal
    code = trace_code(base, small.arrays)
    monkeypatch.setattr("jax._src.pretty_printer.CAN_USE_COLOR", False)
    assert code == trace_code(base, small.arrays)
    same = [{"epochs": 3}, {"learning_rate": 0.5}, {"dataset": "kmnist"}]
    other = [{"dropout": 0.3}, {"schedule": "cosine"}, {"optimizer": "adam"}, {"batch_size": 64}]
    for changes in (*same, *other):
        changed = trace_code(Config(**vars(base) | changes), small.arrays)
        assert (changed == code) == (changes in same), changes


def test_a_record_without_a_program_goes_on(config):
    import jax

    metadata = Metadata("custom", config, "a" * 64, describe_environment(jax.devices()))
    check_same(Path("s"), metadata, metadata._replace(program="b" * 64))
    with pytest.raises(mlp_jax.UserError, match="different training code"):
        check_same(Path("s"), metadata._replace(program="c" * 64), metadata._replace(program="b"))
    assert Metadata.from_json(metadata.to_json(), Path("s")) == metadata
