"""Edited code, other versions, other settings of JAX: rows of different code are not pooled."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import other_code, write

import mlp_jax as mj
from mlp_jax.compare import main as compare_main
from mlp_jax.errors import UserError
from mlp_jax.files import write_signed_json
from mlp_jax.records import directory, provenance, rows
from mlp_jax.records.provenance import FORMER_NUMERICS, describe_environment, git_state
from mlp_jax.report import main as report_main
from mlp_jax.results import count_processors, open_target
from mlp_jax.training import augment, model, programs, step
from mlp_jax.training import fit as fit_module
from mlp_jax.training.arrays import count_steps
from mlp_jax.training.config import Config
from mlp_jax.training.fit import fit
from mlp_jax.training.parallel import COMPILER_OPTIONS, numerics


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


def test_a_key_is_a_constant_like_any_other(config, small, monkeypatch):
    """As of a fork whose noise has a key of its own."""
    found, loss_fn = set(), step.loss_fn
    for seed in range(2):
        key = jax.random.key(seed)

        def edited(params, batch, keys, key=key, **options):
            return loss_fn(params, batch, keys._replace(dropout=key), **options)

        monkeypatch.setattr(step, "loss_fn", edited)
        found.add(programs.fingerprint_code(config, small.arrays))
    assert len(found) == 2


@pytest.mark.parametrize("callback", [jax.pure_callback, jax.experimental.io_callback])
def test_code_that_calls_back_is_refused(callback, config, small, monkeypatch):
    """The text of a callback is the same whatever it computes."""

    def schedule(progress, *, config):
        return callback(np.float32, jax.ShapeDtypeStruct((), np.float32), progress)

    monkeypatch.setattr(step, "schedule", schedule)
    with pytest.raises(UserError, match=r"the training code has a (pure|io)_callback"):
        fit(config, small, seeds=[0])


def test_code_that_differs_each_time_it_is_traced_is_refused(config, small, monkeypatch):
    rng, to_float = np.random.default_rng(0), step.to_float
    monkeypatch.setattr(step, "to_float", lambda images: to_float(images) + rng.normal())
    with pytest.raises(UserError, match="draw random numbers from the run's keys"):
        fit(config, small, seeds=(0,))


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


def test_compare_names_the_precision_that_made_another_program(swept, data, capsys):
    before = jax.config.values["jax_default_matmul_precision"]
    swept("--seeds", "0:3", "--out", "s")
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        swept("--seeds", "0:3", "--out", "t")
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    compare_main(["s", "t", *data])
    assert "They differ in matmul precision (default, highest); p" in capsys.readouterr().out


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


def test_the_commit_is_that_of_the_code_in_memory(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)  # not asked again
    assert describe_environment(jax.devices())["git"] == git_state()


def test_options_of_the_compiler_are_numerics(monkeypatch):
    assert numerics()["compiler_options"] == FORMER_NUMERICS["compiler_options"]
    monkeypatch.setitem(COMPILER_OPTIONS, "init", {})
    now = describe_environment(jax.devices())["compiler_options"]
    assert now != FORMER_NUMERICS["compiler_options"]


def test_xla_flags_may_be_in_a_file(tmp_path, monkeypatch):
    (tmp_path / "flags").write_text("--xla_cpu_enable_fast_math=true\n")
    for environ in (os.environ, mj._ENVIRON):
        monkeypatch.setitem(environ, "XLA_FLAGS", str(tmp_path / "flags"))
    environment = describe_environment(jax.devices())
    assert environment["xla_flags"] == "--xla_cpu_enable_fast_math=true"


@pytest.mark.parametrize("name", ["XLA_FLAGS", "ONEDNN_DEFAULT_FPMATH_MODE"])
def test_flags_that_come_too_late_are_refused(name, config, small, here, monkeypatch):
    """JAX has read its variables by now, so a row would name flags that were not in force."""
    monkeypatch.setenv(name, "--xla_cpu_enable_fast_math=true")
    with pytest.raises(UserError, match=r"flags became .* after mlp_jax was imported"):
        mj.sweep(config, small, "s", seeds=[0])
    assert not list(here.iterdir())


def test_flags_of_a_tpu_that_come_after_its_first_use_are_refused(config, small, monkeypatch):
    """JAX adds to them when it is imported, which may be after mlp_jax."""
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--by_jax=true")
    provenance._first_tpu_flags.cache_clear()
    try:
        assert "by_jax" in describe_environment(jax.devices())["library_flags"]
        monkeypatch.setenv("LIBTPU_INIT_ARGS", "--by_jax=true --by_user=true")
        with pytest.raises(UserError, match=r"library_flags became .*by_user"):
            describe_environment(jax.devices())
    finally:
        provenance._first_tpu_flags.cache_clear()


def test_a_setting_of_jax_that_changes_is_compiled_in(config, small):
    config = dataclasses.replace(config, epochs=1)
    before = jax.config.values["jax_default_prng_impl"]
    first, other, again = [], [], []
    for losses, generator in ((first, before), (other, "rbg"), (again, before)):
        jax.config.update("jax_default_prng_impl", generator)
        losses += next(fit(config, small, seeds=(0,))).history["train_loss"].tolist()
    assert first == again != other


def test_prediction_uses_the_network_as_it_is_now(config, small, here, monkeypatch):
    mj.sweep(config, small, "s", seeds=[0], keep_weights=True)
    run, images = mj.load_run("s"), small.test.images
    before = mj.predict(run, images)
    monkeypatch.setattr(model, "to_float", lambda images: images.astype("float32") / 100)
    assert (mj.predict(run, images) != before).any()


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


def test_rows_of_other_code_are_not_read_as_one_sweep(swept):
    for out, seeds in (("a", "0:2"), ("b", "2:4")):
        swept("--seeds", seeds, "--out", out)
    (path,) = rows.row_files(Path("b"))
    write("a", other_code(path))
    with pytest.raises(UserError, match="different training code"):
        mj.read_runs("a")
