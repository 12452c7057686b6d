"""The ladder: what each recipe reaches on the test set, from the Keras README's 97.26 % upwards.

    python scripts/ladder.py              results/ladder.json, its figure, one of the hardest images
    python scripts/ladder.py --rounds 9   the same, and times an epoch of each recipe, in minutes

It reads the records in results/. A rung is a recipe, scored after its last epoch, or a committee of
its runs (`committee.py`). Its seconds are those of a single run on this machine: its epochs times
the median epoch of that many rounds, in which the recipes take turns. The hardest images are those
that most runs get wrong, all recipes counting alike; a ? marks a disputed label.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import tyro
from tensorflow_datasets.core.hashing import Hasher

import mlp_jax as mj
from mlp_jax.analysis.figures import BLUE, GRAY, ORANGE, add_legend, new_figure, show_images
from mlp_jax.errors import UserError
from mlp_jax.files import save_figure, write_json
from mlp_jax.records.directory import read_metadata
from mlp_jax.records.rows import predictions

RESULTS = Path(__file__).parents[1] / "results"
OUT = RESULTS / "ladder.json"
UPPER = ("best", "best-augmented", "best-distilled")
RECIPES = ("keras-sgd", "sprint", "keras-rmsprop", "sprint-98", "sprint-99", *UPPER)
HARDEST = 24
PUBLISHED = {
    "this net, Keras README": 97.26,
    "this net, Keras' mnist_mlp": 98.40,
    "512-512, L2-SVM (Tang 2013)": 99.13,
    "ladder network (2015)": 99.43,
    "1000-500, deformed (Ciresan 2010)": 99.51,
    "12 million parameters (Ciresan 2010)": 99.65,
}
"""Test accuracy in % of fully connected networks; the last three are larger than this one."""
DISPUTED = (947, 1621, 1901, 2130, 2462, 2597, 2654, 3520)
DISPUTED += (3558, 5937, 6651, 6783, 8527, 9679, 9729)
"""Test images, counted from 0 in MNIST's own files, whose label at most two of five people found
right. 100 were shown to them (Northcutt et al., arXiv 2103.14749, github.com/cleanlab)."""


@dataclasses.dataclass(frozen=True)
class Args:
    rounds: int = 0
    """Epochs of each recipe to time; 0: keep the seconds of the last timing."""
    data_dir: Path | None = None
    """Where TFDS keeps its data; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""


def read_predictions(name: str) -> np.ndarray:
    """Predicted classes [runs, images] of a recipe's record."""
    table = mj.read_runs(RESULTS / name, ["vary", "predictions"])
    rows = [i for i, vary in enumerate(table["vary"].to_pylist()) if vary == "all"]
    return predictions(table["predictions"].take(rows))


def make_rungs(seconds: dict[str, float]) -> list[dict]:
    """A rung for each recipe, and each committee that has a record; accuracies are fractions.

    `seconds` are those of an epoch of each recipe.
    """
    rungs = []
    for name in RECIPES:
        family = json.loads((RESULTS / name / "summary.json").read_text())["families"][0]
        config = read_metadata(RESULTS / name).config
        took = config.n_epochs * seconds[name]
        rung = {"rung": name, "runs": family["runs"], "epochs": config.epochs, "seconds": took}
        columns = ("sd", "independent_sd", "distribution_sd")
        rung |= {"accuracy": family["mean"]} | {column: family[column] for column in columns}
        rungs.append(rung)
        if (path := RESULTS / f"committee-{name}.json").exists():
            record = json.loads(path.read_text())
            members = len(record["seeds"])
            rows = mj.read_runs(RESULTS / name, ["seed", "test_correct"]).to_pylist()
            scores = {row["seed"]: row["test_correct"] for row in rows}
            assert record["correct_alone"] == [scores[seed] for seed in record["seeds"]], path
            several = {"rung": f"{members} of {name}", "epochs": config.epochs}
            several |= {"seconds": members * took, "accuracy": record["accuracy"]}
            rungs.append(several)
    return rungs


def time_epochs(args: Args) -> dict[str, float]:
    """Median seconds of an epoch of each recipe, or of a part as `sprint` has, in turns."""
    trainings = {}
    for name in RECIPES:
        config = mj.RECIPES[name]
        if config.epochs > 1:  # those of all turns, and one to compile
            config = dataclasses.replace(config, epochs=args.rounds + 1)
        trainings[name] = epochs_of(config, mj.load_data(config, data_dir=args.data_dir))
        next(trainings[name])
    seconds = {name: [] for name in RECIPES}
    for _ in range(args.rounds):
        for name, training in trainings.items():
            start = time.perf_counter()
            next(training)
            seconds[name].append(time.perf_counter() - start)
    return {name: median(each) for name, each in seconds.items()}


def epochs_of(config: mj.Config, data) -> Iterator:
    """The epochs of runs of `config`, one after another."""
    for seed in itertools.count():
        yield from mj.fit(config, data, seeds=[seed])


def confusion(predicted: np.ndarray, labels: np.ndarray) -> list[list[float]]:
    """How many images of each class (row) a run puts into each class (column), on average."""
    matrix = np.zeros((10, 10))
    for row in predicted:
        np.add.at(matrix, (labels, row), 1 / len(predicted))
    return matrix.round(2).tolist()


def missed(predicted: np.ndarray, labels: np.ndarray) -> list[dict]:
    """The test images that no run gets right, and what most runs take them for.

    `predicted` are classes [runs, images].
    """
    return describe_images(np.flatnonzero((predicted != labels).all(axis=0)), predicted, labels)


