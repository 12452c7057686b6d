"""Mistakes of users, and commands that meet: one line, no wrong number, no file lost."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import TINY, trained, write

import mlp_jax as mj
from mlp_jax import experiment
from mlp_jax.compare import main as compare_main
from mlp_jax.data import dataset as datasets
from mlp_jax.data.dataset import CACHE
from mlp_jax.demo import main as demo_main
from mlp_jax.errors import UserError
from mlp_jax.records import directory, rows
from mlp_jax.report import main as report_main
from mlp_jax.results import open_target
from mlp_jax.sweep import main as sweep_main
from mlp_jax.train import main as train_main
from mlp_jax.training import run as runs
from mlp_jax.training.arrays import Split, make_dataset, with_teacher
from mlp_jax.training.config import Config
from mlp_jax.training.fit import fit
from mlp_jax.training.run import make_run
from mlp_jax.verify import main as verify_main


def test_a_damaged_file_that_cannot_be_renamed_is_trained_again(swept, caplog):
    swept("--seeds", "0:2", "--chunk", "1", "--devices", "1", "--out", "s")
    path = rows.row_files(Path("s"))[0]
    path.write_bytes(path.read_bytes()[:-9])
    path.with_name(f"_{path.name}.corrupt").mkdir()
    swept("--seeds", "0:2", "--devices", "1", "--out", "s")
    assert "left where it is" in caplog.text
    assert rows.row_files(Path("s"))


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


def test_a_broken_row_beside_a_broken_config_is_quarantined(swept, caplog):
    swept("--seeds", "0:2", "--chunk", "1", "--out", "s")
    path = min(Path("s/runs").iterdir())
    path.write_bytes(path.read_bytes()[:-40])
    Path("s/config.json").write_text("{")
    swept("--seeds", "0:2", "--chunk", "1", "--out", "s")
    assert len(mj.read_runs("s")) == 2


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


def test_a_rate_does_not_depend_on_how_numpy_prints():
    usual = make_run(0, 0.1234567891)
    with np.printoptions(precision=3, legacy="1.13"):
        assert make_run(0, 0.1234567891) == usual
    assert np.float32(usual.learning_rate) == np.float32(0.1234567891)


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


def test_rates_that_are_close_have_names_of_their_own(swept, data, capsys):
    swept("--seeds", "0:3", "--learning-rate", "0.1234567", "0.1234568", "--out", "s")
    compare_main(["s@0.1234567", "s@0.1234568", *data])
    report_main(["s", *data])
    assert "P(learning rate 0.1234567 beats 0.1234568)" in capsys.readouterr().out.replace(
        "0.1234568 beats 0.1234567", "0.1234567 beats 0.1234568"
    )


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
    assert repr(Config(mixup=1)) == repr(Config(mixup=1.0))  # which are traced alike


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"label_smoothing": "0.1"}, "label smoothing must be a number, not '0.1'"),
        ({"dropout": True}, "dropout must be a number, not True"),
        ({"epochs": "3"}, "epochs must be a number, not '3'"),
        ({"batch_size": False}, "batch size must be an integer, not False"),
        ({"dataset": 3}, "dataset must be text, not 3"),
        ({"hidden": 512}, r"hidden must be widths, such as \(512, 512\), not 512"),
        ({"hidden": ("512",)}, "hidden must be widths"),
        ({"hidden": (2**40,)}, "hidden widths must be from 1 to"),
        ({"n_classes": 2.5}, "n classes must be an integer, not 2.5"),
        ({"teacher": 3}, "teacher must be text, not 3"),
        ({"weight_decay": 10**400}, "weight decay is too large a number"),
    ],
)
def test_a_setting_of_another_type_is_one_line(settings, wanted):
    with pytest.raises(UserError, match=wanted):
        Config(**settings)


def test_fit_takes_runs_or_seeds(config, small):
    with pytest.raises(UserError, match="runs or seeds, not both"):
        fit(config, small, [make_run(3, 0.1)], seeds=[3])
    with pytest.raises(UserError, match=r"a family varies all or one of init, .* not .Init."):
        fit(config, small, [runs.Run("Init", 0.1, 3)])  # its streams would all have seed 0


def test_a_snapshot_starts_its_own_runs_alone(config, small):
    snapshot = next(fit(config, small, seeds=(7, 8))).snapshot()
    with pytest.raises(UserError, match="belongs to other runs"):
        fit(config, small, seeds=(3, 4), start=snapshot)
    other = dataclasses.replace(config, dropout=0.5)
    with pytest.raises(UserError, match=r"has dropout=0\.2, not 0\.5"):
        fit(other, small, seeds=(7, 8), start=snapshot)
    for elsewhere in (small._replace(name="mine"), with_teacher(small, *trained(config, small))):
        with pytest.raises(UserError, match=r"has (dataset|teacher)="):
            fit(config, elsewhere, seeds=(7, 8), start=snapshot)
    labels = (small.train.labels + 1) % 4
    wrong = make_dataset(small.name, small.train._replace(labels=labels), small.test, 4)
    with pytest.raises(UserError, match="on different data"):
        fit(config, wrong, seeds=(7, 8), start=snapshot)
    # a schedule, or a fork's step, may read how many steps there are
    with pytest.raises(UserError, match="has epochs=2, not 5"):
        fit(dataclasses.replace(config, epochs=5), small, seeds=(7, 8), start=snapshot)
    older = snapshot._replace(history={"train_loss": snapshot.history["train_loss"]})
    with pytest.raises(UserError, match="has other metrics: test_correct"):
        next(fit(config, small, seeds=(7, 8), start=older))
    assert [each.epoch for each in fit(config, small, seeds=(7, 8), start=snapshot)] == [2]


def test_a_finished_snapshot_is_not_trained_further(config, small):
    part = dataclasses.replace(config, epochs=0.7)
    *_, end = fit(part, small, seeds=(7,))
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


@pytest.mark.parametrize("option", ["devices", "lanes"])
def test_sweep_trains_on_at_least_one(option, config, small, here):
    with pytest.raises(UserError, match=f"{option} must be at least 1, not 0"):
        mj.sweep(config, small, "s", seeds=[0], **{option: 0})


def test_a_stream_too_many_is_not_crossed(config, monkeypatch):
    """Stored blocks keep their numbering in a fork that adds a stream."""
    assert runs.make_run(37, 0.1, "crossed").seeds == (3, 2, 3, 2, 2)
    monkeypatch.setattr(runs, "STREAMS", (*runs.STREAMS, "extra"))
    with pytest.raises(UserError, match="no room for the stream extra"):
        runs.crossed_seeds(1, config)


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


def test_rows_of_other_settings_are_not_read_as_one_sweep(swept):
    swept("--seeds", "0:2", "--out", "a")
    swept("--seeds", "2:4", "--dropout", "0", "--out", "b")
    shutil.copytree("b/runs", "a/runs", dirs_exist_ok=True)
    found = r"has dropout=0\.0, and other rows here have dropout=0\.2: it is not of their sweep"
    with pytest.raises(UserError, match=found):
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


def test_a_directory_may_be_named_like_an_address(swept, data, tmp_path):
    swept("--seeds", "0:1", "--out", "s3:x")
    swept("--seeds", "0:2", "--out", "s3:x")
    assert len(mj.read_runs("s3:x")) == len(mj.read_runs(tmp_path / "s3:x")) == 2
    assert open_target("s3:x").directory.is_dir()
    report_main(["s3:x", *data])


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
    report_main(["s", *data])
    Path("s/report.html").write_text("mine")
    with pytest.raises(UserError, match=r"s/report\.html was perhaps not written by mlp_jax"):
        report_main(["s", "--html", *data])
    Path("s/report.html").unlink()
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


def test_the_recipe_of_a_small_data_set_has_no_name(config, small, here):
    few = make_dataset("few", Split(*(a[:60] for a in small.train)), small.test, 4)
    config = dataclasses.replace(config, epochs=1)
    assert set(mj.sweep(config, few, "s", seeds=range(1))["recipe"].to_pylist()) == {"custom"}


def test_sweeps_on_other_images_are_not_ranked(swept, data):
    swept("--seeds", "0:2", "--out", "g/split=test")
    swept("--seeds", "0:2", "--split", "validation", "--out", "g/split=validation")
    with pytest.raises(UserError, match="g has sweeps on different images"):
        report_main(["g", *data])


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


@pytest.mark.parametrize(
    ("command", "words", "named"),
    [
        (report_main, [""], "the first argument"),
        (train_main, ["--data-dir", ""], "--data-dir"),
        (train_main, ["--data-dir="], "--data-dir"),
    ],
)
def test_an_empty_directory_name_is_refused(command, words, named):
    with pytest.raises(UserError, match=f"{named} has an empty value"):
        command(words)


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
