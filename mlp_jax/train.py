"""`python -m mlp_jax.train`: one run, epoch by epoch, and the files it leaves."""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlp_jax import cli, console, files
from mlp_jax.errors import UserError
from mlp_jax.records import directory as directories
from mlp_jax.records import rows
from mlp_jax.records.directory import CURVE
from mlp_jax.training.arrays import for_dataset
from mlp_jax.training.config import RECIPES
from mlp_jax.training.run import make_run

PROG = "python -m mlp_jax.train"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(cli.TrainingArgs):
    """Train an MLP on MNIST, or on another TFDS data set of 28x28x1 images."""

    seed: int = 0
    """Random seed: initial weights, order of the examples, dropout and any other draws."""
    out: cli.OptionalPath = None
    """Directory for the results; default: a new one under runs/."""
    overwrite: bool = False
    """Replace the results in --out."""
    resume: bool = False
    """Continue the run in --out if there is one; the result is that of an uninterrupted run."""


def main(argv: list[str] | None = None) -> None:
    """Train one run; raises UserError, with status 1 if a loss is not finite."""
    recipe = cli.parse_recipe(argv)
    default = Args(config=RECIPES[recipe], recipe=recipe)
    args = cli.parse_args(Args, argv, PROG, default)
    check_args(args)
    run = make_run(args.seed, args.config.learning_rate)

    # slow to import, so after bad flags are answered
    from mlp_jax.experiment import load_data, open_experiment
    from mlp_jax.tensorboard import log_run

    dataset = load_data(args.config, **args.data_options())
    config = for_dataset(args.config, dataset)
    out = args.out or directories.new_directory(Path("runs") / f"{args.recipe}-seed{args.seed}")
    options = args.options("overwrite") | {"seed": args.seed, "devices": 1, "lanes": 1}
    opened = open_experiment(out, config, dataset, [run], keep_weights=True, **options)
    del dataset  # the devices have their own
    with cli.StopSignals() as stop, opened as experiment:
        lines = []
        say = (lambda *_: None) if args.quiet else functools.partial(print, flush=True)
        say(console.header(experiment))
        epochs = experiment.train([run], lambda: stop.requested)
        if args.tensorboard and experiment.missing([run]):  # else its curves are to stay
            epochs = log_run(epochs, experiment)
        for epoch in epochs:
            history = {name: by_run[0] for name, by_run in epoch.progress.history.items()}
            lines = metrics_by_epoch(history, epoch.seconds, epoch.progress.predictions.shape[1])
            files.write_text(out / "metrics.jsonl", "".join(map(json_line, lines)))
            say(console.table_line(lines, config.epochs))
            check_finite(lines[-1], out)
        if run not in experiment.finished:
            more = () if args.out else ("--out", str(out))
            again = cli.command_line(PROG, argv, *more, *(() if args.resume else ("--resume",)))
            stop.exit(f"{len(lines)} of {config.n_epochs} epochs saved; resume with: {again}")
        summary = write_results(out, experiment, run, bool(lines))
    say()
    print(console.verdict(args.recipe, config, summary))
    if (out / CURVE).exists():
        say(out / CURVE)


def check_args(args: Args) -> None:
    """UserError for flags that conflict with each other or with the contents of --out."""
    cli.check_training(args)
    if args.resume and (args.overwrite or not args.out):
        raise UserError("--resume needs --out, and cannot be combined with --overwrite")
    if args.out and directories.check_out_dir(args.out):
        stored = directories.stored_metadata(args.out)
        if stored and stored.seed is None:
            raise UserError(f"{args.out} has a sweep: name another --out")
        if not (args.resume or args.overwrite):
            raise UserError(f"{args.out} has results: add --resume or --overwrite, or name another")


def metrics_by_epoch(
    history: dict[str, np.ndarray], seconds: Sequence[float], n_test: int
) -> list[dict]:
    """The objects of metrics.jsonl, one per epoch so far, of metrics [epochs]."""
    lines = []
    for i, passed in enumerate(seconds):
        metrics = {name: values[i].item() for name, values in history.items()}
        timed = {"test_accuracy": metrics["test_correct"] / n_test, "seconds": passed}
        lines.append({"epoch": i + 1} | metrics | timed)
    return lines


def complete_metrics(path: Path, n_epochs: int, n_test: int) -> None:
    """Add the epochs of a finished run that metrics.jsonl lacks, as after a full disk.

    How long each took is not known: their seconds are the mean of the run's epochs.
    """
    try:
        known = [json.loads(line)["seconds"] for line in path.read_text("utf-8").splitlines()]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        known = []
    if (n_missing := n_epochs - len(known)) > 0:
        table = rows.read_runs(path.parent)
        history = {name: by_run[0] for name, by_run in rows.histories(table).items()}
        mean = table["seconds"][0].as_py() / n_epochs
        lines = metrics_by_epoch(history, known + [mean] * n_missing, n_test)
        files.write_text(path, "".join(map(json_line, lines)))


def json_line(metrics: dict) -> str:
    """A line of metrics.jsonl; a loss that is not finite is null, as JSON has no number for it."""
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return json.dumps(finite) + "\n"


def check_finite(line: dict, out: Path) -> None:
    """UserError, for exit status 1, if a loss is infinite or NaN."""
    if not (math.isfinite(line["train_loss"]) and math.isfinite(line["test_loss"])):
        raise UserError(
            f"the loss is not finite after epoch {line['epoch']} (training {line['train_loss']},"
            f" test {line['test_loss']}); the epochs so far are in {out}: try a lower"
            " --learning-rate",
            status=1,
        )


def write_results(out: Path, experiment, run, trained: bool) -> dict:
    """Write summary.json, which is returned, and the curve, if just `trained` or missing.

    Also what metrics.jsonl lacks.
    """
    metadata = experiment.metadata
    n_epochs = metadata.config.n_epochs
    check_finite({"epoch": n_epochs} | experiment.finished[run], out)
    summary = summarize(experiment, run)
    complete_metrics(out / "metrics.jsonl", n_epochs, summary["n_test"])
    if trained or not (out / "summary.json").exists():
        files.write_json(out / "summary.json", summary)
    # one epoch is no curve, and matplotlib takes a second to import
    missing = trained or not (out / CURVE).exists()
    if missing and n_epochs > 1:
        from mlp_jax.analysis.figures import draw_run

        lines = map(json.loads, (out / "metrics.jsonl").read_text("utf-8").splitlines())
        name = f"{metadata.title()} on {metadata.device_kind}, seed {metadata.seed}"
        files.save_figure(out / CURVE, draw_run(list(lines), name))
    return summary


def summarize(experiment, run) -> dict:
    """summary.json of a finished run."""
    from mlp_jax.training.model import count_parameters
    from mlp_jax.training.programs import state_shapes

    metadata, metrics = experiment.metadata, experiment.finished[run]
    n_test = len(experiment.dataset.test.labels)
    return {
        "recipe": metadata.recipe,
        "seed": metadata.seed,
        "epochs": metadata.config.epochs,
        "n_test": n_test,
        "test_correct": metrics["test_correct"],
        "test_accuracy": metrics["test_correct"] / n_test,
        "train_seconds": metrics["seconds"],
        "compile_seconds": experiment.compile_seconds,
        "parameters": count_parameters(state_shapes(metadata.config).params),
    }


if __name__ == "__main__":
    cli.run_cli(main)
