import dataclasses
import html.parser
import importlib
import json
import math
import re
import subprocess
import sys
import weakref

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from scipy import stats as scipy_stats

from mlp_jax import results
from mlp_jax.analysis import figures
from mlp_jax.analysis.summary import summarize
from mlp_jax.analysis.tables import STATISTICS, format_table, format_value
from mlp_jax.compare import main as compare_main
from mlp_jax.data import dataset as datasets
from mlp_jax.errors import UserError
from mlp_jax.files import Damaged
from mlp_jax.records import directory as directories
from mlp_jax.records import rows as records
from mlp_jax.records.provenance import Metadata
from mlp_jax.report import main as report_main
from mlp_jax.report import report, report_sweep
from mlp_jax.training.arrays import Split, make_dataset
from mlp_jax.training.config import RECIPES

N_TEST = 200
ENVIRONMENT = {
    "backend": "cpu",
    "device_kind": "cpu",
    "processor": "abacus",
    "cores": 2,
    "prng": "threefry2x32",
    "matmul_precision": "default",
    "versions": dict.fromkeys(("jax", "jaxlib", "flax", "optax"), "0"),
}


@pytest.fixture(autouse=True)
def dataset(monkeypatch):
    """Random images that the report takes for those that the runs were trained on."""
    rng = np.random.default_rng(0)
    split = Split(
        rng.integers(0, 256, (N_TEST, 784)).astype(np.uint8),
        rng.integers(0, 10, N_TEST).astype(np.int32),
    )
    found = make_dataset("mnist", split, split, 10)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    return found


def make_row(labels, seed, wrong, *, vary="all", rate=0.01, loss=0.1, epochs=2):
    """A run that takes each of the images `wrong` for the next class."""
    predictions = labels.astype(np.uint8)
    predictions[wrong] = (predictions[wrong] + 1) % 10
    correct, loss = np.int32(len(labels) - len(wrong)), np.float32(loss)
    return {
        "recipe": "keras-sgd",
        "vary": vary,
        "seed": seed,
        "learning_rate": rate,
        "test_correct": correct,
        "test_loss": loss,
        "train_loss": loss,
        "test_correct_by_epoch": np.array([correct - 10] * (epochs - 1) + [correct], np.int32),
        "test_loss_by_epoch": np.array([0.1] * (epochs - 1) + [loss], np.float32),
        "train_loss_by_epoch": np.full(epochs, 0.1, np.float32),
        "predictions": predictions.tobytes(),
        "seconds": 2.0 + seed,
    }


def random_rows(dataset, n, vary="all", rate=0.01, share=0.05, **kwargs):
    rng = np.random.default_rng([n, len(vary), int(rate * 1000)])
    chances = rng.random(N_TEST) * 2 * share
    wrong = [np.flatnonzero(rng.random(N_TEST) < chances) for _ in range(n)]
    labels = dataset.test.labels
    same = {"vary": vary, "rate": rate} | kwargs
    return [make_row(labels, seed, which, **same) for seed, which in enumerate(wrong)]


def write_sweep(directory, rows, per_file=4, **settings):
    config, dataset = dataclasses.replace(RECIPES["keras-sgd"], **settings), datasets.load_dataset()
    metadata = Metadata("keras-sgd", config, dataset.fingerprint, ENVIRONMENT)
    metadata = metadata._replace(images=dataset.image_fingerprint)
    (directory / "runs").mkdir(parents=True)
    directories.claim(directory, metadata)
    for start in range(0, len(rows), per_file):
        records.write_rows(directory, rows[start : start + per_file], metadata)
    return directory


def summary_of(directory):
    report_main([str(directory)])
    return json.loads((directory / "summary.json").read_text())


def summarized(directory, dataset):
    """A sweep's summary without its figures."""
    paths, metadata = records.row_files(directory), directories.read_metadata(directory)
    families = results.read_families(paths, dataset.test.labels, 10)
    processors = results.count_processors(paths, metadata)
    return summarize(families, metadata.recipe, metadata.config, processors, {})


def errors_of(rows, labels):
    predictions = np.stack([np.frombuffer(row["predictions"], np.uint8) for row in rows])
    return predictions != labels


