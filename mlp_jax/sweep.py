"""`python -m mlp_jax.sweep`: many runs of one recipe into a directory that can be gone on with.

A row is the single run of that seed: how many train together, in which order, or how often the
sweep was stopped changes no number of it (bit for bit on CPU).
"""

import dataclasses
import math
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mlp_jax import store
from mlp_jax.config import (
    RECIPES,
    Config,
    RecipeName,
    UserError,
    parse_args,
    recipe_in,
    run_front,
    stream_seeds,
)

DESCRIPTION = "Train many seeds of a recipe; run it again to go on where it stopped."


@dataclasses.dataclass(frozen=True)
class Grid(Config):
    """A Config for each of several learning rates."""

    learning_rate: tuple[float, ...] = (RECIPES["keras-sgd"].learning_rate,)
    """Step sizes; each is crossed with all seeds, in one program."""

    def __post_init__(self):
        if not self.learning_rate or len(set(self.learning_rate)) < len(self.learning_rate):
            raise UserError("--learning-rate takes one or more different values")
        for rate in self.learning_rate:
            self.at(rate)

    @classmethod
    def of(cls, config: Config) -> "Grid":
        return cls(**dataclasses.asdict(config) | {"learning_rate": (config.learning_rate,)})

    def at(self, learning_rate: float) -> Config:
        return Config(**dataclasses.asdict(self) | {"learning_rate": learning_rate})


@dataclasses.dataclass(frozen=True)
class Args:
    config: Annotated[Grid, tyro.conf.arg(name="")]
    recipe: RecipeName
    """Named settings; each can be changed by the flags below."""
    out: Path
    """Directory of the sweep: new, or one to go on with."""
    seeds: str = "0:100"
    """First and end, as in 0:100 for 0 ... 99; or a list, as in 3,5,8."""
    vary: tuple[Literal["all", "init", "order", "dropout"], ...] = ("all",)
    """What the seed decides; the other streams keep seed 0. Several are trained by turns."""
    data_dir: Path | None = None
    """Where TFDS keeps its data; else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    manual_dir: Path | None = None
    """Where the four IDX files lie, if they are not to be downloaded."""
    devices: int | None = None
    """How many local devices (on CPU: cores) train; else all."""
    lanes: int | None = None
    """Runs that a device trains in one vmap; else 1 on CPU, and what fits on GPU and TPU."""
    chunk: int | None = None
    """Runs that are trained, and stored, together; else what takes minutes."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print nothing."""

    @classmethod
    def of(cls, recipe: RecipeName) -> "Args":
        return cls(config=Grid.of(RECIPES[recipe]), recipe=recipe, out=tyro.MISSING)


