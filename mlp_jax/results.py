"""Sweeps as report and compare read them: checked, counted, grouped in families.

Equal rows give equal numbers however they are split into files; predictions are streamed.
"""

import collections
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlp_jax.analysis.crossed import BlockSums, sum_block
from mlp_jax.analysis.families import Family, Tally
from mlp_jax.data import dataset as datasets
from mlp_jax.errors import UserError
from mlp_jax.files import expand
from mlp_jax.records import rows
from mlp_jax.records.directory import read_metadata
from mlp_jax.records.provenance import Metadata, check_one_sweep, numerics
from mlp_jax.training.arrays import Dataset
from mlp_jax.training.config import Config
from mlp_jax.training.run import BLOCK, STREAMS, crossed_seeds, make_run


def open_dataset(directory: Path, metadata: Metadata, data_dir: str | Path | None) -> Dataset:
    """The data on which the runs of `directory` were trained; UserError if they have changed."""
    config = metadata.config
    dataset = datasets.load_dataset(config.dataset, data_dir, quiet=False, split=config.split)
    datasets.check_dataset(directory, metadata.fingerprint, metadata.images, dataset)
    return dataset


def count_processors(paths: Sequence[Path], metadata: Metadata) -> dict[str, int]:
    """Rows by processor; UserError for rows that may not be pooled."""
    counts: collections.Counter[str] = collections.Counter()
    metadata = metadata._replace(mixed=False)  # each file says whether it is
    for path in paths:
        stored = rows.read_metadata(path)
        check_one_sweep(path, stored, metadata)
        check_seeds(path)
        if stored.program and not stored.mixed:  # older rows, and config.json, may lack it
            metadata = metadata._replace(program=stored.program)
        name = "{processor}, {cores} cores, {device_kind}".format(**stored.environment)
        counts[name + " (--allow-mixed)" * stored.mixed] += rows.count_rows(path)
    return dict(counts)


def check_seeds(path: Path) -> None:
    """UserError if the streams of a row have other seeds than those of its run."""
    import pyarrow.parquet as pq

    stored = pq.read_schema(path).names  # older rows lack some
    streams = [stream for stream in STREAMS if f"{stream}_seed" in stored]
    for batch in rows.read_batches([path], [f"{stream}_seed" for stream in streams]):
        columns = [batch[f"{stream}_seed"].to_pylist() for stream in streams]
        for run_id, *found in zip(rows.run_ids(batch), *columns, strict=True):
            seeds = run_id.seeds
            if found != [getattr(seeds, stream) for stream in streams]:
                line = f"{path}: seed {run_id.seed}, family {run_id.vary} has seeds {found}"
                raise UserError(line)


def count_images(paths: Sequence[Path]) -> int:
    """How many images the runs were evaluated on."""
    _, predicted = next(rows.read_predictions(paths))
    return predicted.shape[1]


def read_families(paths: Sequence[Path], labels: np.ndarray, n_classes: int) -> list[Family]:
    """The families of a sweep; UserError for rows that contradict themselves."""
    metrics = ("test_correct", *rows.LOSSES)
    names = [f"{name}_by_epoch" for name in metrics]
    n_runs, tally = sum(map(rows.count_rows, paths)), None
    for batch in rows.read_batches(paths, [*names, "seconds", "predictions"]):
        correct, *losses = (rows.by_epoch(batch, name) for name in metrics)
        tally = tally or Tally(n_runs, correct.shape[1], labels, n_classes)
        finite = rows.finite_runs(*losses)
        columns = {"finite": finite, "seconds": batch["seconds"], "correct": correct}
        tally.add(rows.run_ids(batch), rows.predictions(batch["predictions"]), **columns)
    try:
        return tally.families() if tally else []
    except UserError as error:
        rows.check_unique(paths)  # it names the files
        raise UserError(f"{paths[0].parents[1]}: {error}") from None


