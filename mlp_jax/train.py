"""`python -m mlp_jax.train`: one run, seen epoch by epoch, and what it leaves behind."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Annotated

import tyro

from mlp_jax.cli import StopSignals, check_at_least, command, parse_args, recipe_in, run_front
from mlp_jax.records import provenance
from mlp_jax.records import rows as store
from mlp_jax.training.config import (
    RECIPES,
    REFERENCES,
    Config,
    Diverged,
    RecipeName,
    UserError,
    stream_seeds,
)

PROG = "python -m mlp_jax.train"
DESCRIPTION = "Train an MLP on MNIST, or on another TFDS data set of 28x28x1 images."
FILES = ("config.json", "metrics.jsonl", "summary.json")
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Args:
    config: Annotated[Config, tyro.conf.arg(name="")]
    recipe: RecipeName
    """Named settings; each can be changed by the flags below."""
    seed: int = 0
    """Decides the initial weights, the order of the examples and the dropout."""
    data_dir: Path | None = None
    """Where TFDS keeps its data; else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    manual_dir: Path | None = None
    """Where the four IDX files lie, if they are not to be downloaded."""
    out: Path | None = None
    """Directory for the results; else a new one under runs/."""
    overwrite: bool = False
    """Replace the results in --out."""
    resume: bool = False
    """Go on with the run in --out, if there is one: it ends as if it had never stopped."""
    checkpoint_every: int = 10
    """Epochs from checkpoint to checkpoint; 0: only when the run ends or is stopped."""
    quiet: bool = False
    """Print nothing but the last line."""


def main(argv: list[str] | None = None) -> None:
    """Train one run and leave FILES; raises UserError, or Diverged at a loss that is not finite."""
    recipe = recipe_in(argv)
    args = parse_args(Args(RECIPES[recipe], recipe), argv, prog=PROG, description=DESCRIPTION)
    runs_seeds = [stream_seeds(args.seed)]
    out = args.out or unused(Path("runs") / f"{args.recipe}-seed{args.seed}")
    if args.resume and (args.overwrite or not args.out):
        raise UserError("--resume needs --out, and no --overwrite")
    check_at_least(args, {"checkpoint_every": 0})
    if store.check_out(out) and not (args.resume or args.overwrite):
        raise UserError(f"{out} holds results: add --resume or --overwrite, or name another --out")
    if (out / "runs").exists():
        raise UserError(f"{out} holds a sweep: name another --out")

    # they take a second, and bad flags are answered without them
    import jax

    from mlp_jax.data.dataset import load_dataset
    from mlp_jax.records.checkpoint import Checkpoints
    from mlp_jax.training.fit import EpochMetrics, abstract_state, check_fits, fit, make_runs
    from mlp_jax.training.model import count_parameters, describe
    from mlp_jax.training.parallel import Placement

    say = (lambda *line: None) if args.quiet else functools.partial(print, flush=True)
    dataset = load_dataset(args.config.dataset, args.data_dir, args.manual_dir, quiet=args.quiet)
    config = check_fits(args.config, dataset)
    placement = Placement(tuple(jax.local_devices()[:1]), lanes=1)
    n_test = len(dataset.test.labels)
    about = provenance.describe(args.recipe, config, dataset.fingerprint, placement.devices)
    about |= {"seed": args.seed}
    params = abstract_state(config).params
    say(describe(config, params))
    say(
        f"\n{config.dataset}: {len(dataset.train.labels):,} training and {n_test:,} test images;"
        f" training on {placement.devices[0].device_kind}, results in {out}\n"
    )
    say(" ".join(f"{name:>13}" for name in COLUMNS))
    rows = []

    def on_epoch(epoch: int, metrics: EpochMetrics, seconds: float) -> None:
        row = {"epoch": epoch} | {name: m[0].item() for name, m in metrics._asdict().items()}
        row |= {"test_accuracy": row["test_correct"] / n_test, "seconds": seconds}
        rows.append(row)
        with store.replacing(out / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        say(table_line(row, rows, config.epochs))
        if not (math.isfinite(row["train_loss"]) and math.isfinite(row["test_loss"])):
            raise Diverged(
                f"the loss is not finite after epoch {epoch} (training {row['train_loss']},"
                f" test {row['test_loss']}); the epochs so far stay in {out}"
            )

    checkpoints = Checkpoints(out / CHECKPOINTS, provenance.binding(about), args.checkpoint_every)
    with store.sole_use(out), contextlib.closing(checkpoints), StopSignals() as stop:
        if args.overwrite:
            shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
            for name in reversed(FILES):  # config.json last: without it the rest is nobody's
                (out / name).unlink(missing_ok=True)
        store.open_directory(out, about)
        result = fit(
            config,
            dataset,
            make_runs(runs_seeds, [config.learning_rate]),
            placement=placement,
            on_epoch=on_epoch,
            checkpoints=checkpoints,
            stop=lambda: stop.requested,
        )
        if result.epochs:
            checkpoints.save(result.epochs, result.progress)
        if result.epochs < config.epochs:
            checkpoints.close()
            more = () if args.out else ("--out", str(out))
            again = command(PROG, argv, *more, *(() if args.resume else ("--resume",)))
            stop.leave(f"{result.epochs} of {config.epochs} epochs are saved; go on with: {again}")
        last = rows[-1]
        store.write_json(
            out / "summary.json",
            {
                "recipe": args.recipe,
                "seed": args.seed,
                "epochs": config.epochs,
                "n_test": n_test,
                "test_correct": last["test_correct"],
                "test_accuracy": last["test_accuracy"],
                "train_seconds": float(result.seconds.sum()),
                "compile_seconds": result.compile_seconds,
                "parameters": count_parameters(params),
            },
        )
    say()
    print(verdict(args.recipe, config, last["test_correct"], n_test))


def unused(directory: Path) -> Path:
    """`directory`, or the first of directory-2, directory-3, ... that does not exist."""
    candidates = itertools.chain(
        [directory], (directory.with_name(f"{directory.name}-{i}") for i in itertools.count(2))
    )
    return next(candidate for candidate in candidates if not candidate.exists())


COLUMNS = ("epoch", "train loss", "test loss", "test accuracy", "seconds", "left")


def table_line(row: dict, rows: list[dict], epochs: int) -> str:
    """A line under COLUMNS; the time left is that of median epochs."""
    left = (epochs - row["epoch"]) * statistics.median(row["seconds"] for row in rows)
    cells = (
        f"{row['epoch']} / {epochs}",
        f"{row['train_loss']:.4f}",
        f"{row['test_loss']:.4f}",
        f"{row['test_accuracy']:.2%}",
        f"{row['seconds']:.2f}",
        f"{int(left) // 60}:{int(left) % 60:02d}",
    )
    return " ".join(f"{cell:>13}" for cell in cells)


def verdict(recipe: str, config: Config, correct: int, n_test: int) -> str:
    """The result as a count, and beside the recipe's reference where the settings are its own."""
    line = f"test accuracy {correct} / {n_test} = {correct / n_test:.2%}"
    if recipe not in REFERENCES:
        return line
    if config != RECIPES[recipe]:
        return f"{line} (settings changed from {recipe}, so not comparable with its reference)"
    reference, source = REFERENCES[recipe]
    points = (correct / n_test - reference / 10_000) * 100
    return f"{line}; {source} reports {reference / 10_000:.2%} ({points:+.2f} points)"


if __name__ == "__main__":
    run_front(main)
