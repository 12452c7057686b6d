"""Mistakes of users, and commands that meet: one line, no wrong number, no file lost."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mlp_jax as mj
from mlp_jax import experiment
from mlp_jax.compact import main as compact_main
from mlp_jax.compare import main as compare_main
from mlp_jax.data import dataset as datasets
from mlp_jax.data.dataset import CACHE
from mlp_jax.demo import main as demo_main
from mlp_jax.errors import UserError
from mlp_jax.files import Damaged, load_arrays, save_arrays, write_signed_json
from mlp_jax.predict import main as predict_main
from mlp_jax.records import compaction, directory, rows
from mlp_jax.records.checkpoint import (
    check_predictions,
    for_upright,
    has_weights,
    load_checkpoint,
    load_committee,
    save_checkpoint,
)
from mlp_jax.records.provenance import FORMER_NUMERICS, Metadata, describe_environment, git_state
from mlp_jax.report import main as report_main
from mlp_jax.results import count_processors, open_target
from mlp_jax.sweep import main as sweep_main
from mlp_jax.train import main as train_main
from mlp_jax.training import augment, model, programs, step
from mlp_jax.training import fit as fit_module
from mlp_jax.training import run as runs
from mlp_jax.training.arrays import Split, count_steps, for_dataset, make_dataset, with_teacher
from mlp_jax.training.config import Config
from mlp_jax.training.fit import fit
from mlp_jax.training.parallel import COMPILER_OPTIONS, numerics
from mlp_jax.training.run import make_run
from mlp_jax.verify import main as verify_main

TINY = [
    *("--dataset", "kmnist", "--hidden", "16", "8", "--batch-size", "32", "--quiet"),
    *("--epochs", "2", "--learning-rate", "0.1"),
]


@pytest.fixture
def swept(small_dir, here):
    def sweep(*flags):
        sweep_main([*TINY, "--data-dir", str(small_dir), *flags])

    return sweep


@pytest.fixture
def data(small_dir):
    return ["--data-dir", str(small_dir)]


def write(where, table):
    path, content = rows.encode(Path(where), table)
    path.write_bytes(content)


def other_code(path):
    """A file of the same rows, as of other training code."""
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"about"]) | {"program": "0" * 64}
    return table.replace_schema_metadata({"about": json.dumps(about)})


# rows of different code ---------------------------------------------------------------------------


def test_shards_with_different_code_are_not_pooled(swept, monkeypatch):
    """The second began before the first had compiled, so that neither saw the other's code."""
    monkeypatch.setattr(directory, "claim", lambda *_: None)
    swept("--seeds", "0:4", "--out", "s", "--shard", "0/2")
    metadata = directory.stored_metadata(Path("s"))
    write_signed_json(Path("s/config.json"), metadata._replace(program="0" * 64).to_json())
    with pytest.raises(UserError, match="s was trained with different training code"):
        swept("--seeds", "0:4", "--out", "s", "--shard", "1/2")
    assert len(mj.read_runs("s")) == 2


def test_edited_code_that_counts_the_steps_is_refused(swept, monkeypatch):
    """The compiled program does not depend on their number."""
    swept("--seeds", "0:1", "--out", "s")
    for module in (fit_module, programs):
        monkeypatch.setattr(module, "count_steps", lambda config, n: count_steps(config, n) - 1)
    with pytest.raises(UserError, match="parquet was trained with different training code"):
        swept("--seeds", "0:2", "--out", "s")
    swept("--seeds", "0:2", "--out", "s", "--allow-mixed")
    assert len(mj.read_runs("s")) == 2


def test_the_fingerprint_of_the_code_sees_its_constants(small, monkeypatch):
    config = Config(hidden=(8,), elastic=1.0, batch_size=32, n_classes=4)
    before = programs.fingerprint_code(config, small.arrays)
    assert programs.fingerprint_code(config, small.arrays) == before
    edited = augment.smooth_basis(config.elastic_sigma) * 1.001
    monkeypatch.setattr(augment, "smooth_basis", lambda sigma: edited)
    assert programs.fingerprint_code(config, small.arrays) != before


@pytest.mark.parametrize("simplified", [False, True])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_also_those_within_inner_functions(wrap, simplified, config, small, monkeypatch):
    """As of a fork that subtracts the mean image; JAX keeps constants in two ways."""
    if "jax_use_simplified_jaxpr_constants" not in jax.config.values:
        pytest.skip("a JAX that has one way only")
    found, to_float = set(), step.to_float
    jax.config.update("jax_use_simplified_jaxpr_constants", simplified)
    try:
        for value in (0.1, 0.2):
            mean = np.full(784, value, np.float32)
            inner = wrap(
                lambda pixels, mean=mean: to_float(pixels) - mean[(None,) * (pixels.ndim - 1)]
            )
            monkeypatch.setattr(step, "to_float", inner)
            found.add(programs.fingerprint_code(config, small.arrays))
    finally:
        jax.config.update("jax_use_simplified_jaxpr_constants", False)
    assert len(found) == 2


def test_arrays_in_bfloat16_are_kept(tmp_path):
    """As a fork may train in: NumPy writes them, and reads something else."""
    arrays = {"a/kernel": np.asarray(jnp.arange(5, dtype=jnp.bfloat16)), "b c": np.ones(2)}
    save_arrays(tmp_path / "a.npz", arrays, {"n": 3})
    found, metadata = load_arrays(tmp_path / "a.npz")
    assert (metadata, found.keys()) == ({"n": 3}, arrays.keys())
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_config_json_names_the_code_before_the_first_row(swept):
    swept("--seeds", "0:1", "--out", "s")
    program = json.loads(Path("s/config.json").read_text())["program"]
    (path,) = rows.row_files(Path("s"))
    assert rows.read_metadata(path).program == program


def test_files_of_different_code_side_by_side_are_refused(swept, data):
    swept("--seeds", "0:1", "--out", "s")
    swept("--seeds", "1:2", "--out", "t")
    (path,) = rows.row_files(Path("t"))
    write("s", other_code(path))
    older = directory.stored_metadata(Path("s"))._replace(program=None)
    with pytest.raises(UserError, match="different training code"):
        count_processors(rows.row_files(Path("s")), older)
    with pytest.raises(UserError, match="different training code"):
        report_main(["s", *data])


