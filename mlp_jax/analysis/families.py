"""The runs of a sweep, counted block by block and grouped in families."""

from typing import Any, NamedTuple

import numpy as np

from mlp_jax.analysis.predictions import PredictionCounts, count_block
from mlp_jax.errors import UserError
from mlp_jax.training.run import STREAMS, Run

PERCENTILES = (0, 5, 50, 95, 100)
"""Which percentiles of the runs a figure draws by epoch."""


class Family(NamedTuple):
    """Runs of one (vary, learning rate) with finite losses, in the order of their seeds."""

    vary: str
    rate: float
    seeds: np.ndarray  # [R]
    correct: np.ndarray  # int32 [R], after the last epoch
    by_epoch: np.ndarray  # [epochs, 5]: PERCENTILES of the correct images; empty without runs
    seconds: np.ndarray  # [R]
    diverged: list[int]  # seeds of the runs left out
    counts: PredictionCounts

    @property
    def scores(self) -> dict[int, int]:
        """Correct images by seed; a run that diverged counts as worse than all others."""
        right = dict(zip(self.seeds.tolist(), self.correct.tolist(), strict=True))
        return right | dict.fromkeys(self.diverged, -1)


class Tally:
    """Counts runs in any order; keeps 25 bytes per run, and 4 per run and epoch."""

    def __init__(self, n_runs: int, epochs: int, labels: np.ndarray, n_classes: int):
        self.labels, self.n_classes, self.added = labels.astype(np.int64), n_classes, 0
        # by family: `classes` and `moments` of PredictionCounts
        self.sums: dict[tuple[str, float], list[np.ndarray]] = {}
        fields = [("family", "i4"), ("seed", "u4"), ("finite", "?"), ("seconds", "f8")]
        self.runs = np.empty(n_runs, [*fields, ("halves", "i4", 2), ("correct", "i4", epochs)])

    def add(self, ids: list[Run], block: np.ndarray, **columns: np.ndarray) -> None:
        """Runs, their predictions, uint8 [r, n], and the columns finite, seconds and correct."""
        part = self.runs[self.added : self.added + len(ids)]
        self.added += len(ids)
        shapes = (len(self.labels), self.n_classes), (2, len(self.labels))
        for name in dict.fromkeys(run_id.family for run_id in ids):
            self.sums.setdefault(name, [np.zeros(shape, np.int64) for shape in shapes])
        names = list(self.sums)
        part["family"] = [names.index(run_id.family) for run_id in ids]
        part["seed"] = [run_id.seed for run_id in ids]
        for column, values in columns.items():
            part[column] = values
        for i in np.unique(part["family"]):
            here = (part["family"] == i) & part["finite"]
            part["halves"][here] = count_block(block[here], self.labels, *self.sums[names[i]]).T

    def families(self) -> list[Family]:
        """Families, "all" first.

        UserError for a run stored twice, or whose predictions are impossible or do not match
        its accuracy.
        """
        runs, names, known = self.runs[: self.added], list(self.sums), ("all", *STREAMS, "crossed")
        order = np.lexsort((runs["seed"], runs["family"]))
        family, seeds, finite = (runs[column][order] for column in ("family", "seed", "finite"))
        if ((np.diff(family) == 0) & (np.diff(seeds.astype(np.int64)) == 0)).any():
            raise UserError("a run is stored twice: remove one of its files")
        wrong = runs["halves"].sum(axis=1) != runs["correct"][:, -1]
        if wrong[runs["finite"]].any():
            raise UserError("some predictions do not match their row's test_correct")
        families = []
        for name in sorted(names, key=lambda n: ([*known, n[0]].index(n[0]), *n)):
            mine = family == names.index(name)
            kept, diverged = order[mine & finite], seeds[mine & ~finite].tolist()
            halves = runs["halves"][kept].astype(np.int64).T
            counts = PredictionCounts(self.labels, *self.sums[name], *halves)
            if (counts.classes.sum(axis=1) != counts.runs).any():
                raise UserError(f"a prediction is not in 0..{self.n_classes - 1}")
            # one epoch after another, so that no more than one column is copied
            epochs: Any = runs["correct"].T if len(kept) else []
            by_epoch = np.array([np.percentile(column[kept], PERCENTILES) for column in epochs])
            last, seconds = runs["correct"][kept, -1], runs["seconds"][kept]
            of_runs = (runs["seed"][kept], last, by_epoch, seconds, diverged, counts)
            families.append(Family(name[0], name[1], *of_runs))
        return families
