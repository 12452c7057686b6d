"""Distillation: a committee's mean prediction in place of the labels."""

import dataclasses
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.special import softmax

import mlp_jax as mj
from mlp_jax.compare import main as compare_main
from mlp_jax.errors import UserError
from mlp_jax.experiment import load_data
from mlp_jax.records import checkpoint
from mlp_jax.records.checkpoint import load_committee
from mlp_jax.records.directory import read_metadata
from mlp_jax.sweep import main as sweep_main
from mlp_jax.train import main as train_main
from mlp_jax.training.arrays import for_dataset, hold_out, params_digest, with_teacher
from mlp_jax.training.fit import fit
from mlp_jax.training.model import PRODUCTS, committee_probabilities, predict
from mlp_jax.training.parallel import Placement
from mlp_jax.verify import main as verify_main

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import ship_weights


@pytest.fixture(scope="module")
def committee(small):
    """The params of two nets that are wider than the student's."""
    config = mj.Config(hidden=(24,), batch_size=32, epochs=3, learning_rate=0.1, dropout=0.0)
    config = for_dataset(config, small)
    *_, progress = fit(config, small, seeds=(0, 1))
    return config, progress.fetch_params()


@pytest.fixture
def taught(small, committee):
    return with_teacher(small, *committee)


def test_the_mean_probabilities_of_a_wider_committee(config, small, committee):
    own, params = committee
    expected = softmax(np.asarray(predict(params, small.test.images, config=own)), -1).mean(0)
    pixels = small.test.images.astype(np.float32) / 255
    found = committee_probabilities(params, pixels, config=config)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_teacher_that_needs_other_settings_of_the_network_does_not_teach(
    small_dir, here, monkeypatch
):
    """As where a fork adds a setting of the network, which the student has not."""
    flags = "--dataset kmnist --hidden 8 --batch-size 32 --epochs 3 --seeds 0:1 --keep-weights"
    sweep_main([*flags.split(), "--data-dir", str(small_dir), "--quiet", "--out", "s"])
    config, teaches = mj.Config(dataset="kmnist"), {"data_dir": small_dir, "teacher": Path("s")}
    load_data(config, **teaches)
    monkeypatch.setitem(PRODUCTS, "bfloat16", (None, lambda x, w, *_, **__: -x @ w))
    with pytest.raises(UserError, match="or a setting of it, has changed"):
        load_data(dataclasses.replace(config, products="bfloat16"), **teaches)


def test_a_student_learns_the_teacher_and_not_the_labels(config, small, taught):
    config = dataclasses.replace(config, epochs=5)
    wrong = taught.train._replace(labels=(taught.train.labels + 1) % 4)
    *_, student = fit(config, taught._replace(train=wrong), seeds=(7,))
    *_, alone = fit(config, small._replace(train=wrong), seeds=(7,))
    assert student.test_accuracy[0] > 0.8 > 0.4 > alone.test_accuracy[0]


def test_rows_of_a_taught_sweep_are_the_single_runs(config, taught):
    config = dataclasses.replace(config, rotation=10.0, mixup=0.4)
    *_, many = fit(config, taught, seeds=(1, 2, 3))
    one = Placement((jax.devices()[0],), lanes=1)
    for i, seed in enumerate((1, 2, 3)):
        *_, single = fit(config, taught, seeds=(seed,), placement=one)
        np.testing.assert_array_equal(many.predictions[i], single.predictions[0])
        np.testing.assert_array_equal(
            many.history["train_loss"][i], single.history["train_loss"][0]
        )


def test_a_teacher_is_part_of_the_settings(config, small, taught):
    settings = for_dataset(config, taught)
    assert len(settings.teacher) == 32
    assert for_dataset(config, small).teacher == ""
    with pytest.raises(UserError, match=r"learn from committee .*: add --teacher DIR"):
        for_dataset(settings, small)


def test_a_teacher_is_a_copy_and_no_other_takes_its_place(config, small, committee):
    own, params = committee
    given = jax.tree.map(np.array, params)
    taught = with_teacher(small, own, given)
    given["output"]["bias"][:] = 9
    np.testing.assert_array_equal(taught.teacher.params["output"]["bias"], params["output"]["bias"])
    with pytest.raises(ValueError, match="read-only"):
        taught.teacher.params["output"]["bias"][:] = 9
    other = with_teacher(small, own, given)
    with pytest.raises(UserError, match=r"learn from committee \w+\.\.\., not \w+"):
        fit(for_dataset(config, taught), other)