def read_blocks(paths: Sequence[Path], family: Family, config: Config) -> BlockSums | None:
    """The complete blocks of a crossed family; None if there are none."""
    cells = sorted(crossed_seeds(1, config), key=lambda cell: make_run(cell, 1, "crossed").seeds)
    seeds, labels = set(family.seeds.tolist()), family.counts.labels
    pending: dict[int, dict] = collections.defaultdict(dict)
    sums = {}
    for ids, predictions in rows.read_predictions(paths):
        for run_id, row in zip(ids, predictions, strict=True):
            block, cell = divmod(run_id.seed, BLOCK)
            if run_id.family != family[:2] or run_id.seed not in seeds or cell not in cells:
                continue
            pending[block][cell] = row == labels
            if len(pending[block]) == len(cells):
                right = pending.pop(block)
                sums[block] = sum_block([right[cell] for cell in cells])
    if not sums:
        return None
    contrasts, squares = zip(*(sums[block] for block in sorted(sums)), strict=True)
    return BlockSums(np.stack(contrasts), np.stack(squares), len(labels))


class Target(NamedTuple):
    """One family of a sweep, at one learning rate, as its rows were when it was opened."""

    name: str  # as on a command line
    directory: Path
    metadata: Metadata
    paths: list[Path]
    processors: dict[str, int]  # rows by what trained them
    vary: str
    rate: float
    scores: dict[int, float]  # accuracy by seed, nan where a run diverged

    @property
    def family(self) -> tuple[str, float]:
        return self.vary, self.rate

    @property
    def lanes(self) -> Any:
        """The --lanes with which its rows are extended."""
        return numerics(self.metadata).get("lanes", "auto")

    @property
    def finite(self) -> dict[int, float]:
        """The scores of the runs that did not diverge."""
        return {seed: score for seed, score in self.scores.items() if not math.isnan(score)}

    def read_family(self, data_dir: Path | None = None) -> Family:
        dataset = open_dataset(self.directory, self.metadata, data_dir)
        families = read_families(self.paths, dataset.test.labels, dataset.n_classes)
        return next(family for family in families if family[:2] == self.family)

    def read_correct(self, seeds: Collection[int], labels: np.ndarray) -> dict[int, np.ndarray]:
        """Which test images the runs of some seeds get right, 8 to a byte."""
        return {
            run_id.seed: np.packbits(row == labels)
            for ids, predictions in rows.read_predictions(self.paths)
            for run_id, row in zip(ids, predictions, strict=True)
            if run_id.family == self.family and run_id.seed in seeds
        }


def open_target(text: str) -> Target:
    """The Target of DIR[:FAMILY][@RATE]; default: family "all", and the only rate."""
    match = re.fullmatch(r"(.+?)(?::([a-z]+))?(?:@(\d*\.?\d+(?:[eE][+-]?\d+)?))?", text)
    place, vary, rate = match.groups() if match else (text, None, None)
    if expand(text).is_dir():
        place, vary, rate = text, None, None
    vary, directory = vary or "all", expand(place)
    if vary not in ("all", *STREAMS):
        raise UserError(f"{text}: a family is all or one of {', '.join(STREAMS)}, not {vary!r}")
    metadata = read_metadata(directory)
    if metadata.seed is not None:
        raise UserError(f"{directory} has a single run: compare sweeps")
    paths = rows.checked_files(directory)
    scores = rows.read_scores(paths)
    rates = sorted({run_id.learning_rate for run_id in scores if run_id.vary == vary})
    chosen = [each for each in rates if rate is None or np.float32(each) == np.float32(rate)]
    if len(chosen) != 1:
        found = ", ".join(f"{each:.9g}" for each in rates) or "none"
        line = f"{text}: the learning rates of family {vary!r} are {found}: name one"
        raise UserError(line + (f", as in {place}@{rates[0]:.9g}" if rates else ""))
    processors = count_processors(paths, metadata)
    metadata = metadata._replace(program=rows.stored_program(paths))
    own = {i.seed: score for i, score in scores.items() if i.family == (vary, chosen[0])}
    return Target(text, directory, metadata, paths, processors, vary, chosen[0], own)