def hardest(predicted: dict[str, np.ndarray], labels: np.ndarray) -> list[dict]:
    """The HARDEST test images, those with the largest mean, over recipes, of the share of runs."""
    shares = np.mean([(each != labels).mean(axis=0) for each in predicted.values()], axis=0)
    images = np.argsort(-shares, kind="stable")[:HARDEST]
    described = describe_images(images, np.concatenate(list(predicted.values())), labels)
    return [one | {"missed": float(shares[one["image"]])} for one in described]


def describe_images(images: np.ndarray, predicted: np.ndarray, labels: np.ndarray) -> list[dict]:
    """Each image with its label, and the other class that most runs take it for."""
    described = []
    for i in images.tolist():
        counts = np.bincount(predicted[:, i], minlength=10)
        counts[labels[i]] = 0
        described += [{"image": i, "label": int(labels[i]), "taken for": int(counts.argmax())}]
    return described


def find_disputed(n_test: int) -> list[int]:
    """Where the DISPUTED images are in TFDS, which sorts examples by a hash of their number."""
    numbers = sorted(range(n_test), key=Hasher("test").hash_key)
    return [numbers.index(number) for number in DISPUTED]


def describe_errors(predicted: dict[str, np.ndarray], labels: np.ndarray) -> dict:
    """Where the runs of the UPPER recipes err, and the hardest images for those of all."""
    upper = {name: predicted[name] for name in UPPER}
    disputed = find_disputed(len(labels))
    missed_by_all = {name: missed(each, labels) for name, each in upper.items()}
    errors = {name: each[:, disputed] != labels[disputed] for name, each in upper.items()}
    return {
        "confusion": {name: confusion(each, labels) for name, each in upper.items()},
        "missed by all": {n: mark_disputed(each, disputed) for n, each in missed_by_all.items()},
        "errors at disputed labels": {n: each.sum() / len(each) for n, each in errors.items()},
        "hardest": mark_disputed(hardest(predicted, labels), disputed),
    }


def mark_disputed(each: list[dict], disputed: list[int]) -> list[dict]:
    return [one | {"disputed": one["image"] in disputed} for one in each]


def draw(rungs: list[dict], backend: str):
    """Test error of each rung with its interval, above those published."""
    published = list(PUBLISHED.items())
    rows = len(rungs) + len(published)
    figure, ax = new_figure("Test error of fully connected networks on MNIST", 0.9 + 0.3 * rows)
    of_runs = np.array(["runs" in rung for rung in rungs])
    names = [rung["rung"] + (f", {rung['runs']} runs" if "runs" in rung else "") for rung in rungs]
    names += [name for name, _ in published]
    error, low, high = (
        np.array([100 * (1 - rung["accuracy"][end]) for rung in rungs])
        for end in ("estimate", "high", "low")
    )
    order = np.argsort([-x for x in [*error, *(100 - a for _, a in published)]], kind="stable")
    y = np.empty(rows)
    y[order] = np.arange(rows)
    for those, fmt, face, label in (
        (of_runs, "o", BLUE, f"mlp_jax on {backend}, 95 % interval over runs"),
        (~of_runs, "s", "white", "its votes, 95 % interval over test images"),
    ):
        ends = np.array([error - low, high - error])[:, those]
        style = {"fmt": fmt, "color": BLUE, "markerfacecolor": face, "capsize": 3}
        ax.errorbar(error[those], y[: len(rungs)][those], xerr=ends, label=label, **style)
    known = [100 - accuracy for _, accuracy in published]
    ax.plot(known, y[len(rungs) :], "D", color=ORANGE, label="published")
    ax.set_yticks(y, names)
    ticks = (3, 2, 1, 0.5, 0.3)
    ax.set(xscale="log", xlabel="test error (%)", ylim=(-0.6, rows - 0.4))
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.invert_xaxis()
    ax.grid(axis="y", color=GRAY, alpha=0.2)
    return add_legend(figure, 2, ax)


def draw_missed(images: np.ndarray, each: list[dict], title: str):
    """Images above their label and what they are taken for."""
    columns = 8
    rows = -(-len(each) // columns)
    figure, *axes = new_figure(title, 0.5 + 1.1 * rows, rows, columns)
    text = "#{image}: {label}{mark} \N{RIGHTWARDS ARROW} {taken for}"
    captions = [text.format_map(one | {"mark": "?" * one["disputed"]}) for one in each]
    show_images(axes, images[[one["image"] for one in each]], captions, "gray_r")
    return figure


def main(args: Args) -> None:
    test = mj.load_dataset("mnist", args.data_dir).test
    if args.rounds:
        timed = {"environment": mj.describe_environment(), "rounds": args.rounds}
        timed["seconds per epoch"] = time_epochs(args)
    elif OUT.exists():
        timed = json.loads(OUT.read_text())["timed"]
    else:
        raise UserError(f"{OUT} has no seconds yet: add --rounds 9")
    record = {
        "command": f"python scripts/ladder.py --rounds {timed['rounds']}",
        "timed": timed,
        "rungs": make_rungs(timed["seconds per epoch"]),
        **describe_errors({name: read_predictions(name) for name in RECIPES}, test.labels),
    }
    on = timed["environment"]["backend"]
    write_json(OUT, record)
    save_figure(OUT.with_suffix(".png"), draw(record["rungs"], on))
    title = f"The {HARDEST} test images that most runs of {len(RECIPES)} recipes on {on} get wrong"
    title += " (?: disputed label)"
    figure = draw_missed(test.images, record["hardest"], title)
    save_figure(RESULTS / "ladder-hardest.png", figure)
    for rung in record["rungs"]:
        print(f"{100 * rung['accuracy']['estimate']:.2f} %  {rung['rung']}")
    for name, images in record["missed by all"].items():
        print(f"{len(images)} images are missed by all runs of {name}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