def main(argv: list[str] | None = None) -> None:
    """Train what is missing from --out, chunk by chunk; raises UserError."""
    default = Args.of(recipe_in(argv))
    prog = "python -m mlp_jax.sweep"
    args = parse_args(Args, argv, default=default, prog=prog, description=DESCRIPTION)
    seeds = parse_seeds(args.seeds)
    wanted = [
        (vary, rate, seed)
        for seed in seeds
        for vary in dict.fromkeys(args.vary)
        for rate in args.config.learning_rate
    ]
    for name in ("devices", "lanes", "chunk"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    store.check_writable(args.out)

    # they take a second, and bad flags are answered without them
    from tqdm import tqdm

    from mlp_jax.data import load_dataset
    from mlp_jax.fit import EpochMetrics, check_fits, fit, make_runs, run_bytes
    from mlp_jax.parallel import place, replicate, use_cores

    use_cores()
    dataset = load_dataset(args.config.dataset, args.data_dir, args.manual_dir, quiet=args.quiet)
    grid = check_fits(args.config, dataset)
    config = grid.at(grid.learning_rate[0])
    placement = place(len(wanted), run_bytes(config), devices=args.devices, lanes=args.lanes)
    size = chunk_size(args.chunk, config.epochs, placement.width)
    environment = store.describe_environment(placement.devices)
    store.open_sweep(
        args.out,
        {
            "recipe": args.recipe,
            "config": dataclasses.asdict(grid),
            "fingerprint": dataset.fingerprint,
            "environment": environment,
        },
    )
    done = store.finished(args.out)
    missing = [run for run in wanted if run not in done]
    dataset = dataset._replace(
        train=replicate(dataset.train, placement), test=replicate(dataset.test, placement)
    )
    bar = tqdm(
        total=len(missing) * config.epochs,
        bar_format="{percentage:3.0f}%|{bar:30}| {desc} [{elapsed}<{remaining}]",
        disable=args.quiet,
    )
    begun = time.perf_counter()

    def on_epoch(epoch: int, metrics: EpochMetrics, seconds: float) -> None:
        bar.update(len(metrics.test_correct))
        rate = bar.n / config.epochs / (time.perf_counter() - begun) * 3600
        bar.set_description_str(
            f"{len(wanted) - len(missing) + bar.n // config.epochs} of {len(wanted)} runs,"
            f" {rate:.0f} runs an hour"
        )

    with bar:
        for start in range(0, len(missing), size):
            chunk = missing[start : start + size]
            result = fit(
                config,
                dataset,
                make_runs(
                    [stream_seeds(seed, vary) for vary, _, seed in chunk],
                    [rate for _, rate, _ in chunk],
                ),
                placement=placement,
                size=size,
                on_epoch=on_epoch,
            )
            rows = make_rows(args.recipe, chunk, result)
            store.write_chunk(args.out, rows, environment)
            if not args.quiet:
                tqdm.write(progress(rows, store.read_runs(args.out, ["test_correct"])))


def make_rows(recipe: str, chunk: list[tuple[str, float, int]], result) -> list[dict]:
    """A row a run, as store.py's schema has them."""
    history = result.history
    return [
        {
            "recipe": recipe,
            "vary": vary,
            "seed": seed,
            "learning_rate": rate,
            "test_correct": history.test_correct[i, -1],
            "test_loss": history.test_loss[i, -1],
            "train_loss": history.train_loss[i, -1],
            "test_correct_by_epoch": history.test_correct[i],
            "test_loss_by_epoch": history.test_loss[i],
            "train_loss_by_epoch": history.train_loss[i],
            "predictions": result.predictions[i].tobytes(),
            "seconds": result.train_seconds / len(chunk),
        }
        for i, (vary, rate, seed) in enumerate(chunk)
    ]


def progress(rows: list[dict], stored) -> str:
    """A line on the newest chunk and on all rows so far, in images right."""
    newest = [int(row["test_correct"]) for row in rows]
    correct = stored["test_correct"].to_pylist()
    spread = f", SD {statistics.stdev(correct):.1f}" if len(correct) > 1 else ""
    return (
        f"{rows[0]['vary']} seed {rows[0]['seed']} ... {rows[-1]['vary']} seed {rows[-1]['seed']}:"
        f" mean {statistics.mean(newest):.1f} right; all {len(correct)} runs:"
        f" mean {statistics.mean(correct):.1f}{spread}"
    )


def parse_seeds(text: str) -> Sequence[int]:
    """The seeds of `first:end` or of a comma-separated list; UserError for anything else."""
    if span := re.fullmatch(r"(\d+):(\d+)", text):
        seeds = range(int(span[1]), int(span[2]))
        largest = seeds.stop - 1  # max() would count up to it
    elif re.fullmatch(r"\d+(,\d+)*", text):
        seeds = list(dict.fromkeys(int(seed) for seed in text.split(",")))
        largest = max(seeds)
    else:
        raise UserError(f"--seeds takes first:end or a list such as 3,5,8, not {text!r}")
    if not seeds:
        raise UserError(f"--seeds {text} names no seed")
    stream_seeds(largest)
    return seeds


def chunk_size(wanted: int | None, epochs: int, width: int) -> int:
    """Runs a chunk: a multiple of `width`, and by default enough for about 50 epochs a lane.

    A stopped sweep loses what it has of a chunk, and a chunk costs a file.
    """
    return math.ceil((wanted or width * math.ceil(50 / epochs)) / width) * width


if __name__ == "__main__":
    run_front(main)
