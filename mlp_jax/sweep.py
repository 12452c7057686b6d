"""`python -m mlp_jax.sweep`: many runs of one recipe, in a directory that can be resumed.

Several values of a setting make a grid: one sweep per combination, each in its own directory.
Learning rates alone share a directory, since they share a program.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import tyro

from mlp_jax import cli, console, files
from mlp_jax.errors import UserError
from mlp_jax.records import directory as directories
from mlp_jax.records.provenance import Metadata, check_settings
from mlp_jax.training.config import FROM_DATA, RECIPES, Config
from mlp_jax.training.run import Run, sweep_runs

if TYPE_CHECKING:  # --help does without
    from mlp_jax.training.arrays import Dataset

PROG = "python -m mlp_jax.sweep"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(cli.TrainingArgs):
    """Train many seeds of a recipe; run again to continue where it stopped. Any setting takes
    several values, as in --dropout 0 0.2 --hidden 512x512 1024: each combination is a sweep in
    its own directory under --out (learning rates share one).
    """

    out: Path
    """Directory of the sweep: new, or one to resume or extend."""
    seeds: str = "0:100"
    """A range, as in 0:100 for 0 ... 99, or a list, as in 3,5,8."""
    vary: tuple[Literal["all", "init", "order", "dropout", "augment", "data"], ...] = ("all",)
    """Random streams to seed with the run's seed; all others stay at seed 0.
    Several values train several families of runs, interleaved."""
    crossed: int = 0
    """Number of blocks to train instead of --seeds; report then shows which random stream matters.
    A block is all combinations of two fresh seeds per stream: 8 runs for three streams."""
    devices: Literal["auto"] | int = "auto"
    """Number of local devices (on CPU: cores) to train on; auto: all."""
    lanes: Literal["auto"] | int = "auto"
    """Runs that a device trains in one vmap; auto: on GPU and TPU as many as pay off, on CPU 1.
    With more than 1, rows on CPU no longer equal single runs bit for bit."""
    chunk: Literal["auto"] | int = "auto"
    """Runs that share a file; auto: enough for some minutes of training."""
    keep_weights: bool = False
    """Also store the weights of each finished run."""
    shard: cli.OptionalText = None
    """I/N: train part I of N equal parts of the runs, counted from 0.
    Default: this process's part in a SLURM array, srun or Open MPI job, else all runs."""
    ray: cli.OptionalText = None
    """Address of a Ray cluster whose nodes train, each task on --devices.
    Without an address: the cluster that this machine belongs to."""


class Cell(NamedTuple):
    """The contents of a directory: runs of one Config, at one or several learning rates."""

    directory: Path
    config: Config
    runs: list[Run]


def main(argv: list[str] | None = None) -> None:
    """Train what is missing from --out; raises UserError."""
    args, configs = parse_grid(argv)
    index, count = cli.parse_shard(args.shard or ("0/1" if args.ray else None))
    cells = make_cells(args, configs)
    if count > 1 and not args.quiet:
        print(f"shard {index} of {count}", flush=True)
    if not any(cell.runs[index::count] for cell in cells):
        print(f"shard {index} of {count} has no runs: there are fewer runs than shards", flush=True)
    options = args.options("devices", "lanes", "chunk", "keep_weights")
    options |= {"shard": (index, count)}

    from mlp_jax.training.parallel import use_cores

    use_cores()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(cli.StopSignals())  # until Ray has left, which takes a second
        if args.ray:
            from mlp_jax.cluster import connect

            options["cluster"] = stack.enter_context(connect(args.ray, args.devices))
            stop.listen()  # Ray has a handler of its own
        if len(cells) > 1:
            stack.enter_context(files.locked(args.out, index, count))
        again = cli.command_line(PROG, argv)
        for i, cell in enumerate(cells):
            if i and stop.requested:  # in the last epoch of the sweep before
                stop.exit(f"{i} of {len(cells)} sweeps finished; resume with: {again}")
            # interleaved, so that all families grow together; there may be more shards than runs
            if not (runs := cell.runs[index::count]):
                continue
            if args.out != cell.directory and not args.quiet:
                print(cell.directory, flush=True)
            cell, data = cell._replace(runs=runs), args.data_options()
            if missing := train_cell(cell, data, options, stop, args.tensorboard):
                counts = f"{len(runs) - missing} of {len(runs)} runs finished"
                saved = "" if args.ray else ", the epochs of the others saved"
                stop.exit(f"{counts}{saved}; resume with: {again}")