def test_compare_names_other_code_and_not_a_missing_fingerprint(swept, data, capsys):
    for out in ("s", "t", "u"):
        swept("--seeds", "0:3", "--out", out)
    config = directory.stored_metadata(Path("t"))._replace(program=None)
    write_signed_json(Path("t/config.json"), config.to_json())
    (path,) = rows.row_files(Path("u"))
    write("u", other_code(path))
    path.unlink()
    config = directory.stored_metadata(Path("u"))._replace(program="0" * 64)
    write_signed_json(Path("u/config.json"), config.to_json())
    compare_main(["s", "t", *data])
    assert "They differ in no setting" in capsys.readouterr().out
    compare_main(["s", "u", *data])
    assert "They differ in training code" in capsys.readouterr().out


def test_a_mixed_file_does_not_speak_for_a_directory(swept, data):
    for seed in range(3):
        swept("--seeds", f"{seed}:{seed + 1}", "--out", "s")
    first, second, _ = rows.row_files(Path("s"))
    program = rows.read_metadata(second).program
    mixed = other_code(first)
    about = json.loads(mixed.schema.metadata[b"about"]) | {"mixed": True}
    first.unlink()
    write("s", mixed.replace_schema_metadata({"about": json.dumps(about)}))
    Path("s/config.json").unlink()
    assert directory.stored_metadata(Path("s")).program == program
    swept("--seeds", "0:4", "--out", "s")
    report_main(["s", *data])
    write("s", other_code(rows.row_files(Path("s"))[-1]))
    with pytest.raises(UserError, match="different training code"):
        report_main(["s", *data])


def test_an_older_record_gains_the_code_that_extends_it(swept):
    swept("--seeds", "0:1", "--out", "s")
    (path,) = rows.row_files(Path("s"))
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"about"])
    program = about.pop("program")
    path.unlink()
    write("s", table.replace_schema_metadata({"about": json.dumps(about)}))
    older = directory.stored_metadata(Path("s"))._replace(program=None)
    write_signed_json(Path("s/config.json"), older.to_json())
    directory.claim(Path("s"), older._replace(program="0" * 64))
    with pytest.raises(UserError, match="different training code"):
        swept("--seeds", "0:2", "--out", "s")
    write_signed_json(Path("s/config.json"), older.to_json())
    directory.claim(Path("s"), older._replace(program="0" * 64, mixed=True))  # not by rows beside
    assert directory.stored_metadata(Path("s")).program is None
    swept("--seeds", "0:2", "--out", "s")
    assert directory.stored_metadata(Path("s")).program == program


# compaction ---------------------------------------------------------------------------------------


def test_a_sweep_that_is_compacted_while_it_is_compared_is_one_line(swept, data):
    swept("--seeds", "0:4", "--chunk", "2", "--out", "s")
    target = open_target("s")
    compact_main(["s"])
    with pytest.raises(UserError, match=r"parquet is gone, as after `compact`: run this again"):
        target.read_family(Path(data[1]))
    assert len(open_target("s").read_family(Path(data[1])).seeds) == 4


def test_weights_of_other_code_than_their_row_are_named(swept, caplog):
    swept("--seeds", "0:1", "--out", "s")
    (path,) = rows.row_files(Path("s"))
    table = pq.read_table(path)
    i, correct = table.column_names.index("test_correct"), table["test_correct"][0].as_py()
    path.unlink()
    write("s", table.set_column(i, table.field(i), pa.array([correct - 1], table.field(i).type)))
    swept("--seeds", "0:1", "--out", "s", "--keep-weights")
    line = f"seed 0: its row has {correct - 1} correct, and the weights stored now have {correct}"
    assert line in caplog.text


def test_mixed_rows_are_named_and_do_not_speak_for_a_sweep(swept, caplog):
    for out, seeds in (("s", "0:2"), ("t", "2:4")):
        swept("--seeds", seeds, "--out", out)
    program = open_target("s").metadata.program
    (path,) = rows.row_files(Path("t"))
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"about"]) | {"program": "0" * 64, "mixed": True}
    write("s", table.replace_schema_metadata({"about": json.dumps(about)}))
    assert open_target("s").metadata.program == program
    assert len(mj.read_runs("s")) == 4
    assert "s has 2 rows stored by --allow-mixed" in caplog.text


def test_a_reader_beside_compact_sees_each_row_once(swept, monkeypatch):
    swept("--seeds", "0:6", "--chunk", "1", "--devices", "1", "--out", "s")
    place = Path("s")
    seen, read_merge = [], rows.read_merge
    steps = iter(compaction_steps(place))

    def reading(where):  # between a look at the note and the listing, compact makes a step
        merge = read_merge(where)
        next(steps, None)
        return merge

    monkeypatch.setattr(rows, "read_merge", reading)
    while len(seen) < 8:
        seen.append(sorted(seed for *_, seed in rows.run_ids(rows.read_table(listed(place), []))))
    assert seen == [list(range(6))] * 8


def listed(place):
    """The files that are read, as they were when listed."""
    kept = Path("kept")
    shutil.rmtree(kept, ignore_errors=True)
    paths = rows.row_files(place)
    kept.mkdir()
    for path in paths:
        if path.exists():
            shutil.copy(path, kept)
    return sorted(kept.iterdir())


def compaction_steps(place):
    """What `compact` does, one change of the directory after another."""
    paths = sorted(place.glob("runs/*.parquet"))
    merged, content = rows.encode(place, pa.concat_tables(map(pq.read_table, paths)))
    note = {"into": merged.name, "merged": [path.name for path in paths]}
    write_signed_json(place / rows.MERGE, note)
    yield
    merged.write_bytes(content)
    yield