def test_summary_holds_the_statistics_of_the_rows(tmp_path, dataset):
    rows = random_rows(dataset, 12, share=0.1)
    said = summarized(write_sweep(tmp_path / "s", rows), dataset)
    (family,) = said["families"]
    errors = errors_of(rows, dataset.test.labels)
    accuracy = 1 - errors.mean(axis=1)
    sd = accuracy.std(ddof=1)
    assert (said["n_test"], said["epochs"], family["runs"]) == (N_TEST, 50, 12)
    assert family["mean"]["estimate"] == pytest.approx(accuracy.mean())
    half = scipy_stats.t.ppf(0.975, 11) * sd / np.sqrt(12)
    assert family["mean"]["high"] == pytest.approx(accuracy.mean() + half)
    assert family["sd"]["estimate"] == pytest.approx(sd)
    assert family["sd"]["low"] == pytest.approx(sd * np.sqrt(11 / scipy_stats.chi2.ppf(0.975, 11)))
    assert (family["min"], family["max"]) == (accuracy.min(), accuracy.max())
    assert family["interquartile_mean"]["estimate"] == pytest.approx(np.sort(accuracy)[3:9].mean())
    p = accuracy.mean()
    assert family["binomial_sd"] == pytest.approx(np.sqrt(p * (1 - p) / N_TEST))
    covariance = np.cov(errors.T.astype(float))
    assert family["v_test"] == pytest.approx(covariance.sum() / N_TEST**2)
    assert family["v_ind"] == pytest.approx(np.trace(covariance) / N_TEST**2)
    off = (covariance.sum() - np.trace(covariance)) / (N_TEST * (N_TEST - 1))
    distribution = family["distribution_sd"]
    assert np.sign(distribution["estimate"]) * distribution["estimate"] ** 2 == pytest.approx(off)
    assert distribution["low"] < distribution["estimate"] < distribution["high"]
    share, noise = 1 - errors.mean(axis=0), errors.var(axis=0).mean() / 11
    of_images = np.sqrt((share.var(ddof=1) - noise) / N_TEST)
    assert family["over_test_sets"] == pytest.approx(scipy_stats.norm.ppf(0.975) * of_images)
    halves = np.cov(errors[:, ::2].mean(axis=1), errors[:, 1::2].mean(axis=1))[0, 1]
    assert np.sign(family["halves_sd"]) * family["halves_sd"] ** 2 == pytest.approx(halves)
    assert family["binary_sd"] == pytest.approx(np.sqrt((1 - p) / (2 * N_TEST)))
    assert family["k_class_sd"] == pytest.approx(np.sqrt((1 - p) / (10 * N_TEST)))
    # a wrong run always says the next class, so that two runs differ where one of them errs
    pairs = [(a != b).mean() for i, a in enumerate(errors) for b in errors[:i]]
    assert family["disagreement"] == pytest.approx(np.mean(pairs))
    assert family["error"] == pytest.approx(errors.mean())
    assert family["seconds_a_run"] == np.mean([2.0 + seed for seed in range(12)])
    assert family["runs_for_sd"] == 770
    assert family["runs_for_mean"] == np.ceil((scipy_stats.norm.ppf(0.975) * sd / 1e-4) ** 2)


def test_the_vote_of_all_runs_counts_as_the_ensemble(tmp_path, dataset):
    labels = dataset.test.labels
    rows = [make_row(labels, 0, [0, 1]), make_row(labels, 1, [0, 2]), make_row(labels, 2, [0, 3])]
    (family,) = summarized(write_sweep(tmp_path / "s", rows), dataset)["families"]
    assert family["vote_accuracy"] == (N_TEST - 1) / N_TEST
    assert family["max"] == (N_TEST - 2) / N_TEST


@pytest.mark.parametrize(("changed", "kept"), [({}, True), ({"dropout": 0.5}, False)])
def test_the_reference_is_given_only_for_its_own_settings(tmp_path, dataset, changed, kept):
    labels = dataset.test.labels
    # 97.26 % of 200 images are 194.52: two runs of five lie below
    rows = [make_row(labels, seed, range(wrong)) for seed, wrong in enumerate([7, 6, 5, 5, 4])]
    rows += [row | {"vary": "init"} for row in rows]
    sweep = write_sweep(tmp_path / "s", rows, **changed)
    whole, init = summarized(sweep, dataset)["families"]
    assert init["reference"] is None
    if not kept:
        assert whole["reference"] is whole["share_below"] is whole["z"] is None
        return
    right = N_TEST - np.array([7, 6, 5, 5, 4])
    assert whole["reference"] == 0.9726
    assert whole["share_below"]["estimate"] == 2 / 5
    assert [whole[f"runs_{where}"] for where in ("below", "equal", "above")] == [2, 0, 3]
    assert whole["z"] == pytest.approx((194.52 - right.mean()) / right.std(ddof=1))


