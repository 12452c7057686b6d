"""`python -m mlp_jax.sweep`: many runs of one recipe, in a directory that can be resumed."""

import dataclasses
import itertools
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from mlp_jax.cli import (
    StopSignals,
    TrainingArgs,
    check_at_least,
    command_line,
    parse_args,
    parse_recipe,
    parse_shard,
    run_cli,
)
from mlp_jax.errors import UserError
from mlp_jax.records import directory as directories
from mlp_jax.training.config import RECIPES, Config
from mlp_jax.training.run import Run, make_run

PROG = "python -m mlp_jax.sweep"
MAX_RUNS = 10_000_000  # their list takes gigabytes
DESCRIPTION = "Train many seeds of a recipe; run it again to continue where it stopped."


@dataclasses.dataclass(frozen=True)
class Grid(Config):
    """The flags of a Config, of which the learning rate takes several values."""

    learning_rate: tuple[float, ...] = ()
    """Step sizes at the peak of the schedule; each is crossed with all seeds, in one program."""

    def __post_init__(self):
        """Checked where each value becomes a Config."""

    def at(self, learning_rate: float) -> Config:
        return Config(**vars(self) | {"learning_rate": learning_rate})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(TrainingArgs):
    config: tyro.conf.OmitArgPrefixes[Grid]
    out: Path
    """Directory of the sweep: new, or one to resume or extend."""
    seeds: str = "0:100"
    """First and end, as in 0:100 for 0 ... 99; or a list, as in 3,5,8."""
    vary: tuple[Literal["all", "init", "order", "dropout"], ...] = ("all",)
    """What the seed decides; the other streams keep seed 0. Runs of several are interleaved."""
    devices: Literal["auto"] | int = "auto"
    """How many local devices (on CPU: cores) train; auto: all."""
    lanes: Literal["auto"] | int = "auto"
    """Runs that a device trains in one vmap; auto: on GPU and TPU what fits; on CPU 1, since with
    more the rows are no longer the single runs bit for bit."""
    chunk: Literal["auto"] | int = "auto"
    """Runs that share a file; auto: what takes minutes."""
    keep_weights: bool = False
    """Store the weights of each finished run, too."""
    shard: str | None = None
    """I/N: train the I-th of N equal parts of the runs, I from 0; default: the part of this process
    in a SLURM array or srun, or under Open MPI, else all."""


def main(argv: list[str] | None = None) -> None:
    """Train what is missing from --out; raises UserError."""
    recipe = parse_recipe(argv)
    config = RECIPES[recipe]
    grid = Grid(**vars(config) | {"learning_rate": (config.learning_rate,)})
    default = Args(config=grid, recipe=recipe, out=tyro.MISSING)
    args = parse_args(default, argv, prog=PROG, description=DESCRIPTION)
    index, count = parse_shard(args.shard)
    wanted = wanted_runs(args)[index::count]  # interleaved, so that no family waits for another
    check_at_least(args, {"devices": 1, "lanes": 1, "chunk": 1, "checkpoint_every": 0})
    directories.check_out_dir(args.out)
    if not wanted:  # more shards than runs
        return

    # these take a second, and bad flags are answered without them
    from mlp_jax.data.dataset import load_dataset
    from mlp_jax.experiment import open_experiment
    from mlp_jax.training.parallel import use_cores

    use_cores()
    dataset = load_dataset(args.config.dataset, args.data_dir, args.manual_dir, quiet=args.quiet)
    config = args.config.at(args.config.learning_rate[0])
    names = ("recipe", "devices", "lanes", "chunk", "checkpoint_every", "keep_weights")
    options = {name: getattr(args, name) for name in names} | {"shard": (index, count)}
    opened = open_experiment(args.out, config, dataset, wanted, **options)
    with opened as experiment, StopSignals() as stop:
        bar = Bar(experiment, wanted, args.quiet)
        for epoch in experiment.train(wanted, lambda: stop.requested):
            bar.update(epoch)
        bar.close()
        if missing := experiment.missing(wanted):
            line = f"{len(wanted) - len(missing)} of {len(wanted)} runs finished, the epochs of the"
            line += " others saved; resume with: "
            stop.exit(line + command_line(PROG, argv))


