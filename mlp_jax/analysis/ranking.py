"""Which sweep of a grid scores highest, with simultaneous intervals."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlp_jax.analysis.compare import ALPHA
from mlp_jax.analysis.figures import BLUE, draw_intervals, new_figure
from mlp_jax.analysis.stats import Interval, mean_interval
from mlp_jax.analysis.summary import to_json
from mlp_jax.analysis.tables import format_value


def rank(cells: Mapping[str, Mapping[tuple[str, float, int], float]], *, resolution: float) -> dict:
    """Mean accuracy of each cell and learning rate, highest first.

    A cell maps (vary, learning rate, seed) to accuracy, nan for a run that diverged. Runs that
    vary one stream, or cross them, are left out. Intervals are Student's at 1 - ALPHA / m of m
    means (Bonferroni), None below two runs; `resolution` is that of `mean_interval`.
    """
    scores: dict[tuple[str, float], list[float]] = {}
    for name, cell in cells.items():
        for (vary, rate, _), score in cell.items():
            if vary == "all":
                scores.setdefault((name, rate), []).append(score)
    ranked = []
    for (name, rate), values in scores.items():
        kept = np.array(values)[np.isfinite(values)]
        cell = {"settings": name, "learning_rate": rate, "runs": kept.size}
        cell["diverged"] = len(values) - kept.size
        if kept.size > 1:
            tail = ALPHA / len(scores) / 2
            cell["mean"] = mean_interval(kept, tail=tail, resolution=resolution)
            cell["sd"] = float(kept.std(ddof=1)) if np.ptp(kept) else 0.0  # not a rounding error
        else:
            cell["mean"] = Interval(kept.item() if kept.size else math.nan, math.nan, math.nan)
            cell["sd"] = None
        ranked.append(to_json(cell))
    ranked.sort(key=lambda cell: -round(cell["mean"]["estimate"] or 0, 9))  # equal: as they came
    return {
        "units": f"fractions (0 to 1); intervals hold for all {len(ranked)} means at once at 95 %"
        " (Bonferroni)",
        "cells": ranked,
        "not_ranked": sorted(cells.keys() - {name for name, _ in scores}),
    }


def format_ranking(summary: dict) -> str:
    lines = [f"accuracy in per cent; intervals hold for all {len(summary['cells'])} means at once"]
    for cell in summary["cells"]:
        mean, interval = format_value(cell["mean"], "%")
        runs = f"{cell['runs']} runs" + f", {cell['diverged']} diverged" * bool(cell["diverged"])
        settings = f"{cell['settings']}, learning rate {cell['learning_rate']:.9g}"
        lines.append(f"{mean:>8}  {interval:<19}  {settings}: {runs}")
    if left_out := summary["not_ranked"]:
        lines.append(f"not ranked (no finished runs with vary=all): {'; '.join(left_out)}")
    return "\n".join(lines)


def draw_ranking(summary: dict, name: str) -> Any:
    """Means and their intervals, highest first."""
    cells = [cell for cell in summary["cells"] if cell["mean"]["estimate"] is not None]
    title = f"Accuracy by setting, 95 % intervals for all at once: {name}"
    figure, ax = new_figure(title, 1.2 + 0.4 * len(cells))
    means = [list(cell["mean"].values()) for cell in cells]
    draw_intervals(ax, means, range(len(cells)), BLUE)
    names = ["{settings}, rate {learning_rate:.9g}, n = {runs}".format(**cell) for cell in cells]
    ax.set_yticks(range(len(cells)), names, parse_math=False)
    ax.set(ylim=(len(cells) - 0.5, -0.5), xlabel="accuracy (%)")
    return figure
