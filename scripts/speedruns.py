"""Seconds of a whole training by each recipe and by Keras, side by side, and what they reach.

    pip install -e ".[bench]"
    python scripts/speedruns.py             results/speedruns.json and its figure, in minutes
    python scripts/speedruns.py --draw      the figure again, from the records
    python scripts/speedruns.py --log       results/speedruns-search.json, from the sweeps with
                                            --split validation that the settings were chosen by

Each contender has a process of its own, which compiles and trains for an epoch before anything is
timed. They take turns, A B C A B C ..., so other load on the machine affects all. A training of
many epochs is spread over all turns, whose seconds add up; a short one is made twice in each, and
the second is timed, since the first warms the process up again: its seconds are the median over the
turns. They include the scoring of the test set after each epoch. CPU seconds are those of all
threads, and suffer less from other load. Keras runs the script of its README.
"""

import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import tyro
from _peers import train_keras
from benchmark import Peer, describe, fresh

import mlp_jax as mj
from mlp_jax.analysis.figures import BLUE, GRAY, ORANGE, add_legend, new_figure
from mlp_jax.errors import UserError
from mlp_jax.files import write_json, write_text
from mlp_jax.records.directory import read_metadata
from mlp_jax.records.rows import checked_files, read_scores
from mlp_jax.training.parallel import place
from mlp_jax.training.programs import current_programs, run_bytes

RESULTS = Path(__file__).parents[1] / "results"
OUT = RESULTS / "speedruns.json"
SEARCH = RESULTS / "speedruns-search.json"
KERAS = "Keras on TensorFlow"
KERAS_EPOCHS = 50  # of its README
RECIPES = ("short", "sprint", "sprint-98", "keras-rmsprop", "keras-sgd", "sprint-99", "best")


@dataclasses.dataclass(frozen=True)
class Args:
    recipes: tuple[str, ...] = RECIPES
    """Recipes to time beside Keras."""
    rounds: int = 5
    """Turns of each contender."""
    draw: bool = False
    """Time nothing, only draw."""
    log: bool = False
    """Time nothing, only summarize the search."""
    data_dir: Path | None = None
    """Where TFDS keeps its data; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""


class Contender(Peer):
    """A peer whose whole training takes `epochs`; lists of seconds are by round."""

    def __init__(self, name: str, epochs: float, rounds: int, train: Callable, *args):
        self.epochs, self.turns = epochs, math.ceil(epochs)
        self.is_short = self.turns < rounds
        self.parts = [self.turns] * rounds if self.is_short else split(self.turns, rounds)
        self.wall, self.cpu, self.accuracy = [], [], []
        super().__init__(name, clocked, train, *args)

    def turn(self) -> None:
        n = self.parts[len(self.wall)]
        for _ in range(1 + self.is_short):
            start, cpu = time.perf_counter(), self.accuracies[-1]
            for _ in range(n):
                self.pipes[0].send("go")
                self.accuracies = self.results()
                self.accuracy.append(self.accuracies[0])
        self.wall.append(time.perf_counter() - start)
        self.cpu.append(self.accuracies[-1] - cpu)

    def row(self) -> dict:
        row: dict = {"what": self.name, "epochs": self.epochs}
        for name, parts in (("seconds", self.wall), ("cpu seconds", self.cpu)):
            row[name] = median(parts) if self.is_short else sum(parts)
            # one turn is a whole short training, or an equal part of a long one
            wholes = [part * self.turns / n for part, n in zip(parts, self.parts, strict=True)]
            row[f"{name} by turn"] = wholes
        ends = self.accuracy[self.turns - 1 :: self.turns]
        row |= {"test accuracy": float(np.mean(ends)), "runs": len(ends)}
        return row | {"test accuracy by epoch": self.accuracy[: self.turns]}


def split(epochs: int, rounds: int) -> list[int]:
    """`epochs` in `rounds` parts, as equal as can be."""
    return [(i + 1) * epochs // rounds - i * epochs // rounds for i in range(rounds)]


def clocked(turn: Callable, seed: int, train: Callable, *args) -> None:
    """`train`, whose turns also say the CPU seconds of the process so far."""
    train(lambda accuracies: turn([*accuracies, time.process_time()]), seed, *args)


def train_recipe(turn: Callable, seed: int, data_dir: Path | None, recipe: str) -> None:
    """Trainings of a recipe without end, each of a fresh seed."""
    config, data = mj.RECIPES[recipe], mj.load_dataset("mnist", data_dir)
    placement = place(1, run_bytes(config))
    programs = current_programs(config, placement, data.arrays)
    compiled = {"placement": placement, "programs": programs}
    turn(list(next(mj.fit(config, data, **compiled)).test_accuracy))
    for fresh_seed in itertools.count(seed):
        for progress in mj.fit(config, data, seeds=[fresh_seed], **compiled):
            turn(list(progress.test_accuracy))


def measure(args: Args) -> dict:
    record = {"command": " ".join(["python", "scripts/speedruns.py", *sys.argv[1:]])}
    record |= {"environment": fresh(describe), "rounds": args.rounds}
    keras = train_keras, args.data_dir, "tensorflow"
    contenders = [Contender(KERAS, KERAS_EPOCHS, args.rounds, *keras)]
    contenders += [
        Contender(name, mj.RECIPES[name].epochs, args.rounds, train_recipe, args.data_dir, name)
        for name in args.recipes
    ]
    for _ in range(args.rounds):
        for contender in contenders:
            contender.turn()
    return record | {"rows": [contender.row() for contender in contenders]}


def accuracies(row: dict) -> tuple[np.ndarray, int]:
    """Mean test accuracy after each epoch, and of how many runs: the record's, if there is one."""
    if row["what"] == KERAS:
        return np.array(row["test accuracy by epoch"]), row["runs"]
    table = mj.read_runs(RESULTS / row["what"], ["vary", "test_correct_by_epoch"]).to_pylist()
    by_epoch = [run["test_correct_by_epoch"] for run in table if run["vary"] == "all"]
    return np.mean(by_epoch, axis=0) / 10_000, len(by_epoch)


