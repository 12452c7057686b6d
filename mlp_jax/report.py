"""`python -m mlp_jax.report`: how much a sweep's test accuracy varies, and why.

A table, the same numbers as summary.json, and figures. Equal rows give equal bytes, in whichever
files they lie, and predictions are read as a stream: memory does not grow with them.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from mlp_jax.cli import parse_args, run_front
from mlp_jax.records import rows as store
from mlp_jax.training.config import RECIPES, REFERENCES, STREAMS, UserError

DESCRIPTION = "Say how much the test accuracy of a sweep varies and why, in a table and figures."


@dataclasses.dataclass(frozen=True)
class Args:
    directory: tyro.conf.Positional[Path]
    """Directory of the sweep."""
    data_dir: Path | None = None
    """Where TFDS keeps its data; else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    out: Path | None = None
    """Directory for summary.json and figures/; else that of the sweep."""


class Family(NamedTuple):
    """The runs of one (vary, learning rate) whose loss is finite, in the order of their seeds."""

    vary: str
    rate: float
    seeds: np.ndarray  # [R]
    correct: np.ndarray  # int32 [R, epochs]
    seconds: np.ndarray  # [R]
    diverged: list[int]  # seeds of the runs left out
    counts: Any  # stats.PredictionCounts; it and `overlaps` have an order of their own
    overlaps: np.ndarray  # [R]

    @property
    def scores(self) -> dict[int, int]:
        """Images right by seed; a run that diverged is worse than any that did not."""
        right = dict(zip(self.seeds.tolist(), self.correct[:, -1].tolist(), strict=True))
        return right | dict.fromkeys(self.diverged, -1)


def main(argv: list[str] | None = None) -> None:
    """Report on one sweep; raises UserError."""
    default = Args(directory=tyro.MISSING)
    args = parse_args(default, argv, prog="python -m mlp_jax.report", description=DESCRIPTION)
    about = store.read_config(args.directory)
    if "seed" in about:
        raise UserError(f"{args.directory} holds a single run, which has no spread")
    recipe, config, fingerprint = about["recipe"], about["config"], about["fingerprint"]
    out = args.out or args.directory
    store.check_writable(out)
    processors = store.processors(args.directory, about)
    if not processors:
        raise UserError(f"{args.directory} holds no finished runs")

    # --help does without
    from mlp_jax.analysis.figures import figures
    from mlp_jax.data.dataset import load_dataset

    name = config["dataset"]
    dataset = load_dataset(name, args.data_dir)
    if dataset.fingerprint != fingerprint:
        raise UserError(
            f"{args.directory} was trained on other images than {name} holds here (SHA-256"
            f" {fingerprint[:12]}..., not {dataset.fingerprint[:12]}...)"
        )
    families = read_families(args.directory, dataset.test.labels, dataset.n_classes)
    summary = summarize(families, recipe, config, processors)
    store.make_directory(out / "figures")
    store.write_json(out / "summary.json", summary)
    print(table(summary), f"\n\n{out / 'summary.json'}", sep="")
    for name, figure in figures(families, summary, dataset.test.images):
        with store.replacing(out / "figures" / name) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        print(out / "figures" / name)


def prediction_blocks(directory: Path, vary: str, rate: float, seeds: np.ndarray) -> Iterator:
    """Predictions of a family's `seeds`, uint8 [some runs, n] a block, as the files have them."""
    for batch in store.read_batches(directory, ["predictions"]):
        names, rates, numbers = (
            batch[name].to_numpy(zero_copy_only=False) for name in store.ROW_ID
        )
        here = (names == vary) & (rates == rate) & np.isin(numbers, seeds)
        if here.any():
            yield store.predictions(batch["predictions"])[here]


def read_families(directory: Path, labels: np.ndarray, n_classes: int) -> list[Family]:
    """All families of a sweep, `all` first; raises UserError for rows that cannot be true."""
    from mlp_jax.analysis import stats

    histories = [f"{name}_by_epoch" for name in ("test_correct", "test_loss", "train_loss")]
    runs = store.read_runs(directory, [*histories, "seconds"])
    vary, rates, seeds, seconds = (runs[name].to_numpy() for name in (*store.ROW_ID, "seconds"))
    if len(set(zip(vary, rates, seeds, strict=True))) < len(runs):
        raise UserError(f"{directory} holds a run twice: remove one of the files that it is in")
    correct, *losses = (
        runs[name].combine_chunks().flatten().to_numpy().reshape(len(runs), -1)
        for name in histories
    )
    finite = np.isfinite(losses).all(axis=(0, 2))
    names, known = set(zip(vary, rates.tolist(), strict=True)), ("all", *STREAMS)
    families = []
    for name in sorted(names, key=lambda name: ([*known, name[0]].index(name[0]), *name)):
        here = (vary == name[0]) & (rates == name[1])
        kept = here & finite
        stream = (directory, *name, seeds[kept])
        counts = stats.count_predictions(prediction_blocks(*stream), labels, n_classes=n_classes)
        overlaps = stats.error_overlaps(prediction_blocks(*stream), counts)
        if sorted(counts.correct) != sorted(correct[kept, -1]):
            raise UserError(f"{directory}: some predictions do not give their row's test_correct")
        # rows lie in whatever order the files have, and a bootstrap draws them by position
        order = np.lexsort((overlaps, counts.correct_odd, counts.correct_even))
        even, odd = counts.correct_even[order], counts.correct_odd[order]
        counts = counts._replace(correct_even=even, correct_odd=odd)
        runs_of = (seeds[kept], correct[kept], seconds[kept], seeds[here & ~finite].tolist())
        families.append(Family(*name, *runs_of, counts, overlaps[order]))
    return families