def test_compact_keeps_what_a_damaged_merge_merged(swept, caplog):
    swept("--seeds", "0:4", "--chunk", "1", "--devices", "1", "--out", "s")
    for _ in compaction_steps(Path("s")):
        pass
    merged = Path("s/runs", rows.read_merge(Path("s"))["into"])
    merged.write_bytes(merged.read_bytes()[:-1] + b"x")
    compaction.compact(Path("s"))
    assert len(mj.read_runs("s")) == 4
    assert "renamed to" in caplog.text


def test_a_sweep_keeps_what_a_damaged_merge_merged(swept, monkeypatch, caplog):
    swept("--seeds", "0:4", "--chunk", "1", "--out", "s")
    before = rows.read_runs("s")
    monkeypatch.setattr(compaction, "_remove_merged", lambda directory: None)  # killed before it
    compaction.compact(Path("s"))
    (merged,) = rows.row_files(Path("s"))
    merged.write_bytes(merged.read_bytes()[:-9])
    swept("--seeds", "0:5", "--out", "s")
    assert f"renamed to _{merged.name}.corrupt" in caplog.text
    assert rows.read_runs("s").slice(0, 4).equals(before)  # with their seconds: not trained again
    assert len(rows.read_runs("s")) == 5


def test_a_checkpoint_of_other_runs_is_quarantined(config, small, tmp_path, caplog):
    about = Metadata("custom", config, small.fingerprint, describe_environment(jax.devices()))
    snapshot = next(fit(config, small, seeds=(3, 4))).snapshot()
    path = tmp_path / "c.npz"
    save_checkpoint(path, snapshot, [1.0], about)
    assert load_checkpoint(path, snapshot.runs, about)
    others = [make_run(seed, config.learning_rate) for seed in (5, 6)]
    assert load_checkpoint(path, others, about) is None
    assert "it belongs to other runs" in caplog.text


def test_a_damaged_file_that_cannot_be_renamed_is_trained_again(swept, caplog):
    swept("--seeds", "0:2", "--chunk", "1", "--devices", "1", "--out", "s")
    path = rows.row_files(Path("s"))[0]
    path.write_bytes(path.read_bytes()[:-9])
    path.with_name(f"_{path.name}.corrupt").mkdir()
    swept("--seeds", "0:2", "--devices", "1", "--out", "s")
    assert "left where it is" in caplog.text
    assert rows.row_files(Path("s"))


def test_weights_of_other_numbers_are_made_again(swept):
    swept("--seeds", "0:2", "--keep-weights", "--out", "s")
    swept("--seeds", "0:2", "--dropout", "0.5", "--keep-weights", "--out", "t")
    right, wrong = (sorted(Path(name, "weights").iterdir()) for name in "st")
    arrays, fields = load_arrays(wrong[1])
    ours = load_arrays(right[1])[1]["run"]
    save_arrays(right[1], arrays, fields | {"run": ours})  # as trained with other numerics
    Path("s/weights/._all-lr0.1-seed0.npz").write_text("of macOS")
    swept("--seeds", "0:2", "--keep-weights", "--out", "s")
    table = mj.read_runs("s", ["test_loss"])["test_loss"].to_pylist()
    assert [mj.load_run("s", seed).metrics["test_loss"] for seed in (0, 1)] == table


def test_the_settings_of_a_run_have_its_own_rate(swept):
    swept("--learning-rate", "0.1", "0.3", "--seeds", "0:1", "--keep-weights", "--out", "s")
    run = mj.load_run("s", 0, learning_rate=0.3)
    assert run.config.learning_rate == 0.3


def test_rows_whose_held_seeds_differ_are_not_one_family(swept, data, monkeypatch):
    swept("--vary", "order", "--seeds", "0:2", "--out", "s")
    monkeypatch.setattr("mlp_jax.training.run.HELD_SEED", 1)
    swept("--vary", "order", "--seeds", "0:4", "--out", "s")
    with pytest.raises(UserError, match="seed 0, family order has seeds"):
        report_main(["s", *data])


def test_the_commit_is_that_of_the_code_in_memory(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)  # not asked again
    assert describe_environment(jax.devices())["git"] == git_state()


def test_weights_that_are_left_say_whose_they_are(swept, data):
    swept("--keep-weights", "--seeds", "0:2", "--out", "s")
    shutil.rmtree("s/runs")
    Path("s/config.json").unlink()
    with pytest.raises(UserError, match="s has a sweep"):
        train_main(["--recipe", "short", "--seed", "9", "--overwrite", "--out", "s", *data])
    with pytest.raises(UserError, match="s has dropout="):
        swept("--keep-weights", "--dropout", "0.5", "--out", "s")
    assert len(load_committee("s").runs) == 2


def test_a_broken_row_beside_a_broken_config_is_quarantined(swept, caplog):
    swept("--seeds", "0:2", "--chunk", "1", "--out", "s")
    path = min(Path("s/runs").iterdir())
    path.write_bytes(path.read_bytes()[:-40])
    Path("s/config.json").write_text("{")
    swept("--seeds", "0:2", "--chunk", "1", "--out", "s")
    assert len(mj.read_runs("s")) == 2


def test_weights_under_another_network_are_not_used(swept, data, monkeypatch):
    swept("--keep-weights", "--seeds", "0:2", "--out", "s")
    dataset, committee = mj.load_dataset("kmnist", data[1]), load_committee("s")
    check_predictions(committee, dataset)
    edited = committee._replace(params=jax.tree.map(lambda leaf: leaf[::-1], committee.params))
    edited = edited._replace(params=edited.params | {"output": committee.params["output"]})
    with pytest.raises(UserError, match=r"seed 0 had .* the code of the network has changed"):
        check_predictions(edited, dataset)
    monkeypatch.setattr("mlp_jax.experiment.load_committee", lambda teacher: edited)
    with pytest.raises(UserError, match="the code of the network has changed"):
        experiment.load_data(Config(dataset="kmnist"), teacher=Path("s"), data_dir=data[1])


