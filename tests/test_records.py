"""Files appear whole or not at all; rows come back as they went in."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from mlp_jax.records import provenance
from mlp_jax.records import rows as store
from mlp_jax.training.config import UserError


def row(vary="all", seed=0, rate=0.01, n_test=20):
    rng = np.random.default_rng([seed, len(vary)])
    return {
        "recipe": "keras-sgd",
        "vary": vary,
        "seed": seed,
        "learning_rate": rate,
        "test_correct": 17,
        "test_loss": np.float32(0.1),
        "train_loss": np.float32(0.2),
        "test_correct_by_epoch": np.array([15, 17], np.int32),
        "test_loss_by_epoch": np.array([0.3, 0.1], np.float32),
        "train_loss_by_epoch": np.array([0.4, 0.2], np.float32),
        "predictions": rng.integers(0, 10, n_test, dtype=np.uint8).tobytes(),
        "seconds": 1.5,
    }


def about(**changes):
    environment = provenance.describe_environment(jax.devices())
    return {
        "recipe": "keras-sgd",
        "config": {"epochs": 2, "hidden": (512, 512)},
        "fingerprint": "f",
        "environment": environment,
    } | changes


def opened(directory):
    store.make_directory(directory / "runs")
    store.open_directory(directory, about())
    return directory


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    store.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        store.write_json(path, {"new": object()})
    with pytest.raises(KeyboardInterrupt), store.replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_files_get_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        store.write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


def test_rows_come_back_in_order_whatever_the_chunks(tmp_path):
    opened(tmp_path / "s")
    store.write_chunk(tmp_path / "s", [row(seed=10), row(seed=2), row("init", seed=1)], about())
    store.write_chunk(tmp_path / "s", [row(seed=7, rate=0.003)], about())
    table = store.read_runs(tmp_path / "s")
    ids = [("all", 0.003, 7), ("all", 0.01, 2), ("all", 0.01, 10), ("init", 0.01, 1)]
    assert [tuple(r[name] for name in store.ROW_ID) for r in table.to_pylist()] == ids
    done = store.finished(tmp_path / "s", about())
    assert done == dict.fromkeys(ids, 17)
    wanted = row(seed=2)
    for name, value in table.to_pylist()[1].items():
        if name.endswith("by_epoch"):
            np.testing.assert_array_equal(np.array(value, wanted[name].dtype), wanted[name])
        else:
            assert value == wanted[name]
    np.testing.assert_array_equal(
        store.predictions(table["predictions"])[1],
        np.frombuffer(wanted["predictions"], np.uint8),
    )


def test_an_empty_sweep_has_no_rows(tmp_path):
    assert store.finished(tmp_path, about()) == {}
    with pytest.raises(UserError, match="holds no finished runs"):
        store.read_runs(tmp_path)
    with pytest.raises(UserError, match=r"holds no sweep: it has no config\.json"):
        store.read_config(tmp_path)


def test_equal_predictions_cost_next_to_nothing(tmp_path):
    opened(tmp_path / "s")
    predictions = np.random.default_rng(0).integers(0, 10, 10_000, dtype=np.uint8).tobytes()
    rows = [row(seed=seed) | {"predictions": predictions} for seed in range(50)]
    path = store.write_chunk(tmp_path / "s", rows, about())
    assert path.stat().st_size < 25_000  # of 500,000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "short"}, "recipe keras-sgd, not short"),
        ({"config": {"epochs": 3, "hidden": (512, 512)}}, "epochs 2, not 3"),
        ({"config": {"hidden": (512, 512)}}, "epochs 2, not None"),
        ({"fingerprint": "g"}, "data fingerprint f, not g"),
    ],
)
def test_a_sweep_is_gone_on_with_only_where_all_agrees(changes, message, tmp_path):
    opened(tmp_path / "s")
    store.open_directory(tmp_path / "s", about())
    with pytest.raises(UserError, match=message):
        store.open_directory(tmp_path / "s", about(**changes))


@pytest.mark.parametrize("name", ["backend", "device_kind", "prng", "matmul_precision"])
def test_rows_of_other_numerics_are_never_pooled(name, tmp_path):
    opened(tmp_path / "s")
    other = about()
    other["environment"] = other["environment"] | {name: "other"}
    with pytest.raises(UserError, match=f"{name.replace('_', ' ')} .*, not other"):
        store.open_directory(tmp_path / "s", other)


def test_other_cores_are_recorded_not_refused(tmp_path):
    opened(tmp_path / "s")
    other = about()
    other["environment"] = other["environment"] | {"cores": 64, "git": None}
    store.open_directory(tmp_path / "s", other)


def test_check_writable_creates_nothing(tmp_path):
    store.check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a directory"):
        store.check_writable(tmp_path / "file" / "b")
    with pytest.raises(UserError, match="cannot write to"):
        store.make_directory(Path("/proc/no/such"))


def test_an_unwritable_directory(tmp_path, monkeypatch):
    # a superuser, as in many containers, may write anywhere: what os.access says is set here
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="no permission in"):
        store.check_writable(tmp_path / "a")


def test_the_environment_says_what_numbers_depend_on():
    environment = provenance.describe_environment(jax.devices())
    assert environment["versions"]["jax"] == jax.__version__
    assert environment["n_devices"] == 2
    assert environment["cores"] >= 1
    assert environment["processor"]
    assert environment["prng"] == "threefry2x32"
    json.dumps(environment)


def flip(path, rng):
    """Another value of one bit, anywhere in a file."""
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_chunk_is_found_wherever_it_is_damaged(seed, tmp_path, capsys):
    rng = np.random.default_rng(seed)
    directory = opened(tmp_path / "s")
    whole = store.write_chunk(directory, [row(seed=0), row(seed=1)], about())
    path = store.write_chunk(directory, [row(seed=2), row(seed=3)], about())
    if seed % 4:
        flip(path, rng)
    else:
        path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])
    with pytest.raises(store.Damaged, match=f"{path.name} is damaged"):
        store.read_runs(directory)
    with pytest.raises(store.Damaged, match=f"{path.name} is damaged"):
        store.processors(directory, about())
    assert len(store.finished(directory, about())) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"set aside as _{path.name}.corrupt, made anew" in said
    assert store.chunk_paths(directory) == [whole]
    assert path.with_name(f"_{path.name}.corrupt").exists()
    # nor do other readers average it in
    assert len(pq.read_table(directory / "runs")) == 2


def test_rows_made_otherwise_are_refused_wherever_they_come_from(tmp_path):
    directory, other = opened(tmp_path / "s"), about(fingerprint="g")
    store.write_chunk(directory, [row()], other)
    for read in (store.finished, store.processors):
        with pytest.raises(UserError, match="holds rows of data fingerprint g, not f: remove it"):
            read(directory, about())


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_config_is_set_aside_and_written_anew(seed, tmp_path, capsys):
    directory = opened(tmp_path / "s")
    path = directory / "config.json"
    before = path.read_bytes()
    rng = np.random.default_rng(seed)
    path.write_bytes(before[: 40 * seed])
    if seed % 4:
        path.write_bytes(before)
        flip(path, rng)
        while b'"sha256"' not in path.read_bytes():  # without it the file would be another's
            path.write_bytes(before)
            flip(path, rng)
    store.open_directory(directory, about())
    assert path.read_bytes() == before
    assert "config.json is damaged" in capsys.readouterr().err


def test_a_directory_has_one_command_at_a_time(tmp_path):
    hold = (
        "import sys, time\nfrom pathlib import Path\nfrom mlp_jax import store\n"
        "with store.sole_use(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])):\n"
        "    print('held', flush=True)\n    time.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "s")]
    with subprocess.Popen([*command, "0", "2"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with store.sole_use(tmp_path / "s", 1, 2):
            pass  # another process of the same command
        for process, processes in ((0, 2), (0, 1), (2, 3)):
            refused = pytest.raises(UserError, match="s is in use by another process")
            with refused, store.sole_use(tmp_path / "s", process, processes):
                pytest.fail("two commands share a directory")
        other.kill()
    # what the dead process left means nothing
    assert list((tmp_path / "s").glob(".lock-*"))
    (tmp_path / "s" / ".rows.parquet.x.tmp").touch()
    with store.sole_use(tmp_path / "s"):
        assert not list((tmp_path / "s").glob(".*.tmp"))
