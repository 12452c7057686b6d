"""Files appear whole or not at all; rows come back as they went in; what is not ours stays."""

import contextlib
import itertools
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

from mlp_jax import files
from mlp_jax.compact import main as compact_main
from mlp_jax.errors import UserError
from mlp_jax.files import Damaged
from mlp_jax.records import compaction, provenance, rows
from mlp_jax.records.directory import check_out_dir, claim, clear, read_metadata
from mlp_jax.records.provenance import Metadata
from mlp_jax.results import count_processors
from mlp_jax.training.config import Config
from mlp_jax.training.run import make_run


def row(vary="all", seed=0, rate=0.01, n_test=20):
    rng = np.random.default_rng([seed, len(vary)])
    return {
        "recipe": "keras-sgd",
        "vary": vary,
        "seed": seed,
        "learning_rate": rate,
        "test_correct": np.int32(17),
        "test_loss": np.float32(0.1),
        "train_loss": np.float32(0.2),
        "test_correct_by_epoch": np.array([15, 17], np.int32),
        "test_loss_by_epoch": np.array([0.3, 0.1], np.float32),
        "train_loss_by_epoch": np.array([0.4, 0.2], np.float32),
        "predictions": rng.integers(0, 10, n_test, dtype=np.uint8).tobytes(),
        "seconds": 1.5,
    }


def metadata(**changes):
    environment = provenance.describe_environment(jax.devices())
    return Metadata("keras-sgd", Config(epochs=2), "f", environment)._replace(**changes)


def opened(directory, asked=None):
    """`directory`, claimed as a command claims it."""
    check_out_dir(directory)
    with files.locked(directory):
        claim(directory, asked or metadata())
    files.make_directory(directory / "runs")
    return directory