def test_photos_are_turned_for_networks_of_emnist(swept, data, small):
    swept("--keep-weights", "--seeds", "0:2", "--out", "s")
    committee = load_committee("s")
    assert for_upright(committee) is committee
    emnist = committee._replace(
        config=dataclasses.replace(committee.config, dataset="emnist/digits")
    )
    own = committee._replace(config=dataclasses.replace(committee.config, dataset="emnist_mine"))
    assert for_upright(own) is own
    turned = small.test.images.reshape(-1, 28, 28).transpose(0, 2, 1)
    np.testing.assert_allclose(
        mj.predict(for_upright(emnist), turned), mj.predict(emnist, small.test.images), atol=1e-5
    )


def test_options_of_the_compiler_are_numerics(monkeypatch):
    assert numerics()["compiler_options"] == FORMER_NUMERICS["compiler_options"]
    monkeypatch.setitem(COMPILER_OPTIONS, "init", {})
    now = describe_environment(jax.devices())["compiler_options"]
    assert now != FORMER_NUMERICS["compiler_options"]


def test_a_page_has_the_shipped_weights_as_they_are_stored(here):
    demo_main(["-o", "page.html"])
    page = Path("page.html").read_text()
    assert '"dtype": "float16"' in page
    assert len(page) < 10e6


def test_fit_needs_a_run(config, small):
    with pytest.raises(UserError, match="at least one run"):
        fit(config, small, seeds=[])


def test_a_data_set_is_a_copy(small, tmp_path):
    np.save(tmp_path / "images.npy", small.train.images)
    images = small.train.images.copy()
    frozen = images.view()
    frozen.flags.writeable = False
    in_file = np.load(tmp_path / "images.npy", mmap_mode="r+")
    read_only = np.load(tmp_path / "images.npy", mmap_mode="r")
    owner = small.train.images.copy()
    writable = owner[:]
    owner.flags.writeable = False
    made = [
        make_dataset("mine", small.train._replace(images=given), small.test, 4).train.images
        for given in (images, frozen, in_file, read_only, owner)
    ]
    images[:] = in_file[:] = writable[:] = 0
    assert not frozen.any()
    assert not read_only.any()
    for each in made:
        np.testing.assert_array_equal(each, small.train.images)


def test_labels_of_another_byte_order_are_the_same_labels(config, small):
    labels = small.train.labels.astype(">i4")
    made = make_dataset(small.name, small.train._replace(labels=labels), small.test, 4)
    assert made.fingerprint == small.fingerprint
    next(fit(config, made))


@pytest.mark.parametrize("flags", [["--elastic-sigma", "1e200"], ["--crossed", "9" * 20]])
def test_a_number_that_is_much_too_large(flags, swept):
    with pytest.raises(UserError, match="at most"):
        swept(*flags, "--out", "s")


def test_xla_flags_may_be_in_a_file(tmp_path, monkeypatch):
    (tmp_path / "flags").write_text("--xla_cpu_enable_fast_math=true\n")
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    environment = describe_environment(jax.devices())
    assert environment["xla_flags"] == "--xla_cpu_enable_fast_math=true"


def test_a_rate_does_not_depend_on_how_numpy_prints():
    usual = make_run(0, 0.1234567891)
    with np.printoptions(precision=3, legacy="1.13"):
        assert make_run(0, 0.1234567891) == usual
    assert np.float32(usual.learning_rate) == np.float32(0.1234567891)


def test_weights_are_found_by_any_number_of_the_same_rate(swept):
    swept("--learning-rate", "0.1234567891", "--seeds", "0:1", "--keep-weights", "--out", "s")
    for rate in (0.1234567891, np.float32(0.1234567891)):
        assert mj.load_run("s", 0, learning_rate=rate).run == make_run(0, 0.1234567891)


def test_compact_refuses_a_run_in_two_files_and_names_them(swept):
    swept("--seeds", "0:2", "--chunk", "1", "--devices", "1", "--out", "s")
    table = pq.read_table(rows.row_files(Path("s"))[0])
    write("s", table.set_column(table.column_names.index("seconds"), "seconds", [[9.0]]))
    with pytest.raises(UserError, match=r"s/runs/.* and s/runs/.* contain the same run: remove"):
        compact_main(["s"])
    assert len(rows.row_files(Path("s"))) == 3


def test_compact_passes_over_sweeps_of_a_grid_without_rows(swept, capsys):
    swept("--seeds", "0:2", "--chunk", "1", "--devices", "1", "--dropout", "0", "0.5", "--out", "g")
    for path in rows.row_files(Path("g/dropout=0.0")):
        path.unlink()
    compact_main(["g"])
    assert capsys.readouterr().out == "g/dropout=0.5: 2 files are now 1\n"


# numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_correct", "test_loss", "dropout_seed"])
def test_verify_sees_each_altered_number(name, swept, data, capsys):
    swept("--seeds", "0:1", "--out", "s")
    (path,) = rows.row_files(Path("s"))
    table = pq.read_table(path)
    altered = pa.array([table[name][0].as_py() + 1], table.schema.field(name).type)
    write("s", table.set_column(table.column_names.index(name), name, altered))
    path.unlink()
    with pytest.raises(SystemExit):
        verify_main(["s", *data])
    assert "DIFFERENT" in capsys.readouterr().out


def test_a_run_whose_loss_was_once_infinite_diverged_for_all(swept, data, capsys):
    swept("--seeds", "0:3", "--out", "g/a=1")
    swept("--seeds", "0:3", "--dropout", "0", "--out", "g/a=2")
    (path,) = rows.row_files(Path("g/a=1"))
    table = pq.read_table(path)
    losses = table["train_loss_by_epoch"].to_pylist()
    losses[1][0] = math.inf
    column = pa.array(losses, table.schema.field("train_loss_by_epoch").type)
    i = table.column_names.index("train_loss_by_epoch")
    path.unlink()
    write("g/a=1", table.set_column(i, "train_loss_by_epoch", column))
    scores = rows.read_scores(rows.checked_files(Path("g/a=1")))
    (diverged,) = (run for run, score in scores.items() if score != score)
    report_main(["g/a=1", *data])
    said = capsys.readouterr().out
    assert f"1 that diverged, excluded from all statistics: seeds [{diverged[2]}]" in said
    finished = rows.finished_runs(Path("g/a=1"), directory.read_metadata(Path("g/a=1")))
    assert sum(not row["finite"] for row in finished.values()) == 1


