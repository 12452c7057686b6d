"""The summary of a sweep: the statistics of its families of runs."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

from mlp_jax.analysis import predictions, stats
from mlp_jax.analysis.compare import ALPHA, holm, sign_test
from mlp_jax.analysis.crossed import Crossed
from mlp_jax.analysis.families import Family
from mlp_jax.analysis.tables import STATISTICS
from mlp_jax.training.config import RECIPES, REFERENCES, Config
from mlp_jax.training.run import used_streams


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
        "split": config.split,
        "epochs": config.epochs,
        "processors": processors,
        "n_test": len((families or blocks)[0].counts.labels),
        "units": "fractions (0 to 1); intervals at 95 %; diverged runs (listed by seed) are"
        " excluded, but count as losses where learning rates are compared. Intervals there"
        " (Jeffreys) are not adjusted for multiple comparisons; p_holm, from an exact sign test,"
        " is",
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
            if stats.paired_improvement(better, worse).estimate < 0.5:  # it wins less often
                (worse, low), (better, high) = (better, high), (worse, low)
            names = {"vary": a.vary, "a": high, "b": low, "pairs": len(shared)}
            p_values.append(sign_test(better, worse))
            chance = stats.paired_improvement(better, worse)
            pairs.append(names | {"probability": to_json(chance), "p_value": p_values[-1]})
    for pair, p in zip(pairs, holm(p_values).tolist(), strict=True):
        pair |= {"p_holm": p, "significant": p < ALPHA}
        pair["meaningful"] = pair["probability"]["high"] > 0.75
    return pairs


def family_statistics(family: Family, families: list[Family], recipe: str, config: Config) -> dict:
    """A family's STATISTICS; None where there are too few runs."""
    runs, n_test, counts = len(family.seeds), len(family.counts.labels), family.counts
    result: dict = {"vary": family.vary, "learning_rate": family.rate, "runs": runs}
    result |= {"diverged": family.diverged} | dict.fromkeys([*STATISTICS, "v_test", "v_ind"])
    correct = family.correct
    if runs:
        result["min"], result["max"] = int(correct.min()) / n_test, int(correct.max()) / n_test
        result["binomial_sd"] = stats.binomial_sd(float(correct.mean()) / n_test, n_test)
        result["vote_accuracy"] = predictions.ensemble_correct(counts) / n_test
        result["seconds_a_run"] = float(family.seconds.mean())
    if runs >= 2:
        result["over_test_sets"] = stats.Z * predictions.sd_over_test_sets(counts)
        # on whole numbers, so that equal runs have an SD of 0, not a rounding error
        of_images = {
            "mean": stats.mean_interval(correct, resolution=1),
            "sd": stats.sd_interval(correct, resolution=1),
            "interquartile_mean": stats.interquartile_mean(correct, resolution=1),
        }
        for name, interval in of_images.items():
            result[name] = stats.Interval(*(end / n_test for end in interval))
        parts = predictions.variance_parts(counts)
        result |= {"v_test": parts.test, "v_ind": parts.independent}
        result["independent_sd"] = math.sqrt(parts.independent)
        result["distribution_sd"] = predictions.distribution_sd(counts)
        result["halves_sd"] = float(predictions.signed_sqrt(parts.halves))
        result |= predictions.disagreement(counts)._asdict()
        least = stats.sd_of_rounding(1 / n_test)
        result["runs_for_mean"] = stats.seeds_for_mean(max(result["sd"].estimate, least), 1e-4)
        result["runs_for_sd"] = stats.seeds_for_sd(0.05, stats.excess_kurtosis(correct))
        result |= compare_to_reference(family, recipe, config) | sd_over_all(family, families)
    if runs >= 3:
        predicted = predictions.predicted_sd(counts)
        result |= {f"{name}_sd": sd for name, sd in predicted._asdict().items()}
    return to_json(result)


def compare_to_reference(family: Family, recipe: str, config: Config) -> dict:
    """Where the recipe's reference lies among the runs, if these have the recipe's settings."""
    own = dataclasses.replace(config, learning_rate=family.rate) == RECIPES.get(recipe)
    if not (own and family.vary == "all" and recipe in REFERENCES):
        return {}
    # counted in images, so that a run as good as the reference ties with it
    correct, n_test = family.correct, len(family.counts.labels)
    reference, sd = REFERENCES[recipe].correct * n_test / 10_000, correct.std(ddof=1)
    return {
        "reference": REFERENCES[recipe].correct / 10_000,
        "runs_below": int((correct < reference).sum()),
        "runs_equal": int((correct == reference).sum()),
        "runs_above": int((correct > reference).sum()),
        "share_below": stats.share_below(reference, correct),
        "z": (reference - correct.mean()) / sd if sd else None,
    }


def sd_over_all(family: Family, families: list[Family]) -> dict:
    """The SD of a one-stream family relative to that of "all" at the same rate."""
    for other in families:
        beside = other is not family and (other.vary, other.rate) == ("all", family.rate)
        # the SD of equal runs is not 0, but unknown
        if beside and min(len(set(each.correct)) for each in (family, other)) > 1:
            ratio = stats.variance_ratio(family.correct, other.correct)
            return {"sd_over_all": stats.Interval(*map(math.sqrt, ratio))}
    return {}


def to_json(value: Any) -> Any:
    """NamedTuples as dicts, and nan as null."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: to_json(item) for name, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
