"""The summary of a sweep: its runs grouped in families, and the statistics of each."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mlp_jax.analysis import predictions, stats
from mlp_jax.analysis.compare import ALPHA, holm, sign_test
from mlp_jax.analysis.crossed import Crossed
from mlp_jax.analysis.predictions import PredictionCounts
from mlp_jax.analysis.tables import STATISTICS
from mlp_jax.errors import UserError
from mlp_jax.training.config import RECIPES, REFERENCES, Config
from mlp_jax.training.run import STREAMS, used_streams

RunId = tuple[str, float, int]  # vary, learning rate, seed


class Family(NamedTuple):
    """Runs of one (vary, learning rate) with finite losses, in the order of their seeds."""

    vary: str
    rate: float
    seeds: np.ndarray  # [R]
    correct: np.ndarray  # int32 [R, epochs]
    seconds: np.ndarray  # [R]
    diverged: list[int]  # seeds of the runs left out
    counts: PredictionCounts

    @property
    def scores(self) -> dict[int, int]:
        """Correct images by seed; a run that diverged counts as worse than all others."""
        right = dict(zip(self.seeds.tolist(), self.correct[:, -1].tolist(), strict=True))
        return right | dict.fromkeys(self.diverged, -1)


def make_families(
    runs: list[RunId],
    history: dict[str, np.ndarray],
    seconds: np.ndarray,
    blocks: Iterable[tuple[list[RunId], np.ndarray]],
    labels: np.ndarray,
    n_classes: int,
) -> list[Family]:
    """Families, "all" first, of sorted runs with their metrics [R, epochs] and seconds [R].

    `blocks` are of some runs and their predictions, uint8 [r, n].
    UserError for a run stored twice, or whose predictions are impossible or do not give its
    accuracy.
    """
    if len(set(runs)) < len(runs):
        raise UserError("a run is stored twice: remove one of its files")
    losses = np.stack([history["train_loss"], history["test_loss"]])
    finite = np.isfinite(losses).all(axis=(0, 2))
    position = {run: i for i, run in enumerate(runs)}
    known = ("all", *STREAMS, "crossed")
    names = sorted({run[:2] for run in runs}, key=lambda n: ([*known, n[0]].index(n[0]), *n))

    labels = labels.astype(np.int64)
    shapes = (len(labels), n_classes), (2, len(labels))
    sums = {name: [np.zeros(shape, np.int64) for shape in shapes] for name in names}
    halves = np.zeros((2, len(runs)), np.int64)
    for ids, block in blocks:
        at = np.array([position[run] for run in ids])
        for name in dict.fromkeys(run[:2] for run in ids):
            here = finite[at] & np.array([run[:2] == name for run in ids])
            halves[:, at[here]] = predictions.count_block(block[here], labels, *sums[name])
    if not np.array_equal(halves.sum(axis=0)[finite], history["test_correct"][finite, -1]):
        raise UserError("some predictions do not give their row's test_correct")
    family_of = {name: np.array([run[:2] == name for run in runs]) for name in names}
    counts = {
        name: PredictionCounts(labels, *sums[name], *halves[:, mine & finite])
        for name, mine in family_of.items()
    }
    if any((each.classes.sum(axis=1) != each.runs).any() for each in counts.values()):
        raise UserError(f"a prediction is not in 0..{n_classes - 1}")
    seeds = np.array([seed for *_, seed in runs])
    families = []
    for name, mine in family_of.items():
        kept, diverged = mine & finite, seeds[mine & ~finite].tolist()
        correct, each = history["test_correct"][kept], counts[name]
        families.append(Family(*name, seeds[kept], correct, seconds[kept], diverged, each))
    return families


def summarize(
    families: list[Family],
    recipe: str,
    config: Config,
    processors: dict[str, int],
    crossed: Mapping[float, Crossed | None],
) -> dict:
    """summary.json: the families, and pairs of learning rates that share seeds.

    `crossed` has the indices of crossed families by learning rate, None without a complete block;
    their runs are dependent, so they get no other statistics.
    """
    blocks = [family for family in families if family.vary == "crossed"]
    families = [family for family in families if family.vary != "crossed"]
    summary = {
        "recipe": recipe,
        "dataset": config.dataset,
        "epochs": config.epochs,
        "processors": processors,
        "n_test": len((families or blocks)[0].counts.labels),
        "units": "shares of 1; intervals at 95 %; diverged runs (seeds) are in no statistic, but"
        " lose in pairs of learning rates, whose intervals (Jeffreys) are of one pair each; their"
        " p_holm is of the exact sign test, corrected for the number of pairs",
        "families": [family_statistics(family, families, recipe, config) for family in families],
        "learning_rates": compare_rates(families),
    }
    if blocks:
        each = [crossed_statistics(family, crossed[family.rate], config) for family in blocks]
        summary["crossed"] = each
    return summary


def crossed_statistics(family: Family, indices: Crossed | None, config: Config) -> dict:
    """Which crossed stream makes accuracy vary; without indices if no block is complete."""
    streams = used_streams(config)
    used = indices.test.blocks * 2 ** len(streams) if indices else 0
    result = {"learning_rate": family.rate, "streams": list(streams), "runs": used}
    result |= {"runs_in_broken_blocks": len(family.seeds) - used, "diverged": family.diverged}
    return to_json(result | (indices._asdict() if indices else {}))


def compare_rates(families: list[Family]) -> list[dict]:
    """P(one learning rate beats another) for pairs that share seeds; Holm's p over all pairs."""
    pairs: list[dict[str, Any]] = []
    p_values = []
    for a, b in itertools.combinations(families, 2):
        shared = sorted(a.scores.keys() & b.scores.keys())
        if a.vary == b.vary and len(shared) >= 2:
            sides = [([side.scores[seed] for seed in shared], side.rate) for side in (a, b)]
            (worse, low), (better, high) = sorted(sides, key=lambda side: sum(side[0]))
            names = {"vary": a.vary, "a": high, "b": low, "pairs": len(shared)}
            p_values.append(sign_test(better, worse))
            chance = stats.paired_improvement(better, worse)
            pairs.append(names | {"probability": to_json(chance), "p_value": p_values[-1]})
    for pair, p in zip(pairs, holm(p_values).tolist(), strict=True):
        higher = pair["probability"]["estimate"] > 0.5
        pair |= {"p_holm": p, "significant": p < ALPHA and higher}
        pair["meaningful"] = pair["probability"]["high"] > 0.75
    return pairs


