"""What a sweep says: its runs in families, and the statistics of each."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mlp_jax.analysis import predictions, stats
from mlp_jax.analysis.compare import ALPHA, holm, sign_test
from mlp_jax.analysis.crossed import Crossed
from mlp_jax.analysis.predictions import PredictionCounts, signed_sqrt
from mlp_jax.errors import UserError
from mlp_jax.training.config import RECIPES, REFERENCES, Config
from mlp_jax.training.run import STREAMS, used_streams

RunId = tuple[str, float, int]  # vary, learning rate, seed


class Family(NamedTuple):
    """The runs of one (vary, learning rate) whose loss is finite, all in the order of the seeds."""

    vary: str
    rate: float
    seeds: np.ndarray  # [R]
    correct: np.ndarray  # int32 [R, epochs]
    seconds: np.ndarray  # [R]
    diverged: list[int]  # seeds of the runs left out
    counts: PredictionCounts

    @property
    def scores(self) -> dict[int, int]:
        """Correct images by seed; a run that diverged is worse than any that did not."""
        right = dict(zip(self.seeds.tolist(), self.correct[:, -1].tolist(), strict=True))
        return right | dict.fromkeys(self.diverged, -1)


def make_families(
    runs: list[RunId],
    history: dict[str, np.ndarray],
    seconds: np.ndarray,
    read_predictions: Callable[[], Iterable[tuple[list[RunId], np.ndarray]]],
    labels: np.ndarray,
    n_classes: int,
) -> list[Family]:
    """All families, "all" first, of sorted runs, their metrics [R, epochs] and seconds [R].

    `read_predictions()` yields some runs and their predictions, uint8 [r, n].
    UserError for a run that is there twice, or whose predictions cannot be or do not give its
    accuracy.
    """
    if len(set(runs)) < len(runs):
        raise UserError("a run is stored twice: remove one of its files")
    finite = np.isfinite([history["train_loss"], history["test_loss"]]).all(axis=(0, 2))
    position = {run: i for i, run in enumerate(runs)}
    known = ("all", *STREAMS, "crossed")
    names = sorted({run[:2] for run in runs}, key=lambda n: ([*known, n[0]].index(n[0]), *n))

    labels = labels.astype(np.int64)
    shapes = (len(labels), n_classes), (2, len(labels))
    sums = {name: [np.zeros(shape, np.int64) for shape in shapes] for name in names}
    halves = np.zeros((2, len(runs)), np.int64)
    for ids, block in read_predictions():
        at = np.array([position[run] for run in ids])
        for name in dict.fromkeys(run[:2] for run in ids):
            here = finite[at] & [run[:2] == name for run in ids]
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
    """summary.json: the families and, where learning rates share seeds, these in pairs.

    `crossed` has the indices of the crossed families by learning rate, None without a whole block;
    their runs are dependent, so they have none of the other statistics.
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
    """Which of the crossed streams makes accuracy vary; without indices if no block is whole."""
    streams = used_streams(config)
    used = indices.test.blocks * 2 ** len(streams) if indices else 0
    result = {"learning_rate": family.rate, "streams": list(streams), "runs": used}
    result |= {"runs_in_broken_blocks": len(family.seeds) - used, "diverged": family.diverged}
    return to_json(result | (indices._asdict() if indices else {}))


def format_crossed(crossed: dict) -> list[str]:
    """Lines on a crossed family: the SD, and the share of the variance of each stream."""
    lines = ["\ncrossed streams, learning rate {learning_rate:g}: {runs} runs".format(**crossed)]
    if left := crossed["runs_in_broken_blocks"] + len(crossed["diverged"]):
        lines[0] += f"; {left} more are in blocks that are not finished, or diverged"
    for key, meaning in (("test", "on this test set"), ("distribution", "on an infinite one")):
        if indices := crossed.get(key):
            variance = indices["variance"].items()  # its ends are None where there are few blocks
            sd = {end: None if v is None else float(signed_sqrt(v)) for end, v in variance}
            value, interval = format_value(sd, "points")
            lines.append(f"  SD {meaning:<21}{value:>8}  {interval}")
            for name in crossed["streams"]:
                first, total = (indices[kind][name] for kind in ("indices", "total"))
                shares = ("{:>6} {:<16}".format(*format_value(s, "")) for s in (first, total))
                lines.append("    {:<10}by itself {}  in all {}".format(name, *shares).rstrip())
            value, interval = format_value(indices["interactions"], "")
            lines.append(f"    interactions        {value:>6} {interval}")
    return lines


def compare_rates(families: list[Family]) -> list[dict]:
    """P(one learning rate beats another) for each two that share seeds; Holm's p over all pairs."""
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