@pytest.mark.parametrize(
    ("rate", "title"), [(0.01, "keras-sgd"), (0.02, "keras-sgd (learning rate 0.02)")]
)
def test_figures_name_a_rate_that_is_not_the_recipes(rate, title, tmp_path, dataset):
    sweep = write_sweep(tmp_path / "s", random_rows(dataset, 3, rate=rate))
    titles = [figure.get_suptitle() for _, figure in report_sweep(sweep, None).figures]
    assert titles
    for each in titles:
        assert re.search(rf"\b{re.escape(title)}, 3 runs on", each), each


def test_families_are_set_beside_all_and_rates_beside_each_other(tmp_path, dataset, capsys):
    rows = random_rows(dataset, 9, "init") + random_rows(dataset, 8)
    rows += random_rows(dataset, 7, rate=0.03, share=0.15)
    sweep = write_sweep(tmp_path / "s", rows)
    said = summarized(sweep, dataset)
    families = {(each["vary"], each["learning_rate"]): each for each in said["families"]}
    assert list(families) == [("all", 0.01), ("all", 0.03), ("init", 0.01)]
    whole, init = families["all", 0.01], families["init", 0.01]
    ratio = init["sd_over_all"]
    assert ratio["estimate"] == pytest.approx(init["sd"]["estimate"] / whole["sd"]["estimate"])
    assert ratio["low"] < ratio["estimate"] < ratio["high"]
    assert whole["sd_over_all"] is families["all", 0.03]["sd_over_all"] is None
    (pair,) = said["learning_rates"]
    better = {row["seed"]: row["test_correct"] for row in rows[9:17]}
    worse = {row["seed"]: row["test_correct"] for row in rows[17:]}
    wins = np.mean([(np.sign(better[s] - worse[s]) + 1) / 2 for s in range(7)])
    assert (pair["a"], pair["b"], pair["pairs"]) == (0.01, 0.03, 7)
    assert pair["probability"]["estimate"] == pytest.approx(wins)
    jeffreys = scipy_stats.beta.ppf(0.975, 7 * wins + 0.5, 7 * (1 - wins) + 0.5)
    assert pair["probability"]["high"] == pytest.approx(jeffreys if wins < 1 else 1)
    assert pair["p_holm"] == pair["p_value"]  # of one pair
    assert "P(learning rate 0.01 beats 0.03)" in format_table(said)


def test_twenty_pairs_can_be_significant(tmp_path, dataset):
    rows = random_rows(dataset, 20) + random_rows(dataset, 20, rate=0.03, share=0.15)
    sweep = write_sweep(tmp_path / "s", rows)
    (pair,) = summarized(sweep, dataset)["learning_rates"]
    assert (pair["a"], pair["pairs"]) == (0.01, 20)
    assert (pair["significant"], pair["meaningful"]) == (True, True)
    assert pair["probability"]["low"] > 0.5


def test_pairs_of_rates_are_corrected_for_their_number(tmp_path, dataset):
    labels = dataset.test.labels
    # 0.01 beats 0.02 in 6 of 6 pairs (p = 2 / 64), both beat 0.03 in 6 of 6
    rows = [
        make_row(labels, seed, range(wrong), rate=rate)
        for rate, wrong in ((0.01, 1), (0.02, 2), (0.03, 3))
        for seed in range(6)
    ]
    pairs = summarized(write_sweep(tmp_path / "s", rows), dataset)["learning_rates"]
    assert [pair["p_value"] for pair in pairs] == pytest.approx([1 / 32] * 3)
    assert [pair["p_holm"] for pair in pairs] == pytest.approx([3 / 32] * 3)
    assert not any(pair["significant"] for pair in pairs)