def family_statistics(family: Family, families: list[Family], recipe: str, config: Config) -> dict:
    """A family's STATISTICS; None where there are too few runs."""
    runs, n_test, counts = len(family.seeds), len(family.counts.labels), family.counts
    result: dict = {"vary": family.vary, "learning_rate": family.rate, "runs": runs}
    result |= {"diverged": family.diverged} | dict.fromkeys([*STATISTICS, "v_test", "v_ind"])
    correct = family.correct[:, -1]
    if runs:
        result["min"], result["max"] = int(correct.min()) / n_test, int(correct.max()) / n_test
        result["binomial_sd"] = stats.binomial_sd(float(correct.mean()) / n_test, n_test)
        result["vote_accuracy"] = predictions.ensemble_correct(counts) / n_test
        result["seconds_a_run"] = float(family.seconds.mean())
    if runs >= 2:
        result["over_test_sets"] = stats.Z * predictions.sd_over_test_sets(counts)
        # on whole numbers, so that equal runs have an SD of 0, not a rounding error
        estimators = {"mean": stats.mean_interval, "sd": stats.sd_interval}
        estimators["interquartile_mean"] = stats.interquartile_mean
        for name, estimator in estimators.items():
            result[name] = stats.Interval(*(end / n_test for end in estimator(correct)))
        parts = predictions.variance_parts(counts)
        result |= {"v_test": parts.test, "v_ind": parts.independent}
        result["independent_sd"] = math.sqrt(parts.independent)
        result["distribution_sd"] = predictions.distribution_sd(counts)
        result["halves_sd"] = float(predictions.signed_sqrt(parts.halves))
        result |= predictions.disagreement(counts)._asdict()
        result["runs_for_mean"] = stats.seeds_for_mean(result["sd"].estimate, 1e-4)
        result["runs_for_sd"] = stats.seeds_for_sd(0.05, stats.excess_kurtosis(correct))
        result |= beside_reference(family, recipe, config) | beside_all(family, families)
    if runs >= 3:
        predicted = predictions.predicted_sd(counts)
        result |= {f"{name}_sd": sd for name, sd in predicted._asdict().items()}
    return to_json(result)


def beside_reference(family: Family, recipe: str, config: Config) -> dict:
    """Where the recipe's reference lies among the runs, if these have the recipe's settings."""
    own = dataclasses.replace(config, learning_rate=family.rate) == RECIPES.get(recipe)
    if not (own and family.vary == "all" and recipe in REFERENCES):
        return {}
    # counted in images, so that a run as good as the reference ties with it
    correct, n_test = family.correct[:, -1], len(family.counts.labels)
    right, sd = REFERENCES[recipe].correct * n_test / 10_000, correct.std(ddof=1)
    return {
        "reference": REFERENCES[recipe].correct / 10_000,
        "runs_below": int((correct < right).sum()),
        "runs_equal": int((correct == right).sum()),
        "runs_above": int((correct > right).sum()),
        "share_below": stats.share_below(right, correct),
        "z": (right - correct.mean()) / sd if sd else None,
    }


def beside_all(family: Family, families: list[Family]) -> dict:
    """The SD of a one-stream family relative to that of "all" at the same rate."""
    for other in families:
        scores = other.correct[:, -1]
        beside = other is not family and (other.vary, other.rate) == ("all", family.rate)
        if beside and len(set(scores)) > 1:
            ratio = stats.variance_ratio(family.correct[:, -1], scores)
            return {"sd_over_all": stats.Interval(*map(math.sqrt, ratio))}
    return {}


def to_json(value: Any) -> Any:
    """NamedTuples as dicts, and nan as null."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: to_json(item) for name, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
