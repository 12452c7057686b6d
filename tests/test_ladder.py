"""README's ladder follows from results/ladder.json, and this from the records."""

import itertools
import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import mlp_jax as mj
from mlp_jax.analysis.compare import compare
from mlp_jax.analysis.stats import variance_ratio
from mlp_jax.records.checkpoint import load_committee
from mlp_jax.records.directory import read_metadata
from mlp_jax.records.rows import predictions, read_runs

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import ladder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def read(path):
    return json.loads((ROOT / "results" / path).read_text())


def points(interval, digits=2):
    return "{} ({} to {})".format(*(f"{100 * end:.{digits}f}" for end in interval.values()))


def ladder_lines():
    """README's table, from the lowest rung to the highest."""
    rungs = read("ladder.json")["rungs"]
    for rung in sorted(rungs, key=lambda rung: rung["accuracy"]["estimate"]):
        members, _, name = rung["rung"].rpartition(" of ")
        cells = [f"{members} runs of `{name}` together" if members else f"`{name}`"]
        sd = f"{100 * rung['sd']['estimate']:.3f}" if "sd" in rung else "-"
        cells += [points(rung["accuracy"]), sd, str(rung.get("runs", "-"))]
        seconds = rung["seconds"]
        cells += [f"{rung['epochs']:g}", f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"]
        cells += ["-" if members else f"{float(f'{3600 / seconds:.2g}'):,g}"]
        yield "| " + " | ".join(cells) + " |"


def test_the_readme_quotes_the_ladder():
    for line in ladder_lines():
        assert line in README


def test_the_readme_quotes_the_committee_and_the_hardest_images():
    record = read("committee-best-augmented.json")
    two, ten, every = (record["by_members"][i] for i in (1, 9, -1))
    assert 1e4 * two["mean"] >= max(record["correct_alone"])
    assert every["mean"] == record["correct_together"] / 1e4
    n, link = len(record["seeds"]), "(results/committee-best-augmented.png)"
    reached = f"as good as the best of {n}, ten reach {100 * ten['mean']:.2f} %, and"
    reached += f" [all {n}]{link} reach {100 * every['mean']:.2f} %"
    assert reached in README.replace("\n", " ")
    taught = read("committee-best-distilled.json")
    said = f"([all {len(taught['seeds'])}](results/committee-best-distilled.png) reach"
    said += f" {taught['correct_together'] / 100:.2f} %)"
    assert said in README.replace("\n", " ")
    runs = {rung["rung"]: rung.get("runs") for rung in read("ladder.json")["rungs"]}
    said = (
        "All {} runs of `best` miss {} images ({} of the 15), all {} of `best-augmented` {} ({}),"
    )
    said += " all {} of `best-distilled` {} ({})."
    counts = [
        (runs[name], len(images), sum(each["disputed"] for each in images))
        for name, images in read("ladder.json")["missed by all"].items()
    ]
    assert said.format(*itertools.chain(*counts)) in README.replace("\n", " ")


def test_the_readme_says_how_many_errors_are_at_disputed_labels():
    errors = read("ladder.json")["errors at disputed labels"]["best-distilled"]
    (rung,) = (r for r in read("ladder.json")["rungs"] if r["rung"] == "best-distilled")
    said = f"Of the {1e4 * (1 - rung['accuracy']['estimate']):.1f} errors that a run of"
    said += f" `best-distilled` makes on average, {errors:.1f} are on disputed labels"
    assert said in README.replace("\n", " ")


def test_the_readme_says_what_deformed_images_change_in_the_spread():
    (best, deformed) = (
        json.loads((ROOT / "results" / name / "summary.json").read_text())["families"][0]
        for name in ("best", "best-augmented")
    )
    errors = [f"{100 * each['independent_sd']:.3f}" for each in (best, deformed)]
    rest = [points(each["distribution_sd"], 3) for each in (best, deformed)]
    correct = (
        read_runs(ROOT / "results" / name, ["test_correct"])["test_correct"].to_numpy()
        for name in ("best-augmented", "best")
    )
    ratio, low, high = np.sqrt(variance_ratio(*correct))
    said = (
        f"The SD of `best-augmented` is {ratio:.2f} ({low:.2f} to {high:.2f}) times that of `best`,"
        " although independent errors alone would cause about the same SD in both,"
        f" {errors[1]} and {errors[0]} points. It is the distribution-wise part that differs:"
        f" {rest[0]} in `best`, but {rest[1]} in `best-augmented`. On endless test images it could"
        " not be negative"
    )
    assert said in README.replace("\n", " ")


def test_the_readme_compares_students_with_runs_like_their_teachers():
    def scores(name):
        table = read_runs(ROOT / "results" / name, ["test_correct"]).to_pylist()
        return {row["seed"]: row["test_correct"] / 1e4 for row in table}

    found = compare(scores("best-distilled"), scores("best-augmented"), margin=0.01).difference
    said = "{:.3f} points on average: {:.3f} to {:.3f}".format(*(100 * end for end in found))
    said = f"hardly better than runs without a teacher (by {said} on this test set,"
    assert said in README.replace("\n", " ")


def test_the_readme_says_how_much_runs_agree():
    def differ(name):
        table = read_runs(ROOT / "results" / name, ["predictions"])
        pairs = itertools.combinations(predictions(table["predictions"]), 2)
        return 100 * np.mean([a != b for a, b in pairs])

    taught, untaught = map(differ, ("best-distilled", "best-augmented"))
    said = f"two of them differ on {taught:.2f} % of the images, two runs without a teacher on"
    assert f"{said} {untaught:.2f} %." in README.replace("\n", " ")


@pytest.mark.network
def test_the_shipped_networks_are_as_good_in_float16(mnist):
    committee = load_committee()
    logits = mj.predict(committee, mnist.test.images)
    correct = (logits.argmax(-1) == mnist.test.labels).sum(-1).tolist()
    assert correct == [metrics["test_correct"] for metrics in committee.metrics]
    probabilities = jax.nn.softmax(logits).mean(0)
    sure = (probabilities.max(-1) > 0.98).mean()
    assert f"more than 98 % sure (of {100 * sure:.1f} % of the test images)" in README.replace(
        "\n", " "
    )
    together = probabilities.argmax(-1) == mnist.test.labels
    assert f"its teachers' vote ({100 * together.mean():.2f} %)" in README.replace("\n", " ")


@pytest.mark.network
def test_the_readme_says_what_that_is_over_all_such_images(mnist):
    names = (ROOT / "results" / name for name in ("best-distilled", "best-augmented"))
    _, low, high = mj.compare(*names).over_test_sets
    said = f"{100 * low:.3f} to {100 * high:.3f} over all such images"
    assert said in README.replace("\n", " ")


def test_the_readme_says_what_wider_teachers_gave():
    tried = {line["sweep"]: line for line in read("search.json")["sweeps"]}
    of = "epochs-100-sigma-6"
    wide, same, none = (tried[name] for name in (f"{of}-taught-by-1024", f"{of}-taught", of))
    assert [len(each["seeds"]) for each in (wide, same, none)] == [2, 2, 2]
    assert {each["settings"]["epochs"] for each in (wide, same, none)} == {100}
    assert {each["split"] for each in (wide, same, none)} == {"validation"}
    said = f"hidden layers of 1024 reached {wide['mean']:.3f} %, two of networks of this shape"
    said += f" {same['mean']:.3f} %, and two runs without a teacher {none['mean']:.3f} %."
    assert said in README.replace("\n", " ")


def test_rungs_follow_from_the_records():
    record = read("ladder.json")
    timed = record["timed"]["seconds per epoch"]
    recipes = {rung["rung"]: rung for rung in record["rungs"] if " of " not in rung["rung"]}
    assert tuple(recipes) == ladder.RECIPES
    for rung in record["rungs"]:
        members, _, name = rung["rung"].rpartition(" of ")
        if members:
            vote = read(f"committee-{name}.json")
            assert rung["accuracy"] == vote["accuracy"]
            assert int(members) == len(vote["seeds"])
            assert rung["seconds"] == pytest.approx(int(members) * recipes[name]["seconds"])
    for name, rung in recipes.items():
        table = read_runs(ROOT / "results" / name, ["vary", "test_correct"]).to_pylist()
        accuracies = [row["test_correct"] / 1e4 for row in table if row["vary"] == "all"]
        assert rung["runs"] == len(accuracies)
        assert rung["accuracy"]["estimate"] == pytest.approx(np.mean(accuracies))
        assert rung["sd"]["estimate"] == pytest.approx(np.std(accuracies, ddof=1))
        assert rung["epochs"] == read_metadata(ROOT / "results" / name).config.epochs
        assert rung["seconds"] == pytest.approx(math.ceil(rung["epochs"]) * timed[name])


def test_confusion_and_what_all_runs_miss_follow_from_the_rows():
    record = read("ladder.json")
    counts = np.array([980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009])  # of the test labels
    assert [*record["confusion"]] == [*record["missed by all"]] == [*ladder.UPPER]
    errors = np.array(record["confusion"]["best-distilled"]) * (1 - np.eye(10))
    worst = np.argsort(-errors, axis=None)[:2].tolist()
    (n, a, b), (m, c, d) = ((errors.flat[i], *divmod(i, 10)) for i in worst)
    said = f"most often takes a {a} for a {b} ({n:.1f} times) and a {c} for a {d} ({m:.1f} times;"
    assert said in README.replace("\n", " ")
    for name, matrix in record["confusion"].items():
        table = read_runs(ROOT / "results" / name, ["test_correct", "predictions"])
        predicted = predictions(table["predictions"])
        np.testing.assert_allclose(np.sum(matrix, axis=1), counts, atol=0.06)
        right = np.mean(table["test_correct"].to_pylist())
        assert np.trace(matrix) == pytest.approx(right, abs=0.06)
        shares = np.bincount(predicted.ravel(), minlength=10) / len(table)
        np.testing.assert_allclose(np.sum(matrix, axis=0), shares, atol=0.06)
        for each in record["missed by all"][name]:
            of_image = predicted[:, each["image"]]
            assert each["label"] not in of_image
            assert np.bincount(of_image, minlength=10).argmax() == each["taken for"]


@pytest.mark.network
def test_disputed_images_are_found_in_the_order_of_tfds(mnist):
    labels = [8, 0, 9, 4, 2, 5, 6, 6, 5, 5, 0, 1, 4, 6, 5]  # as published with the images' numbers
    images = ladder.find_disputed(len(mnist.test.labels))
    assert mnist.test.labels[images].tolist() == labels
    record = read("ladder.json")
    for each in [*record["hardest"], *itertools.chain(*record["missed by all"].values())]:
        assert each["disputed"] == (each["image"] in images)
    for name, errors in record["errors at disputed labels"].items():
        table = read_runs(ROOT / "results" / name, ["predictions"])
        wrong = predictions(table["predictions"])[:, images] != labels
        assert errors == pytest.approx(wrong.sum(axis=1).mean())


@pytest.mark.network
def test_the_hardest_images_follow_from_the_rows(mnist):
    labels, shares = mnist.test.labels, []
    for name in ladder.RECIPES:
        table = read_runs(ROOT / "results" / name, ["vary", "predictions"])
        of_all = np.array(table["vary"].to_pylist()) == "all"
        shares.append((predictions(table["predictions"])[of_all] != labels).mean(axis=0))
    shares, hardest = np.mean(shares, axis=0), read("ladder.json")["hardest"]
    for each in hardest:
        assert each["label"] == labels[each["image"]]
        assert each["missed"] == pytest.approx(shares[each["image"]])
    others = np.delete(shares, [each["image"] for each in hardest])
    assert others.max() <= min(each["missed"] for each in hardest)


def test_images_that_all_runs_miss():
    labels = np.array([1, 2, 3, 3])
    predicted = np.array([[1, 5, 4, 0], [7, 5, 3, 9], [1, 2, 4, 9]])
    assert ladder.missed(predicted, labels) == [{"image": 3, "label": 3, "taken for": 9}]
    both = {"a": predicted, "b": predicted[1:2]}
    first, second = ladder.hardest(both, labels)[:2]
    assert first == {"image": 3, "label": 3, "taken for": 9, "missed": 1.0}
    assert second == {"image": 1, "label": 2, "taken for": 5, "missed": (2 / 3 + 1) / 2}
    matrix = np.array(ladder.confusion(predicted, labels))
    assert matrix[1].tolist() == [0, 0.67, 0, 0, 0, 0, 0, 0.33, 0, 0]
    assert matrix[3, [0, 3, 4, 9]].tolist() == [0.33, 0.33, 0.67, 0.67]
