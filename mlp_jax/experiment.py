"""Trains the runs that a directory lacks and stores them, chunk by chunk.

A single run is an experiment of one. On CPU a stored run depends on its seed alone, bit for bit:
not on the runs trained with it, their order, or how often the experiment was stopped.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from time import perf_counter as clock
from typing import Any, Literal

import jax

from mlp_jax import files
from mlp_jax.data import dataset as datasets
from mlp_jax.errors import UserError
from mlp_jax.machine import Epoch, Machine, chunks_of, prepare, with_program
from mlp_jax.records import directory as directories
from mlp_jax.records import rows
from mlp_jax.records.checkpoint import (
    check_predictions,
    checkpoint_path,
    find_checkpoints,
    has_weights,
    load_checkpoint,
    load_committee,
    save_checkpoint,
    save_weights,
)
from mlp_jax.records.compaction import finish_merge
from mlp_jax.records.provenance import Metadata, check_same, git_state
from mlp_jax.training.arrays import Dataset, for_dataset, params_digest, with_teacher
from mlp_jax.training.config import RECIPES, Config
from mlp_jax.training.fit import Progress
from mlp_jax.training.run import Run

git_state()  # now, when the code that will train has just been read


@dataclasses.dataclass
class Experiment:
    """An open directory, made by `open_experiment`."""

    directory: Path
    metadata: Metadata
    dataset: Dataset
    trainer: Any  # a Machine or a Cluster
    stored: dict[Run, dict]  # rows.last_values of the runs that have a row
    finished: dict[Run, dict]  # of these, those whose weights are stored too, if wanted
    chunk: int  # runs that share a file
    checkpoint_every: int
    keep_weights: bool
    overwrite: bool  # the results here, once the first epoch shows that training works
    compile_seconds: float = 0.0

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        return [run for run in dict.fromkeys(runs) if run not in self.finished]

    def train(
        self, runs: Sequence[Run], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Epoch]:
        """Train and store the missing ones of `runs`, yielding them after each epoch.

        `stop` is called after each epoch; once true, finished runs are stored, the others saved.
        A cluster yields only finished runs; it has no checkpoints.
        """
        if not (missing := self.missing(runs)):
            return
        if not isinstance(self.trainer, Machine):
            chunks = chunks_of(missing, self.chunk)
            for ended, metadata in self.trainer.train(chunks, self, stop):
                self._store(ended, metadata)
                yield from ended
            return
        start = clock()
        self.trainer = self.trainer.compile()
        self.metadata = self.trainer.metadata
        if not self.overwrite:
            directories.claim(self.directory, self.metadata)  # now that its code is known
        self.compile_seconds = clock() - start
        for groups in self._plan(missing):
            yield from self._train_chunk(groups, stop)
            if stop():
                return

    def _plan(self, missing: Sequence[Run]) -> list[list[Sequence[Run]]]:
        """Chunks of groups that the devices hold: first what a checkpoint has."""
        left, width = dict.fromkeys(missing), self.trainer.placement.width
        chunks: list[list[Sequence[Run]]] = []
        for saved in () if self.overwrite else find_checkpoints(self.directory):
            begun = [run for run in saved.runs if run in left]
            chunks += [[group] for group in chunks_of(begun, width)]
            for run in begun:
                del left[run]
        for chunk in chunks_of(list(left), self.chunk):
            chunks.append([*chunks_of(chunk, width)])
        return chunks

    def _train_chunk(
        self, groups: list[Sequence[Run]], stop: Callable[[], bool]
    ) -> Iterator[Epoch]:
        ended: list[Epoch] = []
        try:
            for group in groups:
                for epoch in self._train_group(group, stop):
                    if epoch.progress.epoch == self.metadata.config.n_epochs:
                        ended.append(self._keep(epoch.finish(self.keep_weights), self.metadata))
                    yield epoch
                if stop():
                    break
        finally:  # keep finished runs even if the caller leaves its loop
            if ended:
                with files.uninterrupted():
                    self._store(ended, self.metadata)

    def _train_group(self, runs: Sequence[Run], stop: Callable[[], bool]) -> Iterator[Epoch]:
        """Train as many runs as the devices hold, from their checkpoint if there is one."""
        path = checkpoint_path(self.directory, runs)
        for epoch in self.trainer.train(runs, self._resume(runs)):
            if self.overwrite:
                directories.clear(self.directory)
                directories.claim(self.directory, self.metadata)
                self.overwrite = False
            yield epoch
            progress = epoch.progress
            due = self.checkpoint_every and progress.epoch % self.checkpoint_every == 0
            stopping = stop()
            if progress.epoch < self.metadata.config.n_epochs and (due or stopping):
                saved = progress.snapshot(), epoch.seconds, self.metadata, self.keep_weights
                save_checkpoint(path, *saved)
            if stopping:
                return

    def _resume(self, runs: Sequence[Run]) -> tuple[Progress, list[float]] | None:
        """What the furthest intact checkpoint has of `runs`."""
        if self.overwrite:
            return None
        paths = [each.path for each in find_checkpoints(self.directory) if {*runs} <= {*each.runs}]
        # unreadable ones are not found: one that has the name of these runs is reported
        for path in dict.fromkeys([*paths, checkpoint_path(self.directory, runs)]):
            if loaded := load_checkpoint(path, runs, self.metadata):
                return loaded
        return None

    def _keep(self, epoch: Epoch, metadata: Metadata) -> Epoch:
        """Save the weights of finished runs, and drop them."""
        for i, run in enumerate(epoch.progress.runs if epoch.params else ()):
            params = jax.tree.map(lambda leaf, i=i: leaf[i], epoch.params)
            history = epoch.progress.history.items()
            metrics = {name: values[i, -1].item() for name, values in history}
            save_weights(self.directory, run, params, metrics, metadata)
        return epoch._replace(params=None)

    def _store(self, ended: Sequence[Epoch], metadata: Metadata) -> None:
        """Write finished runs that a machine with these metadata trained."""
        new: dict[Run, dict] = {}
        for epoch in ended:
            progress, seconds, *_ = self._keep(epoch, metadata)
            share = sum(seconds) / len(progress.runs)
            made = rows.make_rows(metadata.recipe, progress, share)
            new |= zip(progress.runs, made, strict=True)
        # another shard, with other code, may have begun at the same time
        if stored := directories.stored_metadata(self.directory):
            check_same(self.directory, stored, metadata)
        # a run retrained for its weights already has its row
        for run in new.keys() & self.stored.keys():
            was, now = self.stored[run]["test_correct"], rows.last_values(new[run])["test_correct"]
            if was != now:
                line = "seed %d: its row has %d correct, and the weights stored now have %d"
                files.log.warning(line, run.seed, was, now)
        if wanted := [row for run, row in new.items() if run not in self.stored]:
            rows.write_rows(self.directory, wanted, metadata)
        self.finished |= {run: rows.last_values(row) for run, row in new.items()}
        for saved in find_checkpoints(self.directory):
            done = self.finished.keys() >= set(saved.runs)
            if done and (self.keep_weights or not saved.keep_weights):
                saved.path.unlink(missing_ok=True)


def load_data(config: Config, *, teacher: Path | None = None, **options: Any) -> Dataset:
    """The data set and split of `config`, with the committee in `teacher` as its teacher.

    By default that shipped with mlp_jax, if it is the teacher of `config` (`best-distilled`), else
    none. The other options are those of `load_dataset`.
    """
    dataset = datasets.load_dataset(config.dataset, split=config.split, **options)
    if not (teacher or config.teacher):
        return dataset
    committee = load_committee(teacher)
    if not teacher and params_digest(committee.params) != config.teacher:
        return dataset
    taught = with_teacher(dataset, committee.config, committee.params)
    if committee.fingerprint != dataset.fingerprint:
        raise UserError(f"the teacher was trained on different data from the {dataset.name} here")
    # as training will build its networks: with the student's settings
    own = {"hidden": committee.config.hidden, "n_classes": committee.config.n_classes}
    check_predictions(committee._replace(config=dataclasses.replace(config, **own)), dataset)
    return taught


@contextlib.contextmanager
def open_experiment(
    directory: Path,
    config: Config,
    dataset: Dataset,
    runs: Sequence[Run],
    *,
    recipe: str,
    seed: int | None = None,
    devices: Literal["auto"] | int = "auto",
    lanes: Literal["auto"] | int = "auto",
    chunk: Literal["auto"] | int = "auto",
    checkpoint_every: int = 10,
    keep_weights: bool = False,
    allow_mixed: bool = False,
    overwrite: bool = False,
    shard: tuple[int, int] = (0, 1),
    cluster: Any = None,
) -> Iterator[Experiment]:
    """Lock `directory`, new or with compatible runs, to train `runs` in it.

    `seed` marks a single run, whose results `overwrite` replaces. `shard` is (I, N): this process
    trains part I of N. A `cluster.Cluster` trains instead of this machine. UserError if the
    directory is not ours, is in use, or holds incompatible numbers.
    """
    config = for_dataset(config, dataset)
    data = {"fingerprint": dataset.fingerprint, "images": dataset.image_fingerprint}
    metadata = Metadata(recipe, config, environment={}, seed=seed, mixed=allow_mixed, **data)
    if cluster:
        metadata, width = cluster.prepare(metadata, dataset, len(runs), lanes)
    else:
        machine = prepare(metadata, dataset, len(runs), devices=devices, lanes=lanes)
        metadata, dataset, placement, _ = machine  # so the host's arrays can be freed
        width = placement.width
    directories.check_out_dir(directory)
    with files.locked(directory, *shard):
        stored: dict[Run, dict] = {}
        if not overwrite:
            directories.claim(directory, metadata)
            if rows.row_files(directory):
                metadata = with_program(metadata, dataset)
            stored = rows.finished_runs(directory, metadata)
        files.make_directory(directory / "runs")
        saving = {"chunk": chunk_size(chunk, config.epochs, width), "overwrite": overwrite}
        saving |= {"checkpoint_every": checkpoint_every, "keep_weights": keep_weights}
        trainer = cluster or machine._replace(metadata=metadata)
        finished = _with_weights(directory, stored, metadata) if keep_weights else dict(stored)
        yield Experiment(directory, metadata, dataset, trainer, stored, finished, **saving)
        if shard[1] == 1:  # else another shard may be about to write there
            files.remove_if_empty(directory / "checkpoints")
            finish_merge(directory)


def _with_weights(directory: Path, stored: dict[Run, dict], metadata: Metadata) -> dict[Run, dict]:
    """The stored runs whose weights are stored, too."""
    return {run: row for run, row in stored.items() if has_weights(directory, run, metadata, row)}


def chunk_size(chunk: Literal["auto"] | int, epochs: float, width: int) -> int:
    """Runs that share a file: a multiple of `width`; "auto" is enough for about 50 epochs per lane.

    Short chunks lose less to a kill, and cost more files.
    """
    if chunk == "auto":
        return math.ceil(min(50 / epochs, 1e6)) * width
    if chunk < 1:
        raise UserError(f"a chunk must have at least one run, not {chunk}")
    return -(-chunk // width) * width


def recipe_name(config: Config, dataset: Dataset) -> str:
    """The recipe with these settings, or "custom"."""
    for name, recipe in RECIPES.items():
        with contextlib.suppress(UserError):  # too large a batch for these data
            if for_dataset(recipe, dataset) == config:
                return name
    return "custom"