def test_a_teacher_that_has_seen_the_validation_images_is_refused(small, committee):
    with pytest.raises(UserError, match=r"--split test, but this run has .* --split validation"):
        with_teacher(hold_out(small), *committee)


def test_the_shipped_committee_is_the_teacher_of_best_distilled():
    committee = load_committee()
    assert params_digest(committee.params) == mj.RECIPES["best-distilled"].teacher
    assert (committee.config.dataset, committee.config.split) == ("mnist", "test")


def test_a_recipe_finds_its_teacher(small_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ["--data-dir", str(small_dir)]
    flags = [*data, "--dataset", "kmnist", "--quiet", "--batch-size", "32", "--epochs", "1"]
    sweep_main([*flags, "--seeds", "0:2", "--keep-weights", "--out", "teacher"])
    committee = load_committee("teacher")
    ship_weights.save_committee(tmp_path / "shipped.npz", committee)
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "shipped.npz")
    shipped = load_committee()
    recipe = mj.RECIPES["best-distilled"]
    recipe = dataclasses.replace(recipe, teacher=params_digest(shipped.params))
    monkeypatch.setitem(mj.RECIPES, "best-distilled", recipe)
    flags += ["--recipe", "best-distilled", "--hidden", "8"]
    sweep_main([*flags, "--seeds", "0:2", "--out", "student"])
    verify_main(["student", *data])
    assert capsys.readouterr().out.count("equal bit for bit") == 2
    # another may be named; and if the shipped one is replaced, the students still ask for theirs
    train_main([*flags, "--teacher", "teacher", "--out", "other"])
    assert read_metadata(Path("other")).config.teacher == params_digest(committee.params)
    ship_weights.save_committee(tmp_path / "shipped.npz", ship_weights.first(committee, 1))
    for members in (0, 3):
        with pytest.raises(UserError, match="from 1 to 2"):
            ship_weights.main(ship_weights.Args(Path("teacher"), members))
    with pytest.raises(UserError, match="add --teacher DIR"):
        verify_main(["student", *data])


def test_the_commands_from_teacher_to_proof(small_dir, tmp_path, capsys):
    flags = ["--dataset", "kmnist", "--data-dir", str(small_dir), "--quiet", "--batch-size", "32"]
    flags += ["--epochs", "2", "--seeds", "0:2", "--learning-rate", "0.1"]
    kmnist = mj.Config(dataset="kmnist")
    teacher, student = str(tmp_path / "teacher"), str(tmp_path / "student")
    sweep_main([*flags, "--hidden", "24", "--keep-weights", "--out", teacher])
    taught = [*flags, "--hidden", "8", "--out", student]
    sweep_main([*taught, "--teacher", teacher])
    untaught = str(tmp_path / "untaught")
    sweep_main([*flags, "--hidden", "8", "--out", untaught])
    compare_main([student, untaught, "--data-dir", str(small_dir)])
    assert re.search(r"They differ in teacher \(\w+, \);", capsys.readouterr().out)
    assert load_data(kmnist, teacher=tmp_path / "teacher", data_dir=small_dir).teacher
    for again in (taught, [*taught, "--teacher", student]):
        with pytest.raises(UserError, match=r"teacher|no weights"):
            sweep_main(again)
    data = ["--data-dir", str(small_dir)]
    capsys.readouterr()
    verify_main([student, "--teacher", teacher, *data])
    assert capsys.readouterr().out.count("equal bit for bit") == 2
    with pytest.raises(UserError, match="add --teacher DIR"):
        verify_main([student, *data])
    # in one file, rounded to float16: another teacher
    ship_weights.save_committee(tmp_path / "both.npz", load_committee(teacher))
    again = load_data(kmnist, teacher=tmp_path / "both.npz", data_dir=small_dir).teacher
    kernel = again.params["output"]["kernel"]
    assert kernel.dtype == np.float32
    exact = load_committee(teacher).params["output"]["kernel"]
    np.testing.assert_array_equal(kernel, exact.astype(np.float16))
    with pytest.raises(UserError, match="name another --teacher"):
        verify_main([student, "--teacher", str(tmp_path / "both.npz"), *data])
    (one, _) = sorted((tmp_path / "teacher" / "weights").glob("*.npz"))
    with pytest.raises(UserError, match="weights of one run: name its directory"):
        load_committee(one)
    sweep_main([*flags, "--hidden", "16", "--keep-weights", "--out", f"{teacher}2"])
    with pytest.raises(UserError, match="name another --teacher"):
        verify_main([student, "--teacher", f"{teacher}2", *data])