def plain(value: Any) -> Any:
    """What JSON holds: NamedTuples become dicts, and nan null."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def summarize(
    families: list[Family], recipe: str, config: dict, processors: dict[str, int]
) -> dict:
    """summary.json: the families and, where learning rates share seeds, these in pairs."""
    from mlp_jax.analysis import stats

    pairs = []
    for a, b in itertools.combinations(families, 2):
        shared = sorted(a.scores.keys() & b.scores.keys())
        if a.vary == b.vary and len(shared) >= 2:
            sides = [([side.scores[seed] for seed in shared], side.rate) for side in (a, b)]
            (worse, low), (better, high) = sorted(sides, key=lambda side: sum(side[0]))
            names = {"vary": a.vary, "a": high, "b": low, "pairs": len(shared)}
            chance = stats.paired_improvement(better, worse)
            if len(shared) < stats.FEW_RUNS:  # a bootstrap of few pairs is too sure of itself
                chance = chance._replace(low=math.nan, high=math.nan)
            ruled = {"significant": chance.low > 0.5, "meaningful": chance.high > 0.75}
            pairs.append(names | {"probability": plain(chance)} | ruled)
    return {
        "recipe": recipe,
        **{name: config[name] for name in ("dataset", "epochs")},
        "processors": processors,
        "n_test": len(families[0].counts.labels),
        "units": "shares of 1; intervals at 95 %; diverged runs (seeds) are in no statistic, but"
        " lose in pairs of learning rates, whose intervals are not corrected for their number",
        "families": [describe(family, families, recipe, config) for family in families],
        "learning_rates": pairs,
    }


def describe(family: Family, families: list[Family], recipe: str, config: dict) -> dict:
    """A family's STATISTICS; None are those that its runs are too few for."""
    from mlp_jax.analysis import stats

    runs, n_test, counts = len(family.seeds), len(family.counts.labels), family.counts
    said: dict = {"vary": family.vary, "learning_rate": family.rate, "runs": runs}
    said |= {"diverged": family.diverged} | dict.fromkeys([*STATISTICS, "v_test", "v_ind"])
    correct = family.correct[:, -1]
    if runs:
        said["min"], said["max"] = int(correct.min()) / n_test, int(correct.max()) / n_test
        said["binomial_sd"] = stats.binomial_sd(float(correct.mean()) / n_test, n_test)
        said["vote_accuracy"] = stats.ensemble_correct(counts) / n_test
        said["seconds_a_run"] = float(family.seconds.mean())
    if runs >= 2:
        # of whole numbers: equal runs then have an SD of 0, not of a rounding error
        estimators = {"mean": stats.mean_interval, "sd": stats.sd_interval}
        estimators["interquartile_mean"] = stats.interquartile_mean
        for name, estimator in estimators.items():
            said[name] = stats.Interval(*(end / n_test for end in estimator(correct)))
        parts = stats.variance_parts(counts)
        said |= {"v_test": parts.test, "v_ind": parts.independent}
        said["independent_sd"] = math.sqrt(parts.independent)
        said["distribution_sd"] = stats.distribution_sd(counts, family.overlaps)
        said["halves_sd"] = float(stats.signed_sqrt(parts.halves))
        said |= stats.disagreement(counts)._asdict()
        said["runs_for_mean"] = stats.seeds_for_mean(said["sd"].estimate, 1e-4)
        said["runs_for_sd"] = stats.seeds_for_sd(0.05, stats.excess_kurtosis(correct))
        settings = config | {"learning_rate": family.rate}
        own = settings == json.loads(json.dumps(dataclasses.asdict(RECIPES[recipe])))
        if own and family.vary == "all" and recipe in REFERENCES:
            # counted in images, so that a run as good as the reference ties with it
            said["reference"] = REFERENCES[recipe][0] / 10_000
            right = REFERENCES[recipe][0] * n_test / 10_000
            said["share_below"], sd = stats.share_below(right, correct), correct.std(ddof=1)
            said["z"] = (right - correct.mean()) / sd if sd else None
        for other in families:
            whole = other.correct[:, -1]
            beside = other is not family and (other.vary, other.rate) == ("all", family.rate)
            if beside and len(set(whole)) > 1:
                ratio = stats.variance_ratio(correct, whole)
                said["sd_over_all"] = stats.Interval(*map(math.sqrt, ratio))
    if runs >= 3:
        said |= {f"{name}_sd": sd for name, sd in stats.predicted_sd(counts)._asdict().items()}
    return plain(said)


