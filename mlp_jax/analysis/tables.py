"""A report at a terminal: names and units of the statistics, and their tables."""

from typing import Any

from mlp_jax.analysis.predictions import signed_sqrt
from mlp_jax.training.config import REFERENCES

# key in summary.json: name, unit and meaning
STATISTICS = {
    "mean": ("mean accuracy", "%", "over runs (Student's t)"),
    "over_test_sets": ("  sampling of images", "points", "+-, over all images like these"),
    "interquartile_mean": ("interquartile mean", "%", "of the middle half of the runs (bootstrap)"),
    "min": ("lowest run", "%", ""),
    "max": ("highest run", "%", ""),
    "reference": ("reference", "%", "a single number, reported by {source}"),
    "runs_below": ("  runs below it", "runs", ""),
    "runs_equal": ("  runs equal to it", "runs", ""),
    "runs_above": ("  runs above it", "runs", ""),
    "share_below": ("  share below it", "%", "ties count one half (Jeffreys)"),
    "z": ("  its z", "", "SDs from the mean"),
    "sd": ("SD", "points", "of accuracy over runs, sqrt(V_test) (chi-square)"),
    "sd_over_all": ("  relative to vary=all", "", "where only this stream varies (F)"),
    "independent_sd": ("  independent errors", "points", "sqrt(V_ind): of the finite test set"),
    "distribution_sd": (
        "  distribution-wise",
        "points",
        "on an infinite test set (over runs and images)",
    ),
    "halves_sd": ("  the same by halves", "points", "covariance of two halves of the test set"),
    "binomial_sd": ("  binomial", "points", "if all images were equally hard"),
    "binary_sd": ("  if calibrated: binary", "points", "sqrt(error / 2n), of independent errors"),
    "k_class_sd": ("  if calibrated: k-class", "points", "at least sqrt(error / nk), likewise"),
    "label_free_sd": ("  label-free", "points", "independent errors, predicted from the votes"),
    "error": ("mean error", "%", "error rate of a run"),
    "disagreement": ("disagreement", "%", "of two runs; calibrated: the mean error"),
    "calibration_error": ("calibration gap", "%", "CACE of the shares of votes"),
    "vote_accuracy": ("ensemble accuracy", "%", "by majority vote of all {runs}"),
    "runs_for_mean": ("runs needed for mean", "runs", "for the mean to +/- 0.01 points"),
    "runs_for_sd": ("runs needed for SD", "runs", "for the SD to +/- 5 %"),
    "seconds_a_run": ("seconds per run", "s", "wall time of the sweep, divided by its runs"),
}
# omitted without a reference, or without another family
OPTIONAL = ("reference", "runs_below", "runs_equal", "runs_above", "share_below", "z")
OPTIONAL += ("sd_over_all",)


FORMATS = {"%": "{:.3%}", "points": "{:z.4%}", "s": "{:.1f}", "runs": "{:,}", "": "{:.2f}"}


def format_value(value: Any, unit: str) -> tuple[str, str]:
    """A value and its interval, if any, as the table prints them; a dash for None."""
    if isinstance(value, dict):
        (estimate, _), (low, _), (high, _) = (format_value(end, unit) for end in value.values())
        return estimate, "-" if low == "-" else f"{low} ... {high}"
    return "-" if value is None else FORMATS[unit].format(value).rstrip("%"), ""


def statistic_rows(family: dict, recipe: str) -> list[tuple[str, str, str, str, str]]:
    """Name, value, interval, unit and meaning of each of a family's statistics."""
    _, source = REFERENCES.get(recipe, (0, ""))
    rows = []
    for key, (name, unit, meaning) in STATISTICS.items():
        if family[key] is not None or key not in OPTIONAL:
            meaning = meaning.format(source=source, runs=family["runs"])
            rows.append((name, *format_value(family[key], unit), unit, meaning))
    return rows


def format_table(summary: dict) -> str:
    lines = [
        "{recipe} on {dataset}: epochs {epochs}, {split} images {n_test:,}".format(**summary),
        "accuracies and errors in per cent, SDs in percentage points, intervals at 95 %",
    ]
    if marked := [name for name in summary["processors"] if "--allow-mixed" in name]:
        n_mixed = sum(summary["processors"][name] for name in marked)
        lines.append(f"{n_mixed} runs were pooled with others by --allow-mixed: see their files")
    for family in summary["families"]:
        name = "vary {vary}, learning rate {learning_rate:.9g}: {runs} runs"
        lines.append("\n" + name.format(**family))
        if left_out := family["diverged"]:
            n = len(left_out)
            lines.append(f"  and {n} that diverged, excluded from all statistics: seeds {left_out}")
        for name, value, interval, _, meaning in statistic_rows(family, summary["recipe"]):
            lines.append(f"  {name:<24}{value:>8}  {interval:<19}  {meaning}".rstrip())
    for crossed in summary.get("crossed", []):
        lines += format_crossed(crossed)
    for pair in summary["learning_rates"]:
        p, interval = format_value(pair["probability"], "")
        lines.append(
            "\nvary {vary}, P(learning rate {a:.9g} beats {b:.9g})".format(**pair)
            + f" = {p} ({interval}), {pair['pairs']} seeds: "
            + ("" if pair["significant"] else "not ")
            + f"significant (sign test, Holm's p {pair['p_holm']:.2g})"
        )
    return "\n".join(lines)


def format_crossed(crossed: dict) -> list[str]:
    """Lines on a crossed family: the SD, and each stream's share of the variance."""
    lines = ["\ncrossed streams, learning rate {learning_rate:.9g}: {runs} runs".format(**crossed)]
    if left := crossed["runs_in_broken_blocks"] + len(crossed["diverged"]):
        lines[0] += f"; {left} more are in blocks that are not finished, or diverged"
    if (of := crossed.get("test")) and of["variance"]["low"] is None:
        lines[0] += "; too few blocks for intervals"
    for key, meaning in (("test", "on this test set"), ("distribution", "on an infinite one")):
        if indices := crossed.get(key):
            variance = indices["variance"].items()  # its ends are None where there are few blocks
            sd = {end: None if v is None else float(signed_sqrt(v)) for end, v in variance}
            value, interval = format_value(sd, "points")
            lines.append(f"  SD {meaning:<21}{value:>8}  {interval}")
            for name in crossed["streams"]:
                first, total = (indices[kind][name] for kind in ("indices", "total"))
                shares = ("{:>6} {:<16}".format(*format_value(s, "")) for s in (first, total))
                lines.append("    {:<10}first-order {}  total {}".format(name, *shares).rstrip())
            value, interval = format_value(indices["interactions"], "")
            lines.append(f"    interactions          {value:>6} {interval}")
    return lines