def test_validation_images_are_called_so(swept, data, capsys):
    swept("--split", "validation", "--seeds", "0:3", "--keep-weights", "--out", "s")
    report_main(["s", *data])
    assert "validation images 50" in capsys.readouterr().out
    compare_main(["s", "s", *data])
    assert "On this validation set" in capsys.readouterr().out
    demo_main(["-o", "page.html", "--run", "s"])
    assert "of the validation images" in Path("page.html").read_text("utf-8")


def test_a_page_says_in_what_its_networks_differ(swept):
    flags = ("--seeds", "0:2", "--keep-weights", "--out", "s")
    swept(*flags, "--learning-rate", "0.1", "0.05")
    demo_main(["-o", "page.html", "--run", "s"])
    assert "nothing but their seeds and learning rates" in Path("page.html").read_text("utf-8")


def test_rates_that_are_close_have_names_of_their_own(swept, data, capsys):
    swept("--seeds", "0:3", "--learning-rate", "0.1234567", "0.1234568", "--out", "s")
    compare_main(["s@0.1234567", "s@0.1234568", *data])
    report_main(["s", *data])
    assert "P(learning rate 0.1234567 beats 0.1234568)" in capsys.readouterr().out.replace(
        "0.1234568 beats 0.1234567", "0.1234567 beats 0.1234568"
    )


# the API ------------------------------------------------------------------------------------------


def test_an_unknown_split_is_not_the_test_set():
    with pytest.raises(UserError, match="split must be test or validation, not 'val'"):
        mj.load_dataset("mnist", split="val")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "mse"}, "loss must be one of softmax, squared-hinge; not 'mse'"),
        ({"examples": "Half"}, "examples must be one of"),
        ({"optimizer": "Adam"}, "optimizer must be one of"),
        ({"cycles": 10**41}, "cycles must be at most"),
        ({"batch_size": 1.5}, "batch size must be an integer, not 1.5"),
    ],
)
def test_settings_that_are_misspelt_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Config(**settings)


def test_numbers_of_numpy_are_settings():
    assert json.dumps(dataclasses.asdict(Config(hidden=(np.int64(8), 4))))
    assert Config(learning_rate=np.float32(0.01), batch_size=np.int64(128)) == Config()
    config = Config(batch_size=np.int64(32), learning_rate=np.float32(0.5))
    assert json.loads(json.dumps(dataclasses.asdict(config)))["batch_size"] == 32


def test_a_snapshot_starts_its_own_runs_alone(config, small):
    snapshot = next(fit(config, small, seeds=(7, 8))).snapshot()
    with pytest.raises(UserError, match="belongs to other runs"):
        fit(config, small, seeds=(3, 4), start=snapshot)
    other = dataclasses.replace(config, dropout=0.5)
    with pytest.raises(UserError, match="with different settings"):
        fit(other, small, seeds=(7, 8), start=snapshot)
    for elsewhere in (small._replace(name="mine"), with_teacher(small, *trained(config, small))):
        with pytest.raises(UserError, match="with different settings"):
            fit(config, elsewhere, seeds=(7, 8), start=snapshot)
    labels = (small.train.labels + 1) % 4
    wrong = make_dataset(small.name, small.train._replace(labels=labels), small.test, 4)
    with pytest.raises(UserError, match="on different data"):
        fit(config, wrong, seeds=(7, 8), start=snapshot)
    decayed = dataclasses.replace(config, schedule="linear")
    start = next(fit(decayed, small, seeds=(7,))).snapshot()
    with pytest.raises(UserError, match="with different settings"):
        fit(dataclasses.replace(decayed, epochs=5), small, seeds=(7,), start=start)
    longer = dataclasses.replace(config, epochs=5)
    older = snapshot._replace(history={"train_loss": snapshot.history["train_loss"]})
    with pytest.raises(UserError, match="has other metrics: test_correct"):
        next(fit(longer, small, seeds=(7, 8), start=older))
    assert [each.epoch for each in fit(longer, small, seeds=(7, 8), start=snapshot)] == [2, 3, 4, 5]


def trained(config, data):
    """A Config, and the params of a committee of two."""
    config = for_dataset(config, data)
    *_, last = fit(config, data, seeds=(0, 1))
    return config, last.fetch_params()


def test_a_setting_of_jax_that_changes_is_compiled_in(config, small):
    config = dataclasses.replace(config, epochs=1)
    before = jax.config.values["jax_default_prng_impl"]
    first, other, again = [], [], []
    for losses, generator in ((first, before), (other, "rbg"), (again, before)):
        jax.config.update("jax_default_prng_impl", generator)
        losses += next(fit(config, small, seeds=(0,))).history["train_loss"].tolist()
    assert first == again != other


@pytest.mark.parametrize(
    "images", [np.zeros((2, 784)), np.zeros((2, 784), bool), np.zeros((2, 32, 32), np.uint8)]
)
def test_predict_takes_images_as_mnist_has_them(images, swept):
    swept("--seeds", "0:1", "--keep-weights", "--out", "s")
    with pytest.raises(UserError, match=r"images must be uint8 \[n, 784\] or \[n, 28, 28\], not"):
        mj.predict(mj.load_run("s"), images)


def test_weights_under_another_runs_name_are_damaged(swept):
    swept("--seeds", "0:2", "--keep-weights", "--out", "s")
    shutil.copy("s/weights/all-lr0.1-seed0.npz", "s/weights/all-lr0.1-seed1.npz")
    with pytest.raises(Damaged, match="it holds the weights of seed 0"):
        mj.load_run("s", 1)
    metadata = directory.read_metadata(Path("s"))
    assert has_weights(Path("s"), make_run(0, 0.1), metadata, {})
    assert not has_weights(Path("s"), make_run(1, 0.1), metadata, {})
    swept("--seeds", "0:2", "--keep-weights", "--out", "s")
    assert mj.load_run("s", 1).run.seed == 1


