"""`python -m mlp_jax.sweep`: many runs of one recipe, in a directory that can be resumed."""

import dataclasses
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from mlp_jax import cli
from mlp_jax.errors import UserError
from mlp_jax.records import directory as directories
from mlp_jax.training.config import RECIPES, Config
from mlp_jax.training.run import Run, make_run, make_runs

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
class Args(cli.TrainingArgs):
    config: tyro.conf.OmitArgPrefixes[Grid]
    out: Path
    """Directory of the sweep: new, or one to resume or extend."""
    seeds: str = "0:100"
    """First and end, as in 0:100 for 0 ... 99; or a list, as in 3,5,8."""
    vary: tuple[Literal["all", "init", "order", "dropout", "augment", "data"], ...] = ("all",)
    """What the seed decides; the other streams keep seed 0. Runs of several are interleaved."""
    devices: Literal["auto"] | int = "auto"
    """How many local devices (on CPU: cores) train; auto: all."""
    lanes: Literal["auto"] | int = "auto"
    """Runs that a device trains in one vmap; auto: on GPU and TPU what fits; on CPU 1, since with
    more the rows are no longer the single runs bit for bit."""
    chunk: Literal["auto"] | int = "auto"
    """Runs that share a file; auto: enough to take minutes."""
    keep_weights: bool = False
    """Store the weights of each finished run, too."""
    shard: str | None = None
    """I/N: train the I-th of N equal parts of the runs, I from 0; default: the part of this process
    in a SLURM array or srun, or under Open MPI, else all."""


def main(argv: list[str] | None = None) -> None:
    """Train what is missing from --out; raises UserError."""
    recipe = cli.parse_recipe(argv)
    grid = Grid(**vars(RECIPES[recipe]) | {"learning_rate": (RECIPES[recipe].learning_rate,)})
    default = Args(config=grid, recipe=recipe, out=tyro.MISSING)
    args = cli.parse_args(default, argv, prog=PROG, description=DESCRIPTION)
    cli.check_at_least(args, {"devices": 1, "lanes": 1, "chunk": 1, "checkpoint_every": 0})
    index, count = cli.parse_shard(args.shard)
    runs = wanted_runs(args)[index::count]  # interleaved, so that all families grow together
    directories.check_out_dir(args.out)
    if not runs:  # more shards than runs
        return

    # these take a second, and bad flags are answered without them
    from mlp_jax.data.dataset import load_dataset
    from mlp_jax.experiment import open_experiment
    from mlp_jax.training.parallel import use_cores

    use_cores()
    dataset = load_dataset(args.config.dataset, **args.data_options())
    config = args.config.at(args.config.learning_rate[0])
    names = ("recipe", "devices", "lanes", "chunk", "checkpoint_every", "keep_weights")
    names += ("allow_mixed",)
    options = {name: getattr(args, name) for name in names} | {"shard": (index, count)}
    opened = open_experiment(args.out, config, dataset, runs, **options)
    del dataset  # the devices have their own
    with cli.StopSignals() as stop, opened as experiment:
        bar = Bar(experiment, len(runs), len(experiment.missing(runs)), args.quiet)
        for epoch in experiment.train(runs, lambda: stop.requested):
            bar.update(epoch)
        bar.close()
        if missing := len(experiment.missing(runs)):
            counts = f"{len(runs) - missing} of {len(runs)} runs finished"
            again = cli.command_line(PROG, argv)
            stop.exit(f"{counts}, the epochs of the others saved; resume with: {again}")


def wanted_runs(args: Args) -> list[Run]:
    """The runs that the flags name; UserError if they name none, or one twice."""
    seeds, rates = parse_seeds(args.seeds), args.config.learning_rate
    for name, values in (("vary", args.vary), ("learning-rate", rates)):
        if not values:
            raise UserError(f"--{name} needs at least one value")
    for rate in rates:
        args.config.at(rate)
    if (n_runs := len(seeds) * len(set(args.vary)) * len(rates)) > MAX_RUNS:
        raise UserError(f"a sweep has at most {MAX_RUNS:,} runs, not {n_runs:,}")
    if len({make_run(0, rate) for rate in rates}) < len(rates):
        raise UserError("--learning-rate takes values that differ in float32")
    return make_runs(seeds, args.vary, rates)


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

    def __init__(self, experiment, n_runs: int, n_missing: int, quiet: bool):
        from tqdm import tqdm

        self._experiment, self._n_runs, self._seconds = experiment, n_runs, 0.0
        self._stored, self._epochs = len(experiment.finished), experiment.metadata.config.n_epochs
        shape = "{percentage:3.0f}%|{bar:30}| {desc} [{elapsed}<{remaining}]"
        quiet |= sys.stderr is None  # closed
        self._bar = tqdm(total=n_missing * self._epochs, bar_format=shape, disable=quiet)

    def update(self, epoch) -> None:
        self._write_stored()
        self._seconds += epoch.seconds[-1]
        trained = self._bar.n + len(epoch.progress.runs)
        finished = self._n_runs - (self._bar.total - trained) // self._epochs
        rate = trained / self._epochs / self._seconds * 3600
        text = f"{finished} of {self._n_runs} runs, {rate:.0f} runs an hour"
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(len(epoch.progress.runs))

    def _write_stored(self) -> None:
        if len(self._experiment.finished) > self._stored and not self._bar.disable:
            self._stored, n_test = len(self._experiment.finished), self._experiment.dataset.test
            self._bar.write(accuracy_line(self._experiment.finished, len(n_test.labels)))

    def close(self) -> None:
        self._write_stored()
        self._bar.close()


def accuracy_line(finished: dict[Run, dict], n_test: int) -> str:
    """Mean and SD of the test accuracy so far, by family, of the runs that did not diverge."""
    families: dict[tuple, list[dict]] = {}
    for run, row in finished.items():
        families.setdefault((run.vary, run.learning_rate), []).append(row)
    texts = []
    for (vary, rate), rows in families.items():
        kept = [row for row in rows if math.isfinite(row["train_loss"] + row["test_loss"])]
        scores = [100 * row["test_correct"] / n_test for row in kept]
        text = f"{vary} at {rate:g}: {len(rows)} runs"
        text += f", mean {statistics.mean(scores):.3f} %" if scores else ""
        text += f", SD {statistics.stdev(scores):.3f} points" if len(scores) > 1 else ""
        text += f", {len(rows) - len(kept)} diverged" if len(kept) < len(rows) else ""
        texts.append(text)
    return "; ".join(texts)


if __name__ == "__main__":
    cli.run_cli(main)