def sweep(
    config: Config,
    dataset: "Dataset",
    directory: str | Path,
    *,
    seeds: Iterable[int] | None = None,
    vary: str | Iterable[str] = ("all",),
    learning_rates: Iterable[float] = (),
    crossed: int = 0,
    recipe: str | None = None,
    devices: Literal["auto"] | int = "auto",
    lanes: Literal["auto"] | int = "auto",
    chunk: Literal["auto"] | int = "auto",
    checkpoint_every: int = 10,
    keep_weights: bool = False,
    allow_mixed: bool = False,
    shard: tuple[int, int] = (0, 1),
):
    """Train the seeds that `directory` lacks, and return all its rows.

    Trains each seed (default: 0 to 99) for every family in `vary` ("all", or the one stream that
    the seed decides) and every learning rate (default: the Config's). `crossed` blocks replace the
    seeds (see `run.make_run`). The rest is as in `open_experiment`; `recipe` defaults to the one
    with these settings. The rows are those of `read_runs`. After an interruption, the same call
    resumes.
    """
    from mlp_jax.experiment import open_experiment, recipe_name
    from mlp_jax.records.rows import read_runs
    from mlp_jax.training.arrays import check_unchanged

    _use_cores()
    check_unchanged(dataset)
    if not 0 <= shard[0] < shard[1]:
        raise UserError(f"shard {shard}: shards are numbered from 0 to N - 1")
    runs = sweep_runs(config, seeds, vary, learning_rates, crossed)[shard[0] :: shard[1]]
    if not runs:
        raise UserError("a sweep needs at least one run")
    recipe = recipe or recipe_name(config, dataset)
    options: dict = {"devices": devices, "lanes": lanes, "chunk": chunk, "shard": shard}
    options |= {"checkpoint_every": checkpoint_every, "keep_weights": keep_weights}
    options |= {"recipe": recipe, "allow_mixed": allow_mixed}
    directory = files.expand(directory)
    with open_experiment(directory, config, dataset, runs, **options) as experiment:
        for _ in experiment.train(runs):
            pass
    return read_runs(directory)


def _use_cores() -> None:
    """Let a sweep use all cores; warns if JAX has already started with fewer devices."""
    import jax

    from mlp_jax.training.parallel import n_cores, use_cores

    if not use_cores() and jax.default_backend() == "cpu" and len(jax.devices()) < n_cores():
        files.log.warning(
            "JAX already runs on %d of %d cores, and so will this sweep: to use all, call"
            " mlp_jax.sweep in a new process before other JAX code",
            len(jax.devices()),
            n_cores(),
        )


def train_cell(
    cell: Cell, data: dict, options: dict, stop: cli.StopSignals, tensorboard: bool = False
) -> int:
    """Train what is missing of `cell`; returns how many runs are still missing after a stop.

    `data` goes to `load_data` and `options` to `open_experiment`.
    """
    # slow to import, so after bad flags are answered
    from mlp_jax.experiment import load_data, open_experiment
    from mlp_jax.tensorboard import log_sweep

    dataset = load_data(cell.config, **data)
    opened = open_experiment(cell.directory, cell.config, dataset, cell.runs, **options)
    del dataset  # the devices have their own
    with opened as experiment:
        n_missing = len(experiment.missing(cell.runs))
        bar = console.Bar(experiment, len(cell.runs), n_missing, data["quiet"])
        epochs = experiment.train(cell.runs, lambda: stop.requested)
        for epoch in log_sweep(epochs, experiment) if tensorboard else epochs:
            bar.update(epoch)
        bar.close()
        return len(experiment.missing(cell.runs))


def parse_grid(argv: list[str] | None) -> tuple[Args, list[Config]]:
    """The flags, and the settings of each combination that they name; UserError."""
    recipe = cli.parse_recipe(argv)
    default = Args(config=RECIPES[recipe], recipe=recipe, out=tyro.MISSING)
    grid = [cli.parse_args(Args, words, PROG, default) for words in cli.expand_grid(argv)]
    args = grid[0]
    cli.check_training(args)
    cli.check_at_least(args, {"devices": 1, "lanes": 1, "chunk": 1, "crossed": 0})
    return args, [each.config for each in grid]


def make_cells(args: Args, configs: Sequence[Config]) -> list[Cell]:
    """The sweeps that the flags name; UserError if they name no run, or one twice."""
    if len(set(configs)) < len(configs):
        raise UserError("two values of a setting are equal")
    rates: dict[Config, list[float]] = {}
    for config in configs:
        key = dataclasses.replace(config, learning_rate=configs[0].learning_rate)
        rates.setdefault(key, []).append(config.learning_rate)
    names = directories.cell_names([vars(config) for config in rates])
    own = not args.crossed or args.seeds != Args.seeds
    which = (parse_seeds(args.seeds) if own else None, args.vary)
    cells = [
        Cell(args.out / name, config, sweep_runs(config, *which, values, args.crossed))
        for name, (config, values) in zip(names, rates.items(), strict=True)
    ]
    for cell in cells:  # all of a grid, before the first is trained
        directories.check_out_dir(cell.directory)
        if stored := directories.stored_metadata(cell.directory):
            known = {name: getattr(stored.config, name) for name in FROM_DATA}
            config = dataclasses.replace(cell.config, **known)
            asked = Metadata(args.recipe, config, stored.fingerprint, {})
            check_settings(cell.directory, stored, asked)
    if len(cells) > 1:
        directories.check_grid_dir(args.out)
    return cells


def parse_seeds(text: str) -> Sequence[int]:
    """The seeds of `first:end` or of a comma-separated list; UserError for anything else."""
    if span := re.fullmatch(r"(\d{1,10}):(\d{1,10})", text):
        seeds = range(int(span[1]), int(span[2]))
    elif re.fullmatch(r"\d{1,10}(,\d{1,10})*", text):
        seeds = list(dict.fromkeys(int(seed) for seed in text.split(",")))
    else:
        raise UserError(f"--seeds takes first:end or a list such as 3,5,8, not {text!r}")
    if not seeds:
        raise UserError(f"--seeds {text} names no seed")
    return seeds


if __name__ == "__main__":
    cli.run_cli(main)