def test_weights_of_other_settings_do_not_vote(swept):
    flags = ("--seeds", "0:2", "--keep-weights")
    swept(*flags, "--out", "s")
    swept(*flags, "--dropout", "0.5", "--out", "t")
    other = "weights/all-lr0.1-seed1.npz"
    shutil.copy(Path("t", other), Path("s", other))
    assert not has_weights(Path("s"), make_run(1, 0.1), directory.read_metadata(Path("s")), {})
    with pytest.raises(UserError, match="differ in settings or data: remove one of them"):
        load_committee("s")
    swept(*flags, "--out", "s")
    assert load_committee("s").config.dropout == 0.2


def test_the_run_to_load_is_named(swept):
    swept("--seeds", "0:2", "--keep-weights", "--out", "s", "--learning-rate", "0.1", "0.05")
    for wanted, message in (
        ({}, "s has weights of 4 such runs: choose one by seed"),
        ({"seed": 1}, "s has weights of 2 such runs: choose one by vary or learning_rate"),
        ({"seed": 7}, "s has no weights of such a run"),
        ({"seed": 1, "vary": "order"}, "s has no weights of such a run"),
    ):
        with pytest.raises(UserError, match=message):
            mj.load_run("s", **wanted)
    for rate in (0.1, 0.05):
        run = mj.load_run("s", 1, "all", rate).run
        assert (run.seed, run.learning_rate) == (1, rate)
    with pytest.raises(TypeError):
        mj.load_run("s", "*")


def test_a_snapshot_within_an_epoch_is_not_trained_further(config, small):
    part = dataclasses.replace(config, epochs=0.7)
    *_, end = fit(part, small, seeds=(7,))
    with pytest.raises(UserError, match=r"of 0\.7 epochs cannot be extended"):
        fit(dataclasses.replace(config, epochs=2), small, seeds=(7,), start=end.snapshot())
    assert not list(fit(part, small, seeds=(7,), start=end.snapshot()))


def test_arrays_that_were_changed_have_no_fingerprint(config, small, here):
    noisy = small._replace(train=small.train._replace(labels=small.train.labels[::-1]))
    with pytest.raises(UserError, match=r"were changed after it was loaded: pass them to \S+make"):
        mj.sweep(config, noisy, "s", seeds=[0])
    assert not Path("s").exists()
    made = make_dataset("mine", noisy.train, noisy.test, noisy.n_classes)
    assert len(mj.sweep(config, made, "s", seeds=[0])) == 1


def test_validation_is_never_the_test_set(config, small, here):
    config = dataclasses.replace(config, split="validation")
    with pytest.raises(UserError, match="needs load_dataset"):
        mj.sweep(config, small, "s", seeds=[0])
    with pytest.raises(UserError, match="needs load_dataset"):
        fit(config, small)


def test_arrays_are_checked(small):
    (images, labels), test = small.train, small.test
    for wrong, message in (
        (Split(images / 255.0, labels), r"training images must be uint8 \[n, 784\], not float64"),
        (Split(images[:, :9], labels), r"training images must be uint8 \[n, 784\], not uint8"),
        (Split(images, labels[:-1]), "training labels must be an integer from 0 to 3 for each"),
        (Split(images, labels + 1), "training labels must be an integer from 0 to 3"),
        (Split(images, labels - 1), "training labels must be an integer from 0 to 3"),
        (Split(images, labels.astype(float)), "training labels must be an integer from 0 to 3"),
    ):
        with pytest.raises(UserError, match=message):
            make_dataset("mine", wrong, test, small.n_classes)