def draw(record: dict):
    """Test error against seconds of training, a line for each contender."""
    machine = "{cores} cores of {processor}".format(**record["environment"])
    figure, ax = new_figure(f"Test error by seconds of training: {machine}", 4.2)
    colours = itertools.cycle(("#56B4E9", BLUE, ORANGE, "#E69F00", "#CC79A7", "#009E73", "black"))
    for row in record["rows"]:
        reached, runs = accuracies(row)
        seconds = row["seconds"] * np.arange(1, len(reached) + 1) / len(reached)
        colour = GRAY if row["what"] == KERAS else next(colours)
        name = f"{row['what']}, {'1 run' if runs == 1 else f'{runs} runs'}"
        ax.plot(seconds, 100 * (1 - reached), color=colour, linewidth=1.2)
        ax.plot(seconds[-1:], 100 * (1 - reached[-1:]), "o-", color=colour, label=name)
    ax.set(xscale="log", yscale="log", xlim=(0.2, 250), ylabel="test error, %")
    ax.set_xlabel("seconds of training and scoring, without compilation")
    for accuracy in (97.26, 98.40, 99.00):
        ax.axhline(100 - accuracy, color=GRAY, linewidth=0.5, zorder=0)
        text = f"accuracy {accuracy:.2f} %"
        ax.annotate(text, (0.21, 100 - accuracy), (0, 2), textcoords="offset points", size=8)
    ticks = (1, 2, 5, 10)
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xticks([0.3, 1, 3, 10, 30, 100], ["0.3", "1", "3", "10", "30", "100"])
    ax.minorticks_off()
    return add_legend(figure, 3, ax)


def searched() -> list[Path]:
    """The sweeps of the search, some of which are shared with that for the most accurate net."""
    shared = RESULTS.glob("search/epochs-[2-4][0-9]-*vat*")
    return [*sorted((RESULTS / "speedruns-search").iterdir()), *sorted(shared)]


def write_search(rows: list[dict]) -> None:
    """A line per setting; those of other code, whose rows are not kept, stay as they are."""
    record = json.loads(SEARCH.read_text()) | {"rows": rows}
    parts = []
    for name, value in record.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    write_text(SEARCH, "{\n" + ",\n".join(parts) + "\n}\n")


def search_rows(directories: Sequence[Path]) -> list[dict]:
    """What each setting gave on held-out images: runs and their accuracies in %."""
    default = dataclasses.asdict(mj.Config(split="validation"))
    del default["learning_rate"]  # each row says its own
    found: dict[tuple, dict[int, float]] = {}  # a seed that two sweeps trained counts once
    for directory in directories:
        config = read_metadata(directory).config
        if (config.dataset, config.split) != ("mnist", "validation"):
            raise UserError(f"{directory} was scored on {config.dataset}, {config.split} split")
        columns = ["vary", "seed", "learning_rate", "test_correct"]
        if not all(map(math.isfinite, read_scores(checked_files(directory)).values())):
            raise UserError(f"{directory} has runs that diverged")
        for run in mj.read_runs(directory, columns).to_pylist():
            if run["vary"] != "all":
                raise UserError(f"{directory} has the family {run['vary']}: log sweeps of all")
            settings = dataclasses.asdict(config) | {"learning_rate": run["learning_rate"]}
            changed = tuple(sorted(settings.items() - default.items()))
            found.setdefault(changed, {})[run["seed"]] = run["test_correct"] / 100
    return [
        dict(changed)
        | {"seeds": sorted(by_seed), "mean": round(mean(by_seed.values()), 3)}
        | ({"sd": round(stdev(by_seed.values()), 3)} if len(by_seed) > 1 else {})
        for changed, by_seed in found.items()
    ]


def main(args: Args) -> None:
    if args.log:
        write_search(search_rows(searched()))
        return
    if not args.draw:
        write_json(OUT, measure(args))
    draw(json.loads(OUT.read_text())).savefig(OUT.with_suffix(".png"), dpi=125)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