def content(directory):
    """All files of a directory and their bytes."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"new": object()})
    with pytest.raises(KeyboardInterrupt), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_files_get_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


def small_files(directory, n=7, per_file=2):
    """Rows of a process in files of `per_file`."""
    for start in range(0, n, per_file):
        some = [row(seed=seed) for seed in range(start, min(n, start + per_file))]
        rows.write_rows(directory, some, metadata())
    return directory


def test_small_files_are_merged_without_changing_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compaction, "SIZE", 4)
    directory = small_files(opened(tmp_path / "s"), n=10)
    rows.write_rows(directory, [row(seed=50)], metadata(mixed=True))  # another origin
    rows.write_rows(directory, [row(seed=seed) for seed in range(60, 65)], metadata())  # large
    rows.write_rows(directory, [row(seed=70) | {"init_seed": 70}], metadata())  # a newer column
    before = rows.read_runs(directory)
    compact_main([str(directory)])
    assert capsys.readouterr().out == f"{directory}: 8 files are now 6\n"
    assert rows.read_runs(directory).equals(before)
    counts = sorted(map(rows.count_rows, rows.row_files(directory)))
    assert counts == [1, 1, 2, 4, 4, 5]
    assert sum(count_processors(rows.row_files(directory), metadata()).values()) == 17
    assert len(rows.finished_runs(directory, metadata(mixed=True))) == 17
    merged = content(directory)
    compact_main([str(directory)])
    assert content(directory) == merged


@contextlib.contextmanager
def interrupted_after(steps, monkeypatch):
    """Raise KeyboardInterrupt at the next file operation, as a kill would end the process there."""
    left = iter(range(steps))
    with monkeypatch.context() as patched:
        for name in ("write_bytes", "write_text", "replace", "unlink"):
            patched.setattr(Path, name, stoppable(getattr(Path, name), left))
        yield


def stoppable(operation, left):
    def attempt(*args, **kwargs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return operation(*args, **kwargs)

    return attempt


def test_a_merge_that_is_interrupted_anywhere_loses_and_doubles_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "SIZE", 4)
    whole = rows.read_runs(small_files(opened(tmp_path / "whole")))
    for steps in itertools.count():
        directory = small_files(opened(tmp_path / f"{steps}"))
        try:
            with interrupted_after(steps, monkeypatch):
                compaction.compact(directory)
            break
        except KeyboardInterrupt:
            assert rows.read_runs(directory).equals(whole)
            assert len(rows.finished_runs(directory, metadata())) == 7
        compaction.compact(directory)
        assert rows.read_runs(directory).equals(whole)
        assert sorted(map(rows.count_rows, rows.row_files(directory))) == [3, 4]
        assert not (directory / rows.MERGE).exists()
    assert steps > 10


def test_rows_come_back_in_order_whatever_the_files(tmp_path):
    directory = opened(tmp_path / "s")
    rows.write_rows(directory, [row(seed=10), row(seed=2), row("init", seed=1)], metadata())
    rows.write_rows(directory, [row(seed=7, rate=0.003)], metadata())
    table = rows.read_runs(directory)
    ids = [("all", 0.003, 7), ("all", 0.01, 2), ("all", 0.01, 10), ("init", 0.01, 1)]
    assert [tuple(r[name] for name in rows.ROW_ID) for r in table.to_pylist()] == ids
    last = {"test_correct": 17, "test_loss": np.float32(0.1), "train_loss": np.float32(0.2)}
    last |= {"seconds": 1.5, "finite": True}
    runs = [make_run(seed, rate, vary) for vary, rate, seed in ids]
    assert rows.finished_runs(directory, metadata()) == dict.fromkeys(runs, last)
    assert rows.last_values(row()) == last
    wanted = row(seed=2)
    for name, value in table.to_pylist()[1].items():
        if name.endswith("by_epoch"):
            np.testing.assert_array_equal(np.array(value, wanted[name].dtype), wanted[name])
        else:
            assert value == wanted[name]
    np.testing.assert_array_equal(
        rows.predictions(table["predictions"])[1], np.frombuffer(wanted["predictions"], np.uint8)
    )


def test_an_empty_sweep_has_no_rows(tmp_path):
    assert rows.finished_runs(tmp_path, metadata()) == {}
    with pytest.raises(UserError, match="has no finished runs"):
        rows.read_runs(tmp_path)
    with pytest.raises(UserError, match="contains no mlp_jax results"):
        read_metadata(tmp_path)


def test_equal_predictions_cost_next_to_nothing(tmp_path):
    opened(tmp_path / "s")
    predictions = np.random.default_rng(0).integers(0, 10, 10_000, dtype=np.uint8).tobytes()
    many = [row(seed=seed) | {"predictions": predictions} for seed in range(50)]
    path = rows.write_rows(tmp_path / "s", many, metadata())
    assert path.stat().st_size < 25_000  # of 500,000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "short"}, "s has recipe=keras-sgd; you asked for recipe=short"),
        ({"config": Config(epochs=3)}, "s has epochs=2; you asked for epochs=3"),
        ({"config": Config(epochs=2, hidden=(512,))}, r"hidden=\(512, 512\); .* hidden=\(512,\)"),
        ({"fingerprint": "g"}, "s has data=f; you asked for data=g"),
        ({"seed": 3}, "s has seed=None; you asked for seed=3"),
    ],
)
def test_a_sweep_is_resumed_only_where_all_agrees(changes, message, tmp_path):
    opened(tmp_path / "s")
    claim(tmp_path / "s", metadata())
    with pytest.raises(UserError, match=message):
        claim(tmp_path / "s", metadata(**changes))


@pytest.mark.parametrize("name", ["backend", "device_kind", "prng", "matmul_precision"])
def test_rows_of_other_numerics_are_never_pooled(name, tmp_path):
    opened(tmp_path / "s")
    other = metadata(environment=metadata().environment | {name: "other"})
    with pytest.raises(UserError, match=rf" {name}=.*[= ]other\b"):
        claim(tmp_path / "s", other)


def test_other_cores_are_recorded_not_refused(tmp_path):
    opened(tmp_path / "s")
    claim(tmp_path / "s", metadata(environment=metadata().environment | {"cores": 64, "git": None}))


def test_check_writable_creates_nothing(tmp_path):
    files.check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a directory"):
        files.check_writable(tmp_path / "file" / "b")
    with pytest.raises(UserError, match="cannot write to"):
        files.make_directory(Path("/proc/no/such"))


def test_an_unwritable_directory(tmp_path, monkeypatch):
    # a superuser, as in many containers, may write anywhere: what os.access says is set here
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="no permission in"):
        files.check_writable(tmp_path / "a")


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
def test_damaged_rows_are_found_wherever_they_are_damaged(seed, tmp_path, caplog):
    rng = np.random.default_rng(seed)
    directory = opened(tmp_path / "s")
    whole = rows.write_rows(directory, [row(seed=0), row(seed=1)], metadata())
    path = rows.write_rows(directory, [row(seed=2), row(seed=3)], metadata())
    if seed % 4:
        flip(path, rng)
    else:
        path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])
    for read in (rows.read_runs, rows.checked_files):
        with pytest.raises(Damaged, match=f"{path.name} is damaged"):
            read(directory)
    assert len(rows.finished_runs(directory, metadata())) == 2
    assert caplog.messages == [
        f"{path} is damaged (its SHA-256 differs): renamed to _{path.name}.corrupt"
    ]
    assert rows.row_files(directory) == [whole]
    assert path.with_name(f"_{path.name}.corrupt").exists()
    # nor do other readers average it in
    assert len(pq.read_table(directory / "runs")) == 2


def test_rows_made_otherwise_are_refused_wherever_they_come_from(tmp_path):
    directory = opened(tmp_path / "s")
    path = rows.write_rows(directory, [row()], metadata(fingerprint="g"))
    with pytest.raises(UserError, match=f"{path.name} has data=g; you asked for data=f"):
        rows.finished_runs(directory, metadata())
    with pytest.raises(UserError, match=f"{path.name} has data=g, and other rows here have data=f"):
        count_processors([path], metadata())


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_config_is_quarantined_and_rewritten(seed, tmp_path, caplog):
    directory = opened(tmp_path / "s")
    path = directory / "config.json"
    before = path.read_bytes()
    path.write_bytes(before[: len(before) * seed // 20])
    if seed % 4:
        path.write_bytes(before)
        flip(path, np.random.default_rng(seed))
    damaged = path.read_bytes()
    opened(directory)
    assert path.read_bytes() == before
    assert (directory / "_config.json.corrupt").read_bytes() == damaged
    assert "config.json is damaged" in caplog.text


def test_a_directory_that_a_user_emptied_and_filled_is_not_ours(tmp_path):
    """Its lock, a hidden file, stays."""
    directory = opened(tmp_path / "s")
    (directory / "config.json").write_text('{"model": "bert"}')
    for name in ("summary.json", "weights/all-lr0.1-seed0.npz"):
        (path := directory / name).parent.mkdir(exist_ok=True)
        path.write_bytes(b"theirs")
        before = content(directory)
        with pytest.raises(UserError, match=r"config\.json was not written by mlp_jax, or is"):
            opened(directory)
        assert content(directory) == before
        path.unlink()


def test_what_is_overwritten_is_ours(tmp_path, caplog):
    directory = opened(tmp_path / "s", metadata(seed=0))
    rows.write_rows(directory, [row()], metadata(seed=0))
    (directory / "config.json").write_text('{"model": "bert"}')
    clear(directory)
    assert (directory / "_config.json.corrupt").read_text() == '{"model": "bert"}'
    assert not rows.row_files(directory)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"{")])
def test_config_json_is_healed_from_the_rows_if_they_are_what_is_asked_for(damage, tmp_path):
    directory = opened(tmp_path / "s")
    rows.write_rows(directory, [row()], metadata())
    (directory / ".mlp_jax-lock-0-of-1").unlink()  # the rows alone show whose it is
    before = (directory / "config.json").read_bytes()
    damage(directory / "config.json")
    left = content(directory)
    assert check_out_dir(directory)
    assert read_metadata(directory) == metadata()
    with pytest.raises(UserError, match="has epochs=2; you asked for epochs=3"):
        claim(directory, metadata(config=Config(epochs=3)))
    assert content(directory) == left
    claim(directory, metadata(config=Config(epochs=2, learning_rate=0.1)))  # another rate is added
    assert (directory / "config.json").read_bytes() == before


def test_a_command_that_ends_while_it_heals_config_json_can_be_repeated(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    directory = opened(tmp_path / "s")
    before = (directory / "config.json").read_bytes()
    (directory / "config.json").write_bytes(b"{")
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(os, "fsync", full)
        opened(directory)
    opened(directory)
    assert (directory / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "config",
    [b"\x80\x02}q\x00.", b"lr: 0.1\n", b"[1]", b'{"lr": 0.1, "sha256": "' + b"0" * 64 + b'"}'],
)
def test_the_directory_of_another_program_is_refused_and_untouched(config, tmp_path):
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "model.bin").write_bytes(b"weights")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "all.parquet").write_bytes(b"rows")
    before = content(tmp_path)
    for use in (check_out_dir, opened):
        with pytest.raises(UserError, match=r"config\.json was not written by mlp_jax, or is"):
            use(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="is not empty and contains no mlp_jax results"):
        opened(tmp_path)
    (tmp_path / "config.json").write_bytes(config)
    assert content(tmp_path) == before


ANOTHER_VERSION = {
    "no recipe": lambda fields: fields.pop("recipe"),
    "no settings": lambda fields: fields["config"].clear(),
    "no learning rate": lambda fields: fields["config"].update(learning_rate=None),
    "a setting unknown here": lambda fields: fields["config"].update(widths=[512]),
    "a value not allowed here": lambda fields: fields["config"].update(epochs=0),
    "no random generator": lambda fields: fields["environment"].pop("prng"),
}


@pytest.mark.parametrize("change", ANOTHER_VERSION.values(), ids=ANOTHER_VERSION)
def test_a_signed_config_json_of_another_version_ends_in_one_line(change, tmp_path):
    fields = metadata().to_json()
    change(fields)
    files.write_signed_json(tmp_path / "config.json", fields)
    before = content(tmp_path)
    for use in (check_out_dir, read_metadata, opened):
        with pytest.raises(
            UserError, match=r"config\.json: (written by another|unknown|epochs|learning)"
        ):
            use(tmp_path)
    assert content(tmp_path) == before


def test_an_older_config_json_has_the_defaults_of_newer_settings(tmp_path):
    fields = metadata(config=Config(epochs=2, schedule="constant")).to_json()
    del fields["config"]["schedule"]
    fields["config"]["learning_rate"] = [0.01, 0.1]  # as sweeps once had them
    (tmp_path / "s").mkdir()
    files.write_signed_json(tmp_path / "s" / "config.json", fields)
    before = content(tmp_path)
    opened(tmp_path / "s")
    assert before.items() <= content(tmp_path).items()
    with pytest.raises(UserError, match="has schedule=constant; you asked for schedule=cosine"):
        opened(tmp_path / "s", metadata(config=Config(epochs=2, schedule="cosine")))


def test_the_parquet_files_of_others_are_named_and_left_alone(tmp_path, caplog):
    directory = opened(tmp_path / "s")
    path = rows.write_rows(directory, [row()], metadata())
    pq.write_table(rows.read_runs(directory), user := directory / "runs" / "all.parquet")
    before = content(directory)
    assert len(rows.finished_runs(directory, metadata())) == 1
    assert len(rows.read_runs(directory)) == 1
    assert rows.checked_files(directory) == [path]
    assert caplog.messages == [f"{user} is ignored: not a name that mlp_jax gives"] * 3
    assert content(directory) == before


@pytest.mark.parametrize("prefix", ["copy-of-", "Copy-of-", "._"])  # sorted after or before
def test_of_a_file_and_its_copies_the_file_is_read(prefix, tmp_path, caplog):
    directory = opened(tmp_path / "s")
    path = rows.write_rows(directory, [row()], metadata())
    copy = path.with_name(f"{prefix}{path.name}")
    for content in (path.read_bytes(), b"damaged"):
        copy.write_bytes(content)
        assert len(rows.finished_runs(directory, metadata())) == 1
        assert len(rows.read_runs(directory)) == 1
        assert rows.checked_files(directory) == [path]
        assert copy.read_bytes() == content
    assert len(caplog.messages) == 6
    assert all(message.startswith(f"{copy} is ignored: ") for message in caplog.messages)


def test_what_cannot_be_read_is_neither_called_damaged_nor_renamed(tmp_path, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    directory = opened(tmp_path / "s")
    path = rows.write_rows(directory, [row()], metadata())
    files.save_arrays(directory / "a.npz", {"a": np.ones(2)}, {})
    before = content(directory)
    uses = [(check_out_dir, directory), (read_metadata, directory), (claim, directory, metadata())]
    uses += [(rows.finished_runs, directory, metadata()), (rows.checked_files, directory)]
    uses += [(rows.check_content, path), (files.load_arrays, directory / "a.npz")]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", refuse)
        for use, *args in uses:
            with pytest.raises((UserError, OSError), match="Permission denied") as caught:
                use(*args)
            assert not isinstance(caught.value, Damaged)
    assert content(directory) == before
    assert not caplog.messages


def test_a_directory_has_one_command_at_a_time(tmp_path):
    hold = (
        "import sys, time\nfrom pathlib import Path\nfrom mlp_jax import files\n"
        "with files.locked(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])):\n"
        "    print('held', flush=True)\n    time.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "s")]
    with subprocess.Popen([*command, "0", "2"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with files.locked(tmp_path / "s", 1, 2):
            pass  # another process of the same command
        for process, processes in ((0, 2), (0, 1), (2, 3)):
            refused = pytest.raises(UserError, match="s is in use by another process")
            with refused, files.locked(tmp_path / "s", process, processes):
                pytest.fail("two commands share a directory")
        other.kill()
    # what the dead process left means nothing
    assert list((tmp_path / "s").glob(f"{files.LOCK}*"))
    (tmp_path / "s" / ".rows.parquet.0123456789abcdef.tmp").touch()
    with files.locked(tmp_path / "s"):
        assert not list((tmp_path / "s").glob(".*.tmp"))