def test_arrays_in_use_cannot_be_changed(config, small):
    with pytest.raises(ValueError, match="read-only"):
        small.train.images[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        next(fit(config, small)).history["train_loss"][0, 0] = 77


def test_a_teacher_that_was_changed_does_not_teach(config, small, here):
    committee, params = trained(config, small)
    taught = with_teacher(small, committee, params)
    taught.teacher.params["output"]["bias"] = params["output"]["bias"] + 1
    with pytest.raises(UserError, match="the teacher's weights were changed"):
        mj.sweep(config, taught, "s", seeds=[0])


@pytest.mark.parametrize("option", ["devices", "lanes"])
def test_sweep_trains_on_at_least_one(option, config, small, here):
    with pytest.raises(UserError, match=f"{option} must be at least 1, not 0"):
        mj.sweep(config, small, "s", seeds=[0], **{option: 0})


def test_prediction_uses_the_network_as_it_is_now(config, small, here, monkeypatch):
    mj.sweep(config, small, "s", seeds=[0], keep_weights=True)
    run, images = mj.load_run("s"), small.test.images
    before = mj.predict(run, images)
    monkeypatch.setattr(model, "to_float", lambda images: images.astype("float32") / 100)
    assert (mj.predict(run, images) != before).any()


def test_a_stream_too_many_is_not_crossed(config, monkeypatch):
    """Stored blocks keep their numbering in a fork that adds a stream."""
    assert runs.make_run(37, 0.1, "crossed").seeds == (3, 2, 3, 2, 2)
    monkeypatch.setattr(runs, "STREAMS", (*runs.STREAMS, "extra"))
    with pytest.raises(UserError, match="no room for the stream extra"):
        runs.crossed_seeds(1, config)


def test_code_that_was_edited_in_a_notebook_is_compiled_anew(config, small, here, monkeypatch):
    """As %autoreload does it, within one process."""
    before, loss_fn = mj.sweep(config, small, "a", seeds=[0]), step.loss_fn
    *_, first = fit(config, small, seeds=[0])

    def edited(*args, **options):
        loss, _ = loss_fn(*args, **options)
        return loss + 2, {"loss": loss + 2}

    monkeypatch.setattr(step, "loss_fn", edited)
    *_, second = fit(config, small, seeds=[0])
    after = mj.sweep(config, small, "b", seeds=[0])
    assert before["train_loss"][0].as_py() + 1 < after["train_loss"][0].as_py()
    assert first.history["train_loss"][0, -1] == before["train_loss"][0].as_py()
    assert second.history["train_loss"][0, -1] == after["train_loss"][0].as_py()
    programs = [directory.stored_metadata(Path(name)).program for name in ("a", "b")]
    assert programs[0] != programs[1]


def test_a_copy_of_a_data_set_is_not_its_newest_version(small_dir, tmp_path):
    shutil.copytree(small_dir, tmp_path / "d")
    version = next((tmp_path / "d/kmnist").iterdir())
    cache = version / CACHE
    mj.load_dataset("kmnist", tmp_path / "d")
    for name in (" (1)", "-2024", "_backup3"):
        copy = version.with_name(version.name + name)
        copy.mkdir()
        shutil.copy(cache, copy)
    found = datasets._cached_directory("kmnist", tmp_path / "d")
    assert found == version
    # a newer version that was prepared and never read
    (newer := version.with_name("4.0.0")).mkdir()
    assert datasets._cached_directory("kmnist", tmp_path / "d") == version  # nothing is in it
    (newer / "features.json").touch()
    assert datasets._cached_directory("kmnist", tmp_path / "d") is None


def test_a_stream_that_is_not_used_is_not_varied_from_python(config, small, here):
    still = dataclasses.replace(config, dropout=0.0)
    with pytest.raises(UserError, match="vary dropout: with these settings that stream is not"):
        mj.sweep(still, small, "s", seeds=[0], vary=("order", "dropout"))


def test_a_teacher_is_not_overwritten(swept, data):
    teacher = ["--teacher", "a", "--out", "./a"]
    train_main([*TINY, *data, "--out", "a"])
    with pytest.raises(UserError, match="--teacher and --out are both a: name another --out"):
        train_main([*TINY, *data, *teacher, "--overwrite"])
    with pytest.raises(UserError, match="--teacher and --out are both a"):
        swept(*teacher)
    Path("b").mkdir()
    Path("b/weights").symlink_to(Path("a/weights").resolve())
    with pytest.raises(UserError, match="--teacher and --out are both a"):
        train_main([*TINY, *data, "--teacher", "b", "--out", "a", "--overwrite"])
    assert mj.load_run("a").run.seed == 0
    with pytest.raises(UserError, match="a had no teacher: leave out --teacher a"):
        verify_main(["a", "--teacher", "a", *data])


def test_a_run_of_several_families_votes_once(swept):
    swept("--seeds", "0:3", "--vary", "all", "order", "--keep-weights", "--out", "s")
    assert len(load_committee("s").runs) == 5  # seed 0 of both is one and the same
    swept("--crossed", "1", "--keep-weights", "--out", "t")
    swept("--seeds", "0:2", "--keep-weights", "--out", "t")
    assert len(load_committee("t").runs) == 8  # both seeds are cells of the block


def test_rows_of_other_settings_are_not_read_as_one_sweep(swept):
    swept("--seeds", "0:2", "--out", "a")
    swept("--seeds", "2:4", "--dropout", "0", "--out", "b")
    shutil.copytree("b/runs", "a/runs", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"has dropout=0\.0; you asked for dropout=0\.2"):
        mj.read_runs("a")


def test_rows_of_other_code_are_not_read_as_one_sweep(swept):
    for out, seeds in (("a", "0:2"), ("b", "2:4")):
        swept("--seeds", seeds, "--out", out)
    (path,) = rows.row_files(Path("b"))
    write("a", other_code(path))
    with pytest.raises(UserError, match="different training code"):
        mj.read_runs("a")


def test_a_run_in_two_files_is_not_read_twice(swept):
    for out, seeds in (("a", "0:2"), ("b", "1:3")):
        swept("--seeds", seeds, "--out", out)
    shutil.copytree("b/runs", "a/runs", dirs_exist_ok=True)
    with pytest.raises(UserError, match="contain the same run: remove one of them"):
        mj.read_runs("a")


def test_a_sweep_has_no_seed(config, small, here):
    with pytest.raises(TypeError, match="unexpected keyword argument 'seed'"):
        mj.sweep(config, small, "s", seed=3)


def test_a_dollar_in_a_name_is_a_dollar(swept, data):
    for out, seeds in (("a$x^$", "0:3"), (r"b$\frac{$", "0:3")):
        swept("--seeds", seeds, "--out", out)
    compare_main(["a$x^$", r"b$\frac{$", "--out", "c", *data])
    assert Path("c/comparison.png").exists()
    Path("g").mkdir()
    shutil.move("a$x^$", "g/dropout=$1_2^$")
    swept("--seeds", "0:3", "--dropout", "0", "--out", "g/dropout=0.0")
    report_main(["g", *data])
    assert Path("g/figures/grid.png").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are UTF-8")
def test_a_name_that_is_not_utf_8_is_one_line(swept, data):
    swept("--seeds", "0:3", "--out", "a")
    os.rename(b"a", b"a\xff")
    command = [sys.executable, "-m", "mlp_jax.verify", b"a\xff", *data]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: a path is not UTF-8: " + done.stderr[28:].strip() + "\n"


def test_a_tilde_that_the_shell_left_is_home(swept, data, monkeypatch, tmp_path, config, small):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    swept("--seeds", "0:1", "--out=~/s")
    assert (tmp_path / "home/s/runs").is_dir()
    assert len(mj.read_runs("~/s")) == 1
    assert len(mj.sweep(config, small, "~/t", seeds=[3])) == 1
    assert not Path("~").exists()
    shutil.copytree(tmp_path / "home/s", tmp_path / "home/s@0.1")  # a directory, not a rate of s
    assert open_target("~/s@0.1").directory == tmp_path / "home/s@0.1"


def test_a_chunk_has_at_least_one_run(config, small, here):
    with pytest.raises(UserError, match="a chunk must have at least one run, not -3"):
        mj.sweep(config, small, "s", seeds=range(2), chunk=-3)
    assert experiment.chunk_size("auto", 1e-310, 2) == 2_000_000
    assert experiment.chunk_size(10**400, 1, 2) == 10**400


@pytest.mark.parametrize("n", [0, 1])
def test_a_data_set_has_two_images_of_each_kind_at_least(n, small):
    few = Split(small.test.images[:n], small.test.labels[:n])
    with pytest.raises(UserError, match=f"few has {n} test images"):
        make_dataset("few", small.train, few, 4)
    with pytest.raises(UserError, match=f"few has {n} training images"):
        make_dataset("few", few, small.test, 4)


# files --------------------------------------------------------------------------------------------


def test_a_photo_is_no_sheet(here):
    Path("photo.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"--sheet photo.png exists: name a new file"):
        predict_main(["--sheet", "photo.png", "other.png"])
    assert Path("photo.png").read_bytes() == b"mine"


def test_a_photo_is_no_page(here):
    Path("photo.png").write_text("mine")
    with pytest.raises(UserError, match=r"photo\.png exists and is no \.html file"):
        demo_main(["-o", "photo.png"])
    assert Path("photo.png").read_text() == "mine"


def test_a_report_does_not_replace_a_run(swept, data):
    train_main([*TINY, *data, "--out", "run"])
    swept("--seeds", "0:2", "--out", "s")
    before = Path("run/summary.json").read_bytes()
    with pytest.raises(UserError, match="run has results of its own: name another --out"):
        report_main(["s", *data, "--out", "run"])
    assert Path("run/summary.json").read_bytes() == before


def test_a_report_does_not_replace_a_summary_of_somebody(swept, data):
    swept("--seeds", "0:2", "--out", "s")
    Path("mine").mkdir()
    Path("mine/summary.json").write_text("[1]")
    with pytest.raises(UserError, match=r"mine/summary\.json was perhaps not written"):
        report_main(["s", "--out", "mine", *data])
    assert Path("mine/summary.json").read_text() == "[1]"
    Path("mine/summary.json").rename("mine/report.html")
    with pytest.raises(UserError, match=r"mine/report\.html was perhaps not written by mlp_jax"):
        report_main(["s", "--html", "--out", "mine", *data])
    Path("mine/report.html").rename("mine/comparison.json")
    with pytest.raises(UserError, match=r"comparison\.json was perhaps not written by mlp_jax"):
        compare_main(["s", "s", "--out", "mine", *data])
    for _ in range(2):
        report_main(["s", "--html", "--out", "new", *data])
        compare_main(["s", "s", "--out", "new", *data])


def test_a_sweep_leaves_the_figures_that_a_report_writes(swept):
    swept("--seeds", "0:2", "--out", "s")
    for name in ("figures", "runs"):
        Path("s", name).mkdir(exist_ok=True)
        Path("s", name, f".a.png.{'0' * 16}.tmp").write_bytes(b"")
    swept("--seeds", "0:2", "--out", "s")
    assert [path.parent.name for path in Path("s").rglob("*.tmp")] == ["figures"]


def test_a_whole_merge_while_a_directory_is_listed(swept, monkeypatch):
    swept("--seeds", "0:6", "--chunk", "1", "--devices", "1", "--out", "s")
    listing, calls = rows._listed, []

    def listed(place):  # a directory is not read at one moment
        found = listing(place)
        if not calls:
            calls.append(1)
            compaction.compact(place)
            return [found[0], *listing(place)]
        return found

    monkeypatch.setattr(rows, "_listed", listed)
    assert len(mj.read_runs("s")) == 6


def test_the_recipe_of_a_small_data_set_has_no_name(config, small, here):
    few = make_dataset("few", Split(*(a[:60] for a in small.train)), small.test, 4)
    config = dataclasses.replace(config, epochs=1)
    assert set(mj.sweep(config, few, "s", seeds=range(1))["recipe"].to_pylist()) == {"custom"}


def test_sweeps_on_other_images_are_not_ranked(swept, data):
    swept("--seeds", "0:2", "--out", "g/split=test")
    swept("--seeds", "0:2", "--split", "validation", "--out", "g/split=validation")
    with pytest.raises(UserError, match="g has sweeps on different images"):
        report_main(["g", *data])


# the command line ---------------------------------------------------------------------------------


def test_a_finished_sweep_says_so(swept, data, capsys):
    swept("--seeds", "0:2", "--out", "s")
    loud = [flag for flag in TINY if flag != "--quiet"]
    sweep_main([*loud, *data, "--seeds", "0:2", "--out", "s"])
    assert capsys.readouterr().out.startswith("nothing to train; all at 0.1: 2 runs, mean ")


def test_a_shard_without_runs_says_so(swept, capsys, monkeypatch):
    for name, value in {"ID": "5", "COUNT": "10", "MIN": "0", "STEP": "1"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    swept("--seeds", "5:6", "--out", "s")
    line = "shard 5 of 10 has no runs: there are fewer runs than shards\n"
    assert capsys.readouterr().out == line


def test_a_stream_that_is_not_random_is_not_varied(swept):
    with pytest.raises(UserError, match="vary dropout: with these settings that stream is"):
        swept("--vary", "dropout", "--dropout", "0", "--out", "s")


def test_an_empty_directory_name_is_refused():
    with pytest.raises(UserError, match="the first argument has an empty value"):
        report_main([""])


def as_process(code, **env):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_mistyped_flag_is_named_on_any_terminal(encoding):
    code = "from mlp_jax import cli, train; cli.run_cli(lambda: train.main(['--sed', '1']))"
    done = as_process(code, PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Unrecognized options: --sed")
    assert "did you mean --seed?" in done.stderr


def test_a_mistyped_flag_without_a_stdout():
    code = "import sys; sys.stdout = None\n"
    code += "from mlp_jax import cli, train; cli.run_cli(lambda: train.main(['--sed', '1']))"
    assert as_process(code).stderr.startswith("error: Unrecognized options: --sed")


@pytest.mark.parametrize(
    ("name", "printed", "env"),
    [
        ("x.html", "x.html", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        ("\xfc.html", "\\xfc.html", {"PYTHONIOENCODING": "ascii"}),
    ],
)
def test_text_is_written_and_said_in_any_locale(name, printed, env, tmp_path):
    code = "from mlp_jax import cli, demo\n"
    code += f"cli.run_cli(lambda: demo.main(['-o', {str(tmp_path / name)!a}]))"
    done = as_process(code, **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(printed)
    assert "<html" in (tmp_path / name).read_text("utf-8")