# a statistic's key in summary.json: its name, its unit and what it says in the field's terms
STATISTICS = {
    "mean": ("mean accuracy", "%", "over runs (Student's t)"),
    "over_test_sets": ("  over other test sets", "points", "of this size, +-, beyond the runs"),
    "interquartile_mean": ("interquartile mean", "%", "of the middle half of the runs (bootstrap)"),
    "min": ("lowest run", "%", ""),
    "max": ("highest run", "%", ""),
    "reference": ("reference", "%", "one number that {source} reports"),
    "runs_below": ("  runs below it", "runs", ""),
    "runs_equal": ("  runs equal to it", "runs", ""),
    "runs_above": ("  runs above it", "runs", ""),
    "share_below": ("  share below it", "%", "ties count one half (Jeffreys)"),
    "z": ("  its z", "", "SDs that it lies from the mean"),
    "sd": ("SD", "points", "of accuracy over runs, sqrt(V_test) (chi-square)"),
    "sd_over_all": ("  relative to all's", "", "while the seed decides this stream alone (F)"),
    "independent_sd": ("  independent errors", "points", "sqrt(V_ind): the finite test set's own"),
    "distribution_sd": (
        "  distribution-wise",
        "points",
        "on an infinite test set (over runs and images)",
    ),
    "halves_sd": ("  the same by halves", "points", "covariance of two halves of the test set"),
    "binomial_sd": ("  binomial", "points", "were all images equally hard"),
    "binary_sd": ("  if calibrated: binary", "points", "sqrt(error / 2n), of independent errors"),
    "k_class_sd": (
        "  if calibrated: k-class",
        "points",
        "at least sqrt(error / nk), of the same",
    ),
    "label_free_sd": (
        "  label-free",
        "points",
        "a prediction of independent errors from the votes",
    ),
    "error": ("mean error", "%", "of a run, on an image"),
    "disagreement": ("disagreement", "%", "of two runs; calibrated: the mean error"),
    "calibration_error": ("calibration gap", "%", "CACE of the shares of votes"),
    "vote_accuracy": ("ensemble accuracy", "%", "by majority vote of all {runs}"),
    "runs_for_mean": ("runs needed", "runs", "for the mean to +/- 0.01 points"),
    "runs_for_sd": ("runs needed", "runs", "for the SD to 5 %"),
    "seconds_a_run": ("seconds per run", "s", "wall time of the sweep, divided by its runs"),
}
OPTIONAL = (
    "reference",
    "runs_below",
    "runs_equal",
    "runs_above",
    "share_below",
    "z",
    "sd_over_all",
)


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
        # of whole numbers: equal runs then have an SD of 0, not of a rounding error
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
    """Where the recipe's reference lies among these runs, if they have the recipe's settings."""
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
    """The SD of a family that varies one stream, relative to that of "all" at the same rate."""
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


FORMATS = {"%": "{:.3%}", "points": "{:.4%}", "s": "{:.1f}", "runs": "{:,}", "": "{:.2f}"}


def format_value(value: Any, unit: str) -> tuple[str, str]:
    """A value and its interval, if it has one, as the table prints them; a dash for None."""
    if isinstance(value, dict):
        (estimate, _), (low, _), (high, _) = (format_value(end, unit) for end in value.values())
        return estimate, "-" if low == "-" else f"{low} ... {high}"
    return "-" if value is None else FORMATS[unit].format(value).rstrip("%"), ""


def format_table(summary: dict) -> str:
    """The summary as it is read at a terminal."""
    lines = [
        "{recipe} on {dataset}: epochs {epochs}, test images {n_test:,}".format(**summary),
        "accuracies and errors in per cent, SDs in percentage points, intervals at 95 %",
    ]
    if marked := [name for name in summary["processors"] if "--allow-mixed" in name]:
        n_mixed = sum(summary["processors"][name] for name in marked)
        lines.append(f"{n_mixed} runs were pooled with others by --allow-mixed: see their files")
    _, source = REFERENCES.get(summary["recipe"], (0, ""))
    for family in summary["families"]:
        lines.append("\nvary {vary}, learning rate {learning_rate:g}: {runs} runs".format(**family))
        if left_out := family["diverged"]:
            lines.append(f"  and {len(left_out)} that diverged, in no statistic: seeds {left_out}")
        for key, (name, unit, meaning) in STATISTICS.items():
            if family[key] is None and key in OPTIONAL:
                continue
            value, interval = format_value(family[key], unit)
            meaning = meaning.format(source=source, runs=family["runs"])
            lines.append(f"  {name:<24}{value:>8}  {interval:<19}  {meaning}".rstrip())
    for crossed in summary.get("crossed", []):
        lines += format_crossed(crossed)
    for pair in summary["learning_rates"]:
        p, interval = format_value(pair["probability"], "")
        lines.append(
            "\nvary {vary}, P(learning rate {a:g} beats {b:g})".format(**pair)
            + f" = {p} ({interval}), {pair['pairs']} seeds, Holm's p {pair['p_holm']:.2g};"
            f" significant: {pair['significant']}, meaningful: {pair['meaningful']}"
        )
    return "\n".join(lines)
