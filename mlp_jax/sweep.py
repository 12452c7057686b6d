"""`python -m mlp_jax.sweep`: many runs of one recipe into a directory that can be gone on with.

A row is the single run of that seed: how many train together, in which order, or how often the
sweep was stopped changes no number of it (bit for bit on CPU).
"""

import contextlib
import dataclasses
import hashlib
import itertools
import math
import re
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mlp_jax.cli import StopSignals, check_at_least, command, parse_args, recipe_in, run_front
from mlp_jax.records import provenance
from mlp_jax.records import rows as store
from mlp_jax.training.config import RECIPES, Auto, Config, RecipeName, UserError, stream_seeds

PROG = "python -m mlp_jax.sweep"
MAX_RUNS = 10_000_000  # their list takes a gigabyte
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
    devices: Auto | int = "auto"
    """How many local devices (on CPU: cores) train; auto: all."""
    lanes: Auto | int = "auto"
    """Runs that a device trains in one vmap; auto: on GPU and TPU what fits, on CPU 1, where more
    are no longer the single runs bit for bit."""
    chunk: Auto | int = "auto"
    """Runs that are trained, and stored, together; auto: what takes minutes."""
    checkpoint_every: int = 10
    """Epochs from checkpoint to checkpoint of a chunk; 0: only when it is stopped."""
    distributed: bool = False
    """Share the runs with the other processes of this job: a TPU pod, SLURM, Open MPI, ..."""
    coordinator: str | None = None
    """Where there is none of these: host:port at which the processes meet, the first one's host."""
    num_processes: int | None = None
    """How many processes meet at --coordinator."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    quiet: bool = False
    """Print nothing."""


def main(argv: list[str] | None = None) -> None:
    """Train what is missing from --out, chunk by chunk; raises UserError."""
    recipe = recipe_in(argv)
    default = Args(Grid.of(RECIPES[recipe]), recipe, out=tyro.MISSING)
    args = parse_args(default, argv, prog=PROG, description=DESCRIPTION)
    seeds = parse_seeds(args.seeds)
    families = list(itertools.product(dict.fromkeys(args.vary), args.config.learning_rate))
    if (n_runs := len(seeds) * len(families)) > MAX_RUNS:
        raise UserError(f"a sweep has at most {MAX_RUNS:,} runs, not {n_runs:,}")
    wanted = [(*family, seed) for seed in seeds for family in families]
    check_at_least(args, {"devices": 1, "lanes": 1, "chunk": 1, "checkpoint_every": 0})
    store.check_out(args.out)

    # they take a second, and bad flags are answered without them
    from mlp_jax.data.dataset import load_dataset
    from mlp_jax.records.checkpoint import Checkpoints
    from mlp_jax.training.fit import check_fits, fit, make_runs, run_bytes
    from mlp_jax.training.parallel import join_processes, place, replicate, use_cores

    use_cores()
    address = (args.coordinator, args.num_processes, args.process_id)
    alone = not args.distributed and address == (None, None, None)
    process, processes = (0, 1) if alone else join_processes(*address)
    # by turns, so that what several have done so far is balanced too
    wanted = wanted[process::processes]
    if not wanted:  # more processes than runs
        return
    dataset = load_dataset(args.config.dataset, args.data_dir, args.manual_dir, quiet=args.quiet)
    grid = check_fits(args.config, dataset)
    config = grid.at(grid.learning_rate[0])
    placement = place(len(wanted), run_bytes(config), devices=args.devices, lanes=args.lanes)
    size = chunk_size(args.chunk, config.epochs, placement.width)
    about = provenance.describe(args.recipe, grid, dataset.fingerprint, placement.devices)
    train, test = (replicate(split, placement) for split in (dataset.train, dataset.test))
    dataset = dataset._replace(train=train, test=test)

    with contextlib.ExitStack() as held:
        held.enter_context(store.sole_use(args.out, process, processes))
        store.open_directory(args.out, about)
        store.make_directory(args.out / "runs")
        done = store.finished(args.out, about)
        missing = [run for run in wanted if run not in done]
        bar = Bar(len(wanted), len(missing), config.epochs, args.quiet)
        held.callback(bar.close)
        stop = held.enter_context(StopSignals())
        for start in range(0, len(missing), size):
            chunk = missing[start : start + size]
            # a directory for these very runs: another --chunk begins them anew
            name = hashlib.sha256(repr(chunk).encode()).hexdigest()[:16]
            directory = args.out / "checkpoints" / name
            checkpoints = Checkpoints(directory, provenance.binding(about), args.checkpoint_every)
            with contextlib.closing(checkpoints):
                result = fit(
                    config,
                    dataset,
                    make_runs(
                        [stream_seeds(seed, vary) for vary, _, seed in chunk],
                        [rate for _, rate, _ in chunk],
                    ),
                    placement=placement,
                    on_epoch=bar.on_epoch,
                    checkpoints=checkpoints,
                    stop=lambda: stop.requested,
                )
                if 0 < result.epochs < config.epochs:
                    checkpoints.save(result.epochs, result.progress)
            if result.epochs < config.epochs:
                bar.close()
                whole = len(wanted) - len(missing) + start
                part = f", {len(chunk)} after epoch {result.epochs}" if result.epochs else ""
                said = f"{whole} of {len(wanted)} runs are whole{part}, all saved"
                stop.leave(f"{said}; go on with: {command(PROG, argv)}")
            store.write_chunk(args.out, make_rows(args.recipe, chunk, result), about)
            shutil.rmtree(directory, ignore_errors=True)
            done |= dict(zip(chunk, result.history.test_correct[:, -1].tolist(), strict=True))
            bar.say(progress(chunk, done))
        with contextlib.suppress(OSError):  # another process, or other seeds, may have some there
            (args.out / "checkpoints").rmdir()


class Bar:
    """Runs done, runs an hour while epochs are trained, and the time left."""

    def __init__(self, n_wanted: int, n_missing: int, epochs: int, quiet: bool):
        from tqdm import tqdm

        shape = "{percentage:3.0f}%|{bar:30}| {desc} [{elapsed}<{remaining}]"
        self._bar = tqdm(total=n_missing * epochs, bar_format=shape, disable=quiet)
        self._n_wanted, self._epochs, self._quiet = n_wanted, epochs, quiet
        self._n_before, self._trained, self._seconds = n_wanted - n_missing, 0, 0.0

    def on_epoch(self, epoch: int, metrics, seconds: float) -> None:
        self._trained += len(metrics.test_correct)
        self._seconds += seconds
        whole = self._n_before + self._trained // self._epochs
        rate = self._trained / self._epochs / self._seconds * 3600
        said = f"{whole} of {self._n_wanted} runs, {rate:.0f} runs an hour"
        self._bar.set_description_str(said, refresh=False)
        self._bar.update(len(metrics.test_correct))

    def say(self, line: str) -> None:
        if not self._quiet:
            self._bar.write(line)

    def close(self) -> None:
        self._bar.close()


def make_rows(recipe: str, chunk: list[tuple[str, float, int]], result) -> list[dict]:
    """A row a run, as store.py's schema has them."""
    rows, seconds = [], float(result.seconds.sum()) / len(chunk)
    for i, (vary, rate, seed) in enumerate(chunk):
        row = {"recipe": recipe, "vary": vary, "seed": seed, "learning_rate": rate}
        for name, history in result.history._asdict().items():
            row |= {name: history[i, -1], f"{name}_by_epoch": history[i]}
        rows.append(row | {"predictions": result.predictions[i].tobytes(), "seconds": seconds})
    return rows


def progress(chunk: list[tuple[str, float, int]], done: dict[tuple[str, float, int], int]) -> str:
    """What all whole runs of a chunk's families say so far, in images right."""
    said = []
    for family in dict.fromkeys(run[:2] for run in chunk):
        correct = [right for run, right in done.items() if run[:2] == family]
        spread = f", SD {statistics.stdev(correct):.1f}" if len(correct) > 1 else ""
        mean = f"mean {statistics.mean(correct):.1f} right"
        said.append("{} at {:g}: {} runs, {}{}".format(*family, len(correct), mean, spread))
    return "; ".join(said)


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
    stream_seeds(largest)
    return seeds


def chunk_size(wanted: Auto | int, epochs: int, width: int) -> int:
    """Runs a chunk: a multiple of `width`; "auto" is enough for about 50 epochs a lane.

    A stopped sweep loses what it has of a chunk, and a chunk costs a file.
    """
    return math.ceil(50 / epochs if wanted == "auto" else wanted / width) * width


if __name__ == "__main__":
    run_front(main)
