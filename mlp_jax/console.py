"""Progress of training: a table of epochs for one run, a progress bar for many."""

import math
import statistics
import sys
from time import perf_counter as clock

from mlp_jax.bars import SECONDS_PER_LINE, progress_bar
from mlp_jax.training.config import RECIPES, REFERENCES, Config
from mlp_jax.training.run import Run

SHOWN = {"epoch", "train_loss", "test_loss", "test_accuracy", "test_correct", "seconds"}
COLUMNS = ("epoch", "train loss", "test loss", "test accuracy", "seconds", "left")


def header(experiment) -> str:
    """The network, the data and the device, above the columns of `table_line`."""
    from mlp_jax.training.model import parameter_table
    from mlp_jax.training.programs import state_shapes

    config, dataset = experiment.metadata.config, experiment.dataset
    table = parameter_table(config, state_shapes(config).params)
    n_train, n_test = (len(split.labels) for split in (dataset.train, dataset.test))
    device = experiment.metadata.environment["device_kind"]
    return (
        f"{table}\n\n{config.dataset}: {n_train:,} training and {n_test:,} {config.split} images;"
        f" training on {device}, results in {experiment.directory}\n\n"
        + "".join(f"{name:>14}" for name in COLUMNS)
    )


def table_line(lines: list[dict], epochs: float) -> str:
    """The last of `lines`, one per epoch, with metrics of a fork's own at its end.

    The time left assumes the median epoch time.
    """
    last = lines[-1]
    done = min(last["epoch"], epochs)  # the last may be a part of one
    left = (epochs - done) * statistics.median(line["seconds"] for line in lines)
    more = "".join(f"  {name} {last[name]:.4g}" for name in last if name not in SHOWN)
    return (
        f"{done:>10g} / {epochs:g}{last['train_loss']:14.4f}{last['test_loss']:14.4f}"
        f"{last['test_accuracy']:14.2%}{last['seconds']:14.2f}"
        f"{int(left) // 60:>11}:{int(left) % 60:02d}{more}"
    )


def verdict(recipe: str, config: Config, summary: dict) -> str:
    """The result as a count, with the recipe's reference if the settings are the recipe's."""
    correct, n_test = summary["test_correct"], summary["n_test"]
    line = f"{config.split} accuracy {correct} / {n_test} = {correct / n_test:.2%}"
    if recipe not in REFERENCES:
        return line
    if config != RECIPES[recipe]:
        return f"{line} (settings changed from {recipe}, so not comparable with its reference)"
    reference, source = REFERENCES[recipe]
    points = (correct / n_test - reference / 10_000) * 100
    return f"{line}; {source} reports {reference / 10_000:.2%} ({points:+.2f} points)"


class Bar:
    """A progress bar (finished runs, runs per hour, time left), and a line on what is stored."""

    def __init__(self, experiment, n_runs: int, n_missing: int, quiet: bool):
        self._experiment, self._n_runs, self._began = experiment, n_runs, clock()
        self._stored, self._epochs = len(experiment.finished), experiment.metadata.config.n_epochs
        self._written, self._last = -math.inf, ((), 0)  # the runs yielded last, and their epoch
        self._finished, self._trained = n_runs - n_missing, 0  # runs, and epochs of runs, here
        shape = "{percentage:3.0f}%|{bar:30}| {desc} [{elapsed}<{remaining}]"
        total, self._idle = n_missing * self._epochs, not (quiet or n_missing)
        self._bar = progress_bar(quiet=quiet or self._idle, total=total, bar_format=shape)

    def update(self, epoch) -> None:
        if clock() - self._written >= SECONDS_PER_LINE:  # it takes a second for a million runs
            self._write_stored()
        runs, done = epoch.progress.runs, epoch.progress.epoch
        new = len(runs) * (done - (self._last[1] if self._last[0] == runs else 0))
        self._last = (runs, done)
        self._trained += epoch.n_new * len(runs)  # less than `new` where a checkpoint was resumed
        seconds = clock() - self._began - self._experiment.compile_seconds
        self._finished += len(runs) if done == self._epochs else 0
        rate = self._trained / self._epochs / seconds * 3600
        text = f"{self._finished} of {self._n_runs} runs, {rate:.0f} runs per hour"
        text += f" on {epoch.nodes} nodes" if epoch.nodes > 1 else ""
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(new)

    def _write_stored(self) -> None:
        if sys.stdout is None or self._bar.disable:  # closed, or not wanted
            return
        if len(self._experiment.finished) > self._stored:
            self._written = clock()
            self._stored, n_test = len(self._experiment.finished), self._experiment.dataset.test
            self._bar.write(accuracy_line(self._experiment.finished, len(n_test.labels)))

    def close(self) -> None:
        self._write_stored()
        self._bar.close()
        if self._idle and sys.stdout:
            n_test = len(self._experiment.dataset.test.labels)
            print("nothing to train;", accuracy_line(self._experiment.finished, n_test))


def accuracy_line(finished: dict[Run, dict], n_test: int) -> str:
    """Mean and SD of accuracy so far, by family, over runs that did not diverge."""
    families: dict[tuple, list[dict]] = {}
    for run, row in finished.items():
        families.setdefault(run.family, []).append(row)
    texts = []
    for (vary, rate), rows in families.items():
        kept = [row for row in rows if row["finite"]]
        scores = [100 * row["test_correct"] / n_test for row in kept]
        text = f"{vary} at {rate:.9g}: {len(rows)} runs"
        text += f", mean {statistics.mean(scores):.3f} %" if scores else ""
        text += f", SD {statistics.stdev(scores):.3f} points" if len(scores) > 1 else ""
        text += f", {len(rows) - len(kept)} diverged" if len(kept) < len(rows) else ""
        texts.append(text)
    return "; ".join(texts)
