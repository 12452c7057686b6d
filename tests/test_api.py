"""The Python API: what README shows, weights that travel, and an import that costs nothing."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import mlp_jax as mj
from mlp_jax.records import rows
from mlp_jax.records.checkpoint import weights_path
from mlp_jax.sweep import main as sweep_main
from mlp_jax.train import main as train_main
from mlp_jax.training.run import sweep_runs

TINY = [
    *("--dataset", "kmnist", "--hidden", "16", "8", "--quiet"),
    *("--batch-size", "32", "--epochs", "3", "--learning-rate", "0.1"),
]
CONFIG = mj.Config(hidden=(16, 8), batch_size=32, epochs=3, learning_rate=0.1)


def test_the_import_loads_nothing():
    code = "import sys, mlp_jax\nassert not {'jax', 'numpy', 'tyro'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_has_a_docstring():
    for name in mj.__all__:
        assert getattr(mj, name).__doc__
    assert set(mj.__all__) <= set(dir(mj))
    stub = (Path(mj.__file__).parent / "__init__.pyi").read_text()  # what editors and mypy read
    assert sorted(re.findall(r" as (\w+)", stub)) == sorted(mj.__all__)
    for name, home in mj._HOMES.items():
        assert f"from mlp_jax.{home} import {name} as {name}\n" in stub
    with pytest.raises(AttributeError, match="no attribute 'sweeep'"):
        mj.sweeep  # noqa: B018


def test_a_command_of_the_same_name_hides_no_function():
    assert callable(sweep_main)  # the module mlp_jax.sweep is imported
    assert mj.sweep.__module__ == "mlp_jax.sweep"


def test_a_number_of_cores_stays_as_it_was_set():
    code = "import mlp_jax as mj, jax; assert mj.use_cores(3) and mj.use_cores()"
    code += "\nassert len(jax.devices()) == 3; assert not mj.use_cores(2)"
    # XLA then has as many threads, which changes roundings
    code += "\nassert mj.describe_environment()['cores'] >= 3"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(mj.UserError, match="at least one core, not 0"):
        mj.use_cores(0)


def test_fit_prints_nothing_and_is_the_command(small_dir, here, capfd):
    data = mj.load_dataset("kmnist", small_dir)
    accuracy = [epoch.test_accuracy for epoch in mj.fit(CONFIG, data, seeds=range(2))]
    assert np.shape(accuracy) == (3, 2)
    assert capfd.readouterr() == ("", "")
    train_main([*TINY, "--data-dir", str(small_dir), "--seed", "1", "--out", "a"])
    assert mj.load_run("a").metrics["test_correct"] == round(accuracy[-1][1] * 130)


def test_sweep_prints_nothing_resumes_and_is_the_command(small_dir, here, capfd):
    data = mj.load_dataset("kmnist", small_dir)
    mj.sweep(CONFIG, data, "s", seeds=[2, 0], recipe="keras-sgd")
    table = mj.sweep(CONFIG, data, "s", seeds=range(3), vary=("all", "init"), recipe="keras-sgd")
    assert capfd.readouterr() == ("", "")
    assert table.select(["vary", "seed"]).to_pydict() == {
        "vary": ["all"] * 3 + ["init"] * 3,
        "seed": [0, 1, 2] * 2,
    }
    families = ["--seeds", "0:3", "--vary", "all", "init"]
    sweep_main([*TINY, "--data-dir", str(small_dir), *families, "--out", "t"])
    assert mj.read_runs("t").drop_columns("seconds") == table.drop_columns("seconds")


@pytest.fixture
def ctrl_c():
    """Python's own handler: a shell starts its background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_rows_are_written_loses_none(config, small, here, monkeypatch):
    """As a second one does, since the first ends the training."""
    write_rows = rows.write_rows

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        write_rows(*args)

    monkeypatch.setattr(rows, "write_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mj.sweep(config, small, "s", seeds=range(3))
    assert mj.read_runs("s")["seed"].to_pylist() == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_wrong_arguments_are_one_line_before_anything_is_trained(small, here):
    for wrong, message in (
        (
            {"vary": "in"},
            "a family varies all or one of init, order, dropout, augment, data, not 'in'",
        ),
        ({"seeds": []}, "a sweep needs at least one run"),
        ({"seeds": range(4), "shard": (2, 2)}, "shards are numbered from 0"),
        ({"seeds": [-1]}, "seeds must be from 0 to"),
        ({"seeds": [1], "crossed": 2}, "crossed sets all seeds"),
        ({"learning_rates": np.array([0.1, np.inf])}, "positive and finite"),
    ):
        with pytest.raises(mj.UserError, match=message):
            mj.sweep(CONFIG, small, "s", **wrong)
    assert not Path("s").exists()


def test_families_may_be_a_set():
    runs = sweep_runs(CONFIG, range(2), {"order", "init", "all"})
    assert runs == sweep_runs(CONFIG, range(2), ("all", "init", "order"))


def test_numpy_seeds_and_shards_are_fine(small, here):
    mj.sweep(CONFIG, small, "s", seeds=np.arange(4), shard=(1, 2), keep_weights=True)
    assert mj.read_runs("s")["seed"].to_pylist() == [1, 3]


def test_a_sweep_is_refused_where_a_single_run_is(small_dir, here):
    train_main([*TINY, "--data-dir", str(small_dir), "--out", "a"])
    with pytest.raises(mj.UserError, match="a has seed=0; you asked for seed=None"):
        sweep_main([*TINY, "--data-dir", str(small_dir), "--seeds", "0:2", "--out", "a"])


def test_a_sweep_in_a_process_that_has_used_jax_says_what_that_costs(small_dir, here):
    code = f"""
import jax, logging
jax.devices()
import mlp_jax as mj
data = mj.load_dataset("kmnist", {str(small_dir)!r})
config = mj.Config(hidden=(8,), batch_size=32, epochs=1, learning_rate=0.1)
print(len(mj.sweep(config, data, "s", seeds=range(2))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "2\n", done.stderr
    if (cores := mj.training.parallel.n_cores()) > 1:
        assert f"JAX already runs on 1 of {cores} cores" in done.stderr


def test_weights_are_those_of_the_run(small_dir, here, small):
    train_main([*TINY, "--data-dir", str(small_dir), "--out", "a"])
    run = mj.load_run("a")
    assert run.config == mj.training.arrays.for_dataset(CONFIG, small)
    classes = mj.predict(run, small.test.images).argmax(axis=1)
    assert (classes == small.test.labels).sum() == run.metrics["test_correct"]
    predictions = mj.read_runs("a")["predictions"]
    assert predictions.type == pa.large_binary()  # those of many runs take more than 2 GiB
    stored = np.frombuffer(predictions[0].as_py(), np.uint8)
    np.testing.assert_array_equal(classes, stored)


def test_a_sweep_keeps_weights_if_asked(small_dir, here, small):
    flags = [*TINY, "--data-dir", str(small_dir), "--seeds", "0:3", "--out", "s"]
    sweep_main(flags)
    with pytest.raises(mj.UserError, match="s has no weights of a finished run"):
        mj.load_run("s")
    sweep_main([*flags, "--seeds", "0:5", "--keep-weights"])
    with pytest.raises(mj.UserError, match="s has weights of 5 such runs: choose one by seed"):
        mj.load_run("s")
    run = mj.load_run("s", seed=4)
    assert (run.run.seed, run.run.vary) == (4, "all")
    correct = (mj.predict(run, small.test.images).argmax(axis=1) == small.test.labels).sum()
    assert correct == run.metrics["test_correct"]
    assert correct == mj.read_runs("s")["test_correct"].to_pylist()[4]


@pytest.mark.network
def test_what_readme_shows_runs(mnist, here):
    """As it stands there, but for the number of seeds."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    example = readme.partition("<!-- api -->\n```python\n")[2].partition("```")[0]
    assert example.count("range(8)") == 2
    code = example.replace("range(8)", "range(4)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "test_correct" in done.stdout


def test_damaged_weights_are_left_alone_by_readers_and_trained_again(small_dir, here):
    train_main([*TINY, "--data-dir", str(small_dir), "--out", "a"])
    path = weights_path(Path("a"), mj.load_run("a").run)
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    with pytest.raises(mj.UserError, match="is damaged"):
        mj.load_run("a")
    assert path.read_bytes() == content[:-40]
    before = mj.read_runs("a")
    train_main([*TINY, "--data-dir", str(small_dir), "--out", "a", "--resume"])
    assert path.read_bytes() == content
    assert mj.read_runs("a") == before  # trained again for its weights, stored once
