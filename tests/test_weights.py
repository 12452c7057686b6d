"""Weights and teachers: whose they are, and what they may be used for."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import TINY, trained

import mlp_jax as mj
from mlp_jax import experiment
from mlp_jax.demo import main as demo_main
from mlp_jax.errors import UserError
from mlp_jax.files import Damaged, load_arrays, save_arrays
from mlp_jax.predict import main as predict_main
from mlp_jax.records import directory
from mlp_jax.records.checkpoint import (
    check_predictions,
    for_upright,
    has_weights,
    load_checkpoint,
    load_committee,
    save_checkpoint,
)
from mlp_jax.records.provenance import Metadata, describe_environment
from mlp_jax.records.rows import finished_runs
from mlp_jax.train import main as train_main
from mlp_jax.training import fit as fit_module
from mlp_jax.training.arrays import with_teacher
from mlp_jax.training.config import Config
from mlp_jax.training.fit import fit
from mlp_jax.training.run import make_run
from mlp_jax.verify import main as verify_main


def test_arrays_in_bfloat16_are_kept(tmp_path):
    """As a fork may train in: NumPy writes them, and reads something else."""
    arrays = {"a/kernel": np.asarray(jnp.arange(5, dtype=jnp.bfloat16)), "b c": np.ones(2)}
    save_arrays(tmp_path / "a.npz", arrays, {"n": 3})
    found, metadata = load_arrays(tmp_path / "a.npz")
    assert (metadata, found.keys()) == ({"n": 3}, arrays.keys())
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_a_checkpoint_of_other_runs_is_quarantined(config, small, tmp_path, caplog):
    about = Metadata("custom", config, small.fingerprint, describe_environment(jax.devices()))
    snapshot = next(fit(config, small, seeds=(3, 4))).snapshot()
    path = tmp_path / "c.npz"
    save_checkpoint(path, snapshot, [1.0], about, False)
    assert load_checkpoint(path, snapshot.runs, about)
    others = [make_run(seed, config.learning_rate) for seed in (5, 6)]
    assert load_checkpoint(path, others, about) is None
    assert "it belongs to other runs" in caplog.text


def test_the_weights_of_a_run_do_not_depend_on_the_run_beside_it(config, small, monkeypatch):
    """Also where a fork changes what is evaluated and stored."""

    def rounded(state):
        leaves = jax.tree.leaves(state.params)
        unit = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves])) / 8
        return jax.tree.map(lambda leaf: jnp.round(leaf / unit) * unit, state.params)

    monkeypatch.setattr(fit_module, "eval_params", rounded)
    *_, both = fit(config, small, seeds=[0, 1])
    *_, alone = fit(config, small, seeds=[1])
    for a, b in zip(
        *map(jax.tree.leaves, (both.fetch_params(), alone.fetch_params())), strict=True
    ):
        np.testing.assert_array_equal(a[1], b[0])


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


def test_weights_that_are_left_say_whose_they_are(swept, data):
    swept("--keep-weights", "--seeds", "0:2", "--out", "s")
    shutil.rmtree("s/runs")
    Path("s/config.json").unlink()
    with pytest.raises(UserError, match="s has a sweep"):
        train_main(["--recipe", "short", "--seed", "9", "--overwrite", "--out", "s", *data])
    with pytest.raises(UserError, match="s has dropout="):
        swept("--keep-weights", "--dropout", "0.5", "--out", "s")
    assert len(load_committee("s").runs) == 2


def test_weights_under_another_network_are_not_used(swept, data, monkeypatch):
    swept("--keep-weights", "--seeds", "0:2", "--out", "s")
    dataset, committee = mj.load_dataset("kmnist", data[1]), load_committee("s")
    check_predictions(committee, dataset)
    edited = committee._replace(params=jax.tree.map(lambda leaf: leaf[::-1], committee.params))
    edited = edited._replace(params=edited.params | {"output": committee.params["output"]})
    with pytest.raises(UserError, match=r"seed 0 had .* the code of the network, or a setting"):
        check_predictions(edited, dataset)
    monkeypatch.setattr("mlp_jax.experiment.load_committee", lambda teacher: edited)
    with pytest.raises(UserError, match="the code of the network, or a setting of it"):
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


def test_a_page_has_the_shipped_weights_as_they_are_stored(here):
    demo_main(["-o", "page.html"])
    page = Path("page.html").read_text()
    assert '"dtype": "float16"' in page
    assert len(page) < 10e6


def test_weights_are_found_by_any_number_of_the_same_rate(swept):
    swept("--learning-rate", "0.1234567891", "--seeds", "0:1", "--keep-weights", "--out", "s")
    for rate in (0.1234567891, np.float32(0.1234567891)):
        assert mj.load_run("s", 0, learning_rate=rate).run == make_run(0, 0.1234567891)


def test_a_page_says_in_what_its_networks_differ(swept):
    flags = ("--seeds", "0:2", "--keep-weights", "--out", "s")
    swept(*flags, "--learning-rate", "0.1", "0.05")
    demo_main(["-o", "page.html", "--run", "s"])
    assert "nothing but their seeds and learning rates" in Path("page.html").read_text("utf-8")


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


@pytest.mark.parametrize(("name", "found"), [("train_loss", True), ("test_loss", False)])
def test_weights_are_those_of_a_row_if_both_have_the_same_test_results(swept, name, found):
    swept("--seeds", "0:1", "--keep-weights", "--out", "s")
    metadata, run = directory.read_metadata(Path("s")), make_run(0, 0.1)
    (row,) = finished_runs(Path("s"), metadata).values()
    assert has_weights(Path("s"), run, metadata, row)
    other = row | {name: float(np.nextafter(np.float32(row[name]), np.float32(9)))}
    assert has_weights(Path("s"), run, metadata, other) == found


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


def test_a_teacher_that_was_changed_does_not_teach(config, small, here):
    committee, params = trained(config, small)
    taught = with_teacher(small, committee, params)
    taught.teacher.params["output"]["bias"] = params["output"]["bias"] + 1
    with pytest.raises(UserError, match="the teacher's weights were changed"):
        mj.sweep(config, taught, "s", seeds=[0])


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


def test_a_photo_is_no_sheet(here):
    Path("photo.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"--sheet photo.png exists: name a new file"):
        predict_main(["--sheet", "photo.png", "other.png"])
    assert Path("photo.png").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["photo.png", "index.html"])
def test_a_page_replaces_no_other_file(here, name):
    Path(name).write_text("<title>mine</title>")
    with pytest.raises(UserError, match=rf"{name} was perhaps not written by mlp_jax: move it"):
        demo_main(["-o", name])
    assert Path(name).read_text() == "<title>mine</title>"
    Path(name).unlink()
    for _ in range(2):  # its own it replaces
        demo_main(["-o", name, "--members", "1"])