def test_a_run_that_diverged_loses_its_pairs(tmp_path, dataset):
    rows = random_rows(dataset, 4)
    broken = [
        make_row(dataset.test.labels, seed, range(0), rate=0.03, loss=np.nan if seed < 3 else 0.1)
        for seed in range(4)
    ]
    sweep = write_sweep(tmp_path / "s", rows + broken)
    (pair,) = summarized(sweep, dataset)["learning_rates"]
    assert (pair["a"], pair["pairs"]) == (0.01, 4)
    assert pair["probability"]["estimate"] == 0.75  # seed 3 alone, without an error, wins


def test_the_rate_that_wins_more_pairs_beats_the_other(tmp_path, dataset):
    """Even if its sum is lower, as it is with runs that diverged."""
    labels = dataset.test.labels
    wins = [
        make_row(labels, seed, range(1), rate=0.03, loss=np.nan if seed < 2 else 0.1)
        for seed in range(20)
    ]
    loses = [make_row(labels, seed, range(2)) for seed in range(20)]
    (pair,) = summarized(write_sweep(tmp_path / "s", wins + loses), dataset)["learning_rates"]
    assert (pair["a"], pair["b"], pair["significant"]) == (0.03, 0.01, True)
    assert pair["probability"]["estimate"] == 0.9


def test_equal_rows_give_equal_bytes_in_whichever_files_they_lie(tmp_path, dataset):
    rows = random_rows(dataset, 10) + random_rows(dataset, 6, "order")
    mixed = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    sweeps = [write_sweep(tmp_path / "a", rows, 4), write_sweep(tmp_path / "b", mixed, 3)]
    texts = [json.dumps(summarized(sweep, dataset)) for sweep in (*sweeps, sweeps[0])]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_diverged_runs_are_listed_and_in_no_statistic(tmp_path, dataset, loss):
    rows = random_rows(dataset, 6)
    broken = [make_row(dataset.test.labels, seed, range(150), loss=loss) for seed in (77, 78)]
    sweep, clean = write_sweep(tmp_path / "a", rows + broken), write_sweep(tmp_path / "b", rows)
    said = summarized(sweep, dataset)
    (family,) = said["families"]
    assert family["diverged"] == [77, 78]
    assert "2 that diverged, excluded from all statistics: seeds [77, 78]" in format_table(said)
    (expected,) = summarized(clean, dataset)["families"]
    assert family | {"diverged": []} == expected


@pytest.mark.parametrize("runs", [0, 1, 2])
def test_few_runs_print_dashes(tmp_path, dataset, capsys, runs):
    rows = [make_row(dataset.test.labels, seed, [seed], loss=np.inf) for seed in (8, 9)]
    sweep = write_sweep(tmp_path / "s", rows[runs > 0 :] + random_rows(dataset, runs))
    (family,) = summary_of(sweep)["families"]
    assert family["runs"] == runs
    assert (family["max"] is None) == (runs < 1)
    assert (family["mean"] is None) == (family["sd"] is None) == (runs < 2)
    assert family["label_free_sd"] is None
    lines = capsys.readouterr().out.splitlines()
    (label_free,) = [line for line in lines if "label-free" in line]
    assert label_free.split()[1] == "-"
    assert (sweep / "figures" / "accuracy.png").exists() == (runs == 2)


def test_equal_runs_of_a_stream_have_no_share(tmp_path, dataset):
    rows = random_rows(dataset, 9) + [
        make_row(dataset.test.labels, seed, range(5), vary="init") for seed in range(3)
    ]
    _, init = summary_of(write_sweep(tmp_path / "s", rows))["families"]
    assert init["sd_over_all"] is None
    assert init["runs_for_mean"] > 2


@pytest.mark.parametrize("wrong", [range(12), []])
def test_equal_runs_have_no_spread(tmp_path, dataset, wrong):
    rows = [make_row(dataset.test.labels, seed, wrong) for seed in range(20)]
    (family,) = summary_of(write_sweep(tmp_path / "s", rows))["families"]
    assert family["distribution_sd"]["estimate"] == 0
    assert (family["distribution_sd"]["high"] is None) == (not wrong)
    assert family["sd"]["estimate"] == family["sd"]["low"] == 0
    assert 0 < family["sd"]["high"] < 1 / N_TEST  # whole images hide this much
    assert family["disagreement"] == family["label_free_sd"] == 0
    assert family["z"] is None
    assert (tmp_path / "s" / "figures" / "hardest.png").exists() == bool(wrong)