# a statistic's key in summary.json: its name, its unit and what it says in the field's terms
STATISTICS = {
    "mean": ("mean accuracy", "%", "over runs (Student's t)"),
    "interquartile_mean": ("interquartile mean", "%", "of the middle half of the runs (bootstrap)"),
    "min": ("lowest run", "%", ""),
    "max": ("highest run", "%", ""),
    "reference": ("reference", "%", "one number that {source} reports"),
    "share_below": ("  runs below it", "%", "(Jeffreys)"),
    "z": ("  its z", "", "SDs that it lies from the mean"),
    "sd": ("SD", "points", "of accuracy over runs, sqrt(V_test) (chi-square)"),
    "sd_over_all": ("  in times of all's", "", "while the seed decides this stream alone (F)"),
    "independent_sd": ("  independent errors", "points", "sqrt(V_ind): the finite test set's own"),
    "distribution_sd": ("  distribution-wise", "points", "on an endless test set (bootstrap)"),
    "halves_sd": ("  the same by halves", "points", "covariance of two halves of the test set"),
    "binomial_sd": ("  binomial", "points", "were all images equally hard"),
    "binary_sd": ("  calibrated, binary", "points", "foretold: sqrt(error / 2n)"),
    "k_class_sd": ("  calibrated, k classes", "points", "foretold, at least: sqrt(error / nk)"),
    "label_free_sd": ("  label-free", "points", "foretold from the votes alone"),
    "error": ("mean error", "%", "of a run, on an image"),
    "disagreement": ("disagreement", "%", "of two runs; calibrated: the mean error"),
    "calibration_error": ("calibration gap", "%", "CACE of the shares of votes"),
    "vote_accuracy": ("ensemble accuracy", "%", "by majority vote of all runs"),
    "runs_for_mean": ("runs needed", "runs", "for the mean to +/- 0.01 points"),
    "runs_for_sd": ("runs needed", "runs", "for the SD to 5 %"),
    "seconds_a_run": ("seconds a run", "s", "wall time of the sweep, divided by its runs"),
}
FORMATS = {"%": "{:.3%}", "points": "{:.4%}", "s": "{:.1f}", "runs": "{:,}", "": "{:.2f}"}


def shown(value: Any, unit: str) -> tuple[str, str]:
    """A value and the interval that it may have, as the table prints them; a dash for None."""
    if isinstance(value, dict):
        (estimate, _), (low, _), (high, _) = (shown(end, unit) for end in value.values())
        return estimate, "-" if low == "-" else f"{low} ... {high}"
    return "-" if value is None else FORMATS[unit].format(value).rstrip("%"), ""


def table(summary: dict) -> str:
    """The summary as it is read at a terminal."""
    lines = [
        "{recipe} on {dataset}: epochs {epochs}, test images {n_test:,}".format(**summary),
        "accuracies and errors in per cent, SDs in percentage points, intervals at 95 %",
    ]
    _, source = REFERENCES.get(summary["recipe"], (0, ""))
    for family in summary["families"]:
        lines.append("\nvary {vary}, learning rate {learning_rate:g}: {runs} runs".format(**family))
        if left_out := family["diverged"]:
            lines.append(f"  and {len(left_out)} that diverged, in no statistic: seeds {left_out}")
        for key, (name, unit, meaning) in STATISTICS.items():
            if family[key] is None and key in ("reference", "share_below", "z", "sd_over_all"):
                continue
            value, interval = shown(family[key], unit)
            meaning = meaning.format(source=source)
            lines.append(f"  {name:<24}{value:>8}  {interval:<19}  {meaning}".rstrip())
    for pair in summary["learning_rates"]:
        p, interval = shown(pair["probability"], "")
        lines.append(
            "\nvary {vary}, P(learning rate {a:g} beats {b:g})".format(**pair)
            + f" = {p} ({interval}), {pair['pairs']} seeds; significant: {pair['significant']},"
            f" meaningful: {pair['meaningful']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_front(main)
