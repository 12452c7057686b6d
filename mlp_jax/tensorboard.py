"""Scalars for TensorBoard by epoch: of a run, or the mean and SD of each family of a sweep.

Rewriting, after a resume or for more runs, replaces what was there.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import perf_counter as clock
from typing import Any

import numpy as np

from mlp_jax.errors import UserError
from mlp_jax.records import rows

SECONDS_A_WRITE = 30
DIRECTORY = "tensorboard"

Curves = dict[str, np.ndarray]  # by metric, [epoch] or [runs, epoch]
Families = dict[tuple[str, float], dict[int, Curves]]  # by vary and rate, then by seed


def log_run(epochs: Iterable, experiment: Any) -> Iterator:
    """Pass on the epochs of one run, writing each to tensorboard/ in its directory."""
    check_installed()

    def log() -> Iterator:
        with contextlib.closing(open_writer(experiment.directory / DIRECTORY)) as writer:
            written = 0
            for each in epochs:
                history = {name: by_run[0] for name, by_run in each.progress.history.items()}
                write(writer, with_accuracy(history, experiment), written)
                written = each.progress.epoch
                yield each

    return log()


def log_sweep(epochs: Iterable, experiment: Any) -> Iterator:
    """Pass on the epochs of a sweep, writing each family, stored runs included, to tensorboard/."""
    check_installed()
    families = stored_families(experiment.directory)

    def log() -> Iterator:
        written = -math.inf
        try:
            for each in epochs:
                progress = each.progress
                if progress.epoch == experiment.metadata.config.n_epochs:
                    for i, run in enumerate(progress.runs):
                        curves = {name: by_run[i] for name, by_run in progress.history.items()}
                        families.setdefault((run.vary, run.learning_rate), {})[run.seed] = curves
                    if clock() - written > SECONDS_A_WRITE:
                        write_families(families, experiment)
                        written = clock()
                yield each
        finally:
            write_families(families, experiment)

    return log()


def check_installed() -> None:
    """UserError if tensorboardX is not installed."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        line = "--tensorboard needs tensorboardX: pip install 'mlp_jax[tensorboard]'"
        raise UserError(line) from None


def open_writer(directory: Path) -> Any:
    from tensorboardX import SummaryWriter

    # makes TensorBoard drop this directory's data from step 1 on
    return SummaryWriter(str(directory), purge_step=1)


def stored_families(directory: Path) -> Families:
    """The curves of all rows in `directory`."""
    families: Families = {}
    if rows.row_files(directory):
        for row in rows.read_runs(directory).to_pylist():
            end = "_by_epoch"
            curves = {k.removesuffix(end): np.array(v) for k, v in row.items() if k.endswith(end)}
            families.setdefault((row["vary"], row["learning_rate"]), {})[row["seed"]] = curves
    return families


def write_families(families: Families, experiment: Any) -> None:
    """Mean and SD by epoch of each family, over runs that did not diverge."""
    for (vary, rate), runs in families.items():
        stacked = {
            name: np.stack([run[name] for run in runs.values()])
            for name in next(iter(runs.values()))
        }
        finite = np.all([np.isfinite(values).all(axis=1) for values in stacked.values()], axis=0)
        curves = with_accuracy({name: v[finite] for name, v in stacked.items()}, experiment)
        place = experiment.directory / DIRECTORY / f"{vary}-lr{rate:g}"
        with contextlib.closing(open_writer(place)) as writer:
            if finite.any():
                write(writer, {f"{name}_mean": v.mean(axis=0) for name, v in curves.items()})
            if finite.sum() > 1:
                write(writer, {f"{name}_SD": v.std(axis=0, ddof=1) for name, v in curves.items()})


def with_accuracy(curves: Curves, experiment: Any) -> Curves:
    """`curves` with accuracy as a fraction instead of a count."""
    others = {name: values for name, values in curves.items() if name != "test_correct"}
    n_test = len(experiment.dataset.test.labels)
    return others | {"test_accuracy": curves["test_correct"] / n_test}


def write(writer: Any, curves: Curves, written: int = 0) -> None:
    """The epochs after `written`, under names such as test/accuracy."""
    for name, values in curves.items():
        for epoch, value in enumerate(values[written:].tolist(), written + 1):
            writer.add_scalar(name.replace("_", "/", 1), value, epoch)