def test_figures_show_something(tmp_path, dataset):
    rows = random_rows(dataset, 9) + random_rows(dataset, 9, "dropout")
    sweep = write_sweep(tmp_path / "s", rows)
    report_main([str(sweep), "--out", str(tmp_path / "elsewhere")])
    assert not (sweep / "summary.json").exists()
    drawn = tmp_path / "elsewhere" / "figures"
    names = ["accuracy.png", "epochs.png", "hardest.png", "sources.png"]
    assert sorted(path.name for path in drawn.iterdir()) == names
    for name in names:
        pixels = np.asarray(Image.open(drawn / name).convert("L"))
        assert pixels.shape[1] == 1080, name
        assert 400 <= pixels.shape[0] <= 700, name
        assert pixels[0, 0] == 255, name
        assert 0.01 < (pixels < 250).mean() < 0.7, name
    # the paper is white at the left and right edge of every figure: nothing is cut off
    assert (pixels[:, [0, -1]] == 255).all()


def test_one_epoch_has_no_figure_by_epoch(tmp_path, dataset):
    sweep = write_sweep(tmp_path / "s", random_rows(dataset, 3, epochs=1), epochs=1)
    assert summary_of(sweep)["epochs"] == 1
    names = {path.name for path in (sweep / "figures").iterdir()}
    assert names == {"accuracy.png", "hardest.png"}


def test_the_hardest_images_come_first_with_their_captions(tmp_path, dataset):
    labels = dataset.test.labels
    rows = [make_row(labels, 0, [5, 9]), make_row(labels, 1, [9]), make_row(labels, 2, [9])]
    sweep = write_sweep(tmp_path / "s", rows)
    (family,) = results.read_families(records.row_files(sweep), labels, 10)
    figure = figures.draw_hardest(family.counts, dataset.test.images, "x")
    captions = [ax.get_xlabel() for ax in figure.axes if ax.axison]
    assert captions == [
        f"{labels[9]} → {(labels[9] + 1) % 10}  100 %",
        f"{labels[5]} → {(labels[5] + 1) % 10}  33 %",
    ]
    drawn = figure.axes[0].images[0].get_array()
    assert (drawn == dataset.test.images[9].reshape(28, 28)).all()


def test_predictions_are_read_as_a_stream(tmp_path, dataset, monkeypatch):
    rows = random_rows(dataset, 1100)
    sweep = write_sweep(tmp_path / "s", rows, per_file=1100)
    read, blocks, alive = records.predictions, [], []

    def watched(column):
        alive.append(sum(block() is not None for block in blocks))
        block = read(column)
        blocks.append(weakref.ref(block))
        assert block.nbytes <= records.READ_ROWS * N_TEST
        return block

    monkeypatch.setattr(records, "predictions", watched)
    (family,) = results.read_families(records.row_files(sweep), dataset.test.labels, 10)
    assert len(family.seeds) == 1100
    assert len(blocks) == math.ceil(1100 / records.READ_ROWS)
    # the block that is counted, while the next is read
    assert max(alive) <= 1
    assert pa.total_allocated_bytes() < 1100 * N_TEST