def wanted_runs(args: Args) -> list[Run]:
    """Seeds x families x learning rates; UserError for values that name no run, or one twice."""
    seeds, rates = parse_seeds(args.seeds), args.config.learning_rate
    for name, values in (("vary", args.vary), ("learning-rate", rates)):
        if not values:
            raise UserError(f"--{name} needs at least one value")
    for rate in rates:
        args.config.at(rate)
    families = list(itertools.product(dict.fromkeys(args.vary), rates))
    if (n_runs := len(seeds) * len(families)) > MAX_RUNS:
        raise UserError(f"a sweep has at most {MAX_RUNS:,} runs, not {n_runs:,}")
    if len({make_run(0, rate) for rate in rates}) < len(rates):
        raise UserError("--learning-rate takes values that differ in float32")
    return [make_run(seed, rate, vary) for seed in seeds for vary, rate in families]


def parse_seeds(text: str) -> Sequence[int]:
    """The seeds of `first:end` or of a comma-separated list; UserError for anything else."""
    if span := re.fullmatch(r"(\d{1,10}):(\d{1,10})", text):
        seeds = range(int(span[1]), int(span[2]))
        largest = seeds.stop - 1  # max() would count up to it
    elif re.fullmatch(r"\d{1,10}(,\d{1,10})*", text):
        seeds = list(dict.fromkeys(int(seed) for seed in text.split(",")))
        largest = max(seeds)
    else:
        raise UserError(f"--seeds takes first:end or a list such as 3,5,8, not {text!r}")
    if not seeds:
        raise UserError(f"--seeds {text} names no seed")
    make_run(largest, 1.0)
    return seeds


class Bar:
    """A progress bar: finished runs, runs an hour, the time left; and a line for each file."""

    def __init__(self, experiment, wanted: Sequence[Run], quiet: bool):
        from tqdm import tqdm

        self._experiment, self._wanted = experiment, wanted
        self._stored = len(experiment.finished)
        self._trained, self._seconds = 0, 0.0  # epochs of runs, and the time that they took
        epochs = len(experiment.missing(wanted)) * experiment.metadata.config.epochs
        shape = "{percentage:3.0f}%|{bar:30}| {desc} [{elapsed}<{remaining}]"
        self._bar = tqdm(total=epochs, bar_format=shape, disable=quiet)

    def update(self, epoch) -> None:
        self._write_stored()
        runs, epochs = len(epoch.progress.runs), self._experiment.metadata.config.epochs
        self._trained += runs
        self._seconds += epoch.seconds[-1]
        finished = len(self._wanted) - (self._bar.total - self._trained) // epochs
        rate = self._trained / epochs / self._seconds * 3600
        text = f"{finished} of {len(self._wanted)} runs, {rate:.0f} runs an hour"
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(runs)

    def _write_stored(self) -> None:
        if len(self._experiment.finished) > self._stored:
            self._stored = len(self._experiment.finished)
            if not self._bar.disable:
                n_test = len(self._experiment.dataset.test.labels)
                self._bar.write(accuracy_line(self._experiment.finished, n_test))

    def close(self) -> None:
        self._write_stored()
        self._bar.close()


def accuracy_line(finished: dict[Run, dict], n_test: int) -> str:
    """Mean and SD of the test accuracy so far, by family, of the runs that did not diverge."""
    families: dict[tuple, list[dict]] = {}
    for run, row in finished.items():
        families.setdefault((run.vary, run.learning_rate), []).append(row)
    texts = []
    for (vary, rate), family in families.items():
        scores = [100 * row["test_correct"] / n_test for row in family if is_finite(row)]
        text = f"{vary} at {rate:g}: {len(family)} runs"
        if scores:
            text += f", mean {statistics.mean(scores):.3f} %"
        if len(scores) > 1:
            text += f", SD {statistics.stdev(scores):.3f} points"
        if diverged := len(family) - len(scores):
            text += f", {diverged} diverged"
        texts.append(text)
    return "; ".join(texts)


def is_finite(row: dict) -> bool:
    return math.isfinite(row["train_loss"]) and math.isfinite(row["test_loss"])


if __name__ == "__main__":
    run_cli(main)
