"""Scalars for TensorBoard by epoch: of a run, or the mean and SD of each family of a sweep.

Rewriting, after a resume or for more runs, replaces what was there.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import perf_counter as clock
from typing import Any

import numpy as np

from mlp_jax.errors import UserError
from mlp_jax.records import rows

SECONDS_PER_WRITE = 30
DIRECTORY = "tensorboard"

Curves = dict[str, np.ndarray]  # by metric, [epoch] or [runs, epoch]


def log_run(epochs: Iterable, experiment: Any) -> Iterator:
    """Pass on the epochs of one run, writing each to tensorboard/ in its directory."""
    writer, written = None, 0
    with contextlib.ExitStack() as stack:
        for each in epochs:  # the first, before which --overwrite leaves everything as it is
            writer = writer or stack.enter_context(open_writer(experiment.directory / DIRECTORY))
            history = {name: by_run[0] for name, by_run in each.progress.history.items()}
            write(writer, with_accuracy(history, experiment), written)
            written = each.progress.epoch
            yield each


def log_sweep(epochs: Iterable, experiment: Any) -> Iterator:
    """Pass on the epochs of a sweep, writing the curves of its stored runs to tensorboard/."""
    written = clock()
    for each in epochs:
        if clock() - written > SECONDS_PER_WRITE:
            write_families(experiment)
            written = clock()
        yield each
    write_families(experiment)


def check_installed() -> None:
    """UserError if tensorboardX is not installed."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        line = "--tensorboard needs tensorboardX: pip install 'mlp_jax[tensorboard]'"
        raise UserError(line) from None


def open_writer(directory: Path) -> Any:
    from tensorboardX import SummaryWriter

    # purge_step makes TensorBoard drop this directory's data from step 1 on; the suffix keeps
    # apart the files of shards that begin one in the same second
    return SummaryWriter(str(directory), purge_step=1, filename_suffix=f".{os.getpid()}")


def write_families(experiment: Any) -> None:
    """Mean and SD by epoch of each family, over stored runs that did not diverge."""
    if not rows.row_files(experiment.directory):
        return
    table = rows.read_runs(experiment.directory)
    history = rows.histories(table)
    finite = rows.finite_runs(*(history[name] for name in rows.LOSSES))
    families = [run_id.family for run_id in rows.run_ids(table)]
    for vary, rate in dict.fromkeys(families):
        kept = finite & np.array([family == (vary, rate) for family in families])
        # float32 sums of many runs would be too coarse for their SD
        chosen = {name: v[kept].astype(np.float64) for name, v in history.items()}
        curves = with_accuracy(chosen, experiment)
        with open_writer(experiment.directory / DIRECTORY / f"{vary}-lr{rate:.9g}") as writer:
            if kept.any():
                write(writer, {f"{name}_mean": v.mean(axis=0) for name, v in curves.items()})
            if kept.sum() > 1:
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