def one_line(argv):
    with pytest.raises(UserError) as caught:
        report_main([str(word) for word in argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_sweep_is_refused_in_one_line(tmp_path, dataset):
    assert "contains no mlp_jax results" in one_line([tmp_path / "missing"])
    for foreign in ('{"model_type": "bert"}', "[1]"):
        (tmp_path / "config.json").write_text(foreign)
        assert "was not written by mlp_jax" in one_line([tmp_path])
    assert "has no finished runs" in one_line([write_sweep(tmp_path / "s", [])])
    assert "--foo" in one_line([tmp_path, "--foo"])


@pytest.mark.parametrize("part", ["images", "labels"])
def test_other_data_are_refused(tmp_path, dataset, monkeypatch, part):
    sweep = write_sweep(tmp_path / "s", random_rows(dataset, 3))
    train = dataset.train._replace(**{part: getattr(dataset.train, part)[::-1]})
    other = make_dataset("mnist", Split(*map(np.ascontiguousarray, train)), dataset.test, 10)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: other)
    assert "trained on different data" in one_line([sweep])
    assert not (sweep / "summary.json").exists()


def test_older_records_have_the_fingerprint_of_the_training_images_alone(
    tmp_path, dataset, monkeypatch
):
    former = dataset._replace(fingerprint=dataset.image_fingerprint, image_fingerprint=None)
    with monkeypatch.context() as patched:
        patched.setattr(datasets, "load_dataset", lambda *_, **__: former)
        sweep = write_sweep(tmp_path / "s", random_rows(dataset, 3))
    assert summary_of(sweep)["families"][0]["runs"] == 3


def test_rows_that_cannot_be_true_are_refused(tmp_path, dataset):
    rows = random_rows(dataset, 4)
    twice = write_sweep(tmp_path / "a", [*rows, rows[0] | {"seed": 9}, rows[1]])
    assert "contain the same run" in one_line([twice])
    wrong = rows[0] | {"test_correct_by_epoch": rows[0]["test_correct_by_epoch"] - 1}
    assert "do not match" in one_line([write_sweep(tmp_path / "b", [wrong, *rows[1:]])])
    # an image that is wrong either way: the accuracy stays, and its class does not exist
    classes = np.frombuffer(rows[0]["predictions"], np.uint8).copy()
    classes[np.flatnonzero(classes != dataset.test.labels)[0]] = 10
    unknown = rows[0] | {"predictions": classes.tobytes()}
    sweep = write_sweep(tmp_path / "c", [unknown, *rows[1:]])
    with pytest.raises((UserError, ValueError), match="prediction"):
        report_main([str(sweep)])


def test_each_file_is_checked_once_and_a_damaged_one_named(tmp_path, dataset, monkeypatch):
    sweep = write_sweep(tmp_path / "s", random_rows(dataset, 9))
    check, checked = records.check_content, []
    monkeypatch.setattr(records, "check_content", lambda path: checked.append(path) or check(path))
    report_main([str(sweep)])
    paths = records.row_files(sweep)
    assert len(paths) == 3
    assert checked == paths
    other, checked[:] = write_sweep(tmp_path / "o", random_rows(dataset, 9)), []
    compare_main([str(sweep), str(other), "--out", str(tmp_path / "c")])
    assert checked == paths + records.row_files(other)
    paths[1].write_bytes(paths[1].read_bytes()[:-20])
    (sweep / "summary.json").unlink()
    with pytest.raises(Damaged, match=f"{paths[1].name} is damaged"):
        report_main([str(sweep)])
    assert not (sweep / "summary.json").exists()


def test_help_imports_no_jax_and_nothing_slow():
    code = (
        "import sys\nfrom mlp_jax.report import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "slow = {'jax', 'scipy', 'matplotlib', 'pyarrow', 'tensorflow'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--data-dir" in done.stdout


class Reader(html.parser.HTMLParser):
    """The texts of a page's cells, and its addresses; raises where tags do not match."""

    def __init__(self, page):
        super().__init__()
        self.cells, self.addresses, self.open = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] and self.open[-1] in ("td", "dd"):
            self.cells.append(data)


def test_the_page_has_all_that_the_table_says_and_needs_nothing_beside_it(tmp_path, dataset):
    sweep = write_sweep(tmp_path / "s", random_rows(dataset, 12))
    made = report(sweep)
    page = Reader(made.page)
    (family,), at = made.summary["families"], -1
    for key, (name, unit, _) in STATISTICS.items():
        if family[key] is not None:
            value, interval = format_value(family[key], unit)
            at = page.cells.index(name, at + 1)
            assert page.cells[at + 1] == value
            assert not interval or page.cells[at + 2] == interval
    assert len(page.addresses) == len(made.figures) == 3
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert made.settings["data, SHA-256"] in page.cells
    report_main([str(sweep), "--html"])
    assert Reader((sweep / "report.html").read_text()).cells == page.cells


def test_the_page_names_the_runs_that_diverged(tmp_path, dataset):
    lost = [make_row(dataset.test.labels, seed, [], loss=np.nan) for seed in (7, 8)]
    made = report(write_sweep(tmp_path / "s", random_rows(dataset, 4) + lost))
    assert "2 that diverged" in made.text
    assert html.escape(made.text) in made.page


def test_a_comparison_says_what_it_leaves_out(tmp_path, dataset, capsys, monkeypatch):
    a = write_sweep(tmp_path / "a", random_rows(dataset, 4))
    monkeypatch.setitem(ENVIRONMENT, "backend", "gpu")
    b = write_sweep(tmp_path / "b", random_rows(dataset, 5))
    mixed = directories.read_metadata(b)._replace(mixed=True)
    lost = [make_row(dataset.test.labels, seed, [], loss=np.nan) for seed in (7, 8)]
    records.write_rows(b, lost, mixed)
    compare_main([str(a), str(b), "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "They differ in backend (cpu, gpu), lanes (1, None)" in said
    caveats = [
        f"{b} has 2 runs that diverged, excluded from all numbers here: seeds [7, 8].",
        f"{b} has 2 runs in its directory that were pooled by --allow-mixed.",
    ]
    assert said.splitlines()[-3:-1] == caveats
    (found,) = json.loads((tmp_path / "comparison.json").read_text())["comparisons"]
    assert (found["caveats"], found["until_decided"]) == (caveats, None)
    with pytest.raises(UserError, match=r"@1-3 contains no mlp_jax results"):
        compare_main([str(a), f"{b}@1-3"])


def test_a_comparison_of_two_independent_runs_says_that_they_are_few(tmp_path, dataset, capsys):
    rows = random_rows(dataset, 22)
    few, many = (write_sweep(tmp_path / str(len(own)), own) for own in (rows[:2], rows[2:]))
    shared = write_sweep(tmp_path / "shared", rows[:2])
    compare_main([str(few), str(many)])
    caveat = "has two runs, which are too few: the interval misses in up to 12 % of cases, not 5 %."
    assert f"{few} {caveat}" in capsys.readouterr().out
    compare_main([str(few), str(shared)])  # in pairs
    assert "too few" not in capsys.readouterr().out


def test_a_verdict_after_many_looks_is_that_of_the_sequence(tmp_path, dataset, capsys, monkeypatch):
    module = importlib.import_module("mlp_jax.sweep")
    monkeypatch.setattr(module, "train_cell", lambda *_: 0)
    labels = dataset.test.labels
    # Student's t is 2.4, which is significant at one look
    wins = [make_row(labels, seed, range(2 - (seed < 5))) for seed in range(30)]
    a, b = write_sweep(tmp_path / "a", wins), tmp_path / "b"
    write_sweep(b, [make_row(labels, seed, range(2)) for seed in range(30)])
    until = ["--until-decided", "--max-seeds", "30", "--margin", "0.01"]
    compare_main([str(a), str(b), "--out", str(tmp_path)])
    assert "a scores higher than b" in capsys.readouterr().out
    compare_main([str(a), str(b), *until, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "it is undecided whether a or b scores higher" in said
    assert said.splitlines()[-1].startswith("The verdict is that of the confidence sequence")
    (found,) = json.loads((tmp_path / "comparison.json").read_text())["comparisons"]
    assert found["verdict"] == found["until_decided"]["verdict"] == "undecided"
    lost = [make_row(labels, seed, [], loss=np.inf) for seed in range(30)]
    c = write_sweep(tmp_path / "c", lost)
    with pytest.raises(UserError, match="in every pair a run diverged"):
        compare_main([str(a), str(c), *until])
    with pytest.raises(UserError, match="--max-seeds must be at least 30, not 29"):
        compare_main([str(a), str(b), "--until-decided", "--max-seeds", "29"])


def test_a_run_that_is_stored_twice_is_no_score(tmp_path, dataset):
    rows = random_rows(dataset, 4)
    sweep = write_sweep(tmp_path / "s", rows)
    records.write_rows(sweep, rows[:1], directories.read_metadata(sweep))
    with pytest.raises(UserError, match=r"contain the same run: remove .* has all of its runs"):
        records.read_scores(records.checked_files(sweep))


def test_runs_that_differ_in_an_unused_stream_are_no_part_of_a_block(tmp_path, dataset):
    rows = [
        make_row(dataset.test.labels, seed, range(seed), vary="crossed")
        for seed in (*range(8), 10, 11)  # 10 and 11 have other seeds of a stream that is not used
    ]
    (crossed,) = report(write_sweep(tmp_path / "s", rows, per_file=1)).summary["crossed"]
    assert (crossed["runs"], crossed["runs_in_broken_blocks"]) == (8, 2)
