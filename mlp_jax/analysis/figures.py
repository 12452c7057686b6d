"""The figures of a report, drawn from its families and its summary.

Figure objects without pyplot, hence without global state, on a white background, in colours safe
for colour-blind readers, legible 900 pixels wide.
"""

import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlp_jax.analysis.predictions import signed_sqrt
from mlp_jax.training.config import RECIPES

BLUE, ORANGE, GRAY = "#0072B2", "#D55E00", "#767676"  # Okabe and Ito's, colour-blind safe


def new_figure(title: str, height: float, rows: int = 1, columns: int = 1) -> tuple:
    """A figure legible 900 pixels wide, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), layout="constrained")
    title = textwrap.fill(title, 84)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GRAY)
        ax.tick_params(color=GRAY, labelsize=9)
    return figure, *axes.flat


def add_legend(figure: Any, columns: int, *axes: Any) -> Any:
    handles = [handle for ax in axes for handle in ax.get_legend_handles_labels()[0]]
    style = {"loc": "outside lower left", "frameon": False, "fontsize": 9}
    for text in figure.legend(handles=handles, ncols=columns, **style).get_texts():
        text.set_parse_math(False)  # it may be the name of a directory
    return figure


def draw_intervals(ax: Any, intervals: Iterable, y: Any, color: str, **style: Any) -> None:
    """Shares with their intervals, drawn in per cent at the heights `y`."""
    x, low, high = 100 * np.array([*intervals], float).reshape(-1, 3).T
    ends = np.nan_to_num([x - low, high - x])  # of too few runs there is no interval
    style = {"fmt": "o", "capsize": 3, "elinewidth": 1.3, "ms": 5} | style
    ax.errorbar(x, y, xerr=ends, color=color, **style)


def show_images(axes: list, images: Iterable[np.ndarray], captions: list[str], cmap: str) -> None:
    """Images of 784 pixels above their captions; axes that are left over stay empty."""
    for ax, image, caption in itertools.zip_longest(axes, images, captions):
        if image is None:
            ax.set_axis_off()
            continue
        ax.imshow(image.reshape(28, 28), cmap=cmap, vmin=0, vmax=255)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set(visible=True, color="#DDDDDD")
        ax.set_xlabel(caption, fontsize=8, parse_math=False)


def figures(
    families: list, summary: dict, images: np.ndarray, crossed: Mapping[float, Any], title: str
) -> Iterator[tuple]:
    """File names and figures; the family `all` at the recipe's rate represents the sweep.

    `crossed` are Crossed indices by learning rate.
    """
    where = backends(summary)
    for rate, indices in crossed.items():
        if indices:
            name = "crossed.png" if len(crossed) == 1 else f"crossed-lr{rate:.9g}.png"
            yield name, draw_indices(indices, f"{title} on {where}")
    recipe = RECIPES.get(summary["recipe"])
    families = [family for family in families if family.vary != "crossed"]
    if not families:
        return
    both = list(zip(families, summary["families"], strict=True))
    family, statistics = max(
        both, key=lambda two: (two[0].vary == "all", recipe and two[0].rate == recipe.learning_rate)
    )
    name = f"{title}, {len(family.seeds)} runs on {where}"
    if len(families) > 1 or family.vary != "all":
        name += f" (vary {family.vary}, learning rate {family.rate:.9g})"
    if statistics["sd"]:
        yield "accuracy.png", draw_accuracy(family, statistics, name)
        if summary["epochs"] > 1:
            yield "epochs.png", draw_epochs(family, statistics, name)
    spreads = [each for each in summary["families"] if each["sd"]]
    if len(spreads) > 1:
        yield "sources.png", draw_sources(spreads, f"{title} on {where}")
    if family.counts.errors.any():
        yield "hardest.png", draw_hardest(family.counts, images, name)


def backends(summary: dict) -> str:
    """The kinds of device that trained the rows: the last part of each processor's name."""
    names = (name.removesuffix(" (--allow-mixed)") for name in summary["processors"])
    return " and ".join(sorted({name.rpartition(", ")[2] for name in names}))


def draw_run(lines: list[dict], name: str) -> Any:
    """Losses and test accuracy of one run by epoch, from the objects in metrics.jsonl."""
    figure, left, right = new_figure(f"One run: {name}", 3.6, 1, 2)
    epochs = [line["epoch"] for line in lines]
    style = {"marker": "o", "ms": 3} if len(lines) < 30 else {}
    of_losses = [(left, "train_loss", 1, BLUE), (left, "test_loss", 1, ORANGE)]
    for ax, key, unit, color in [*of_losses, (right, "test_accuracy", 100, BLUE)]:
        values = unit * np.array([line[key] for line in lines], float)  # null: not finite
        ax.plot(epochs, values, color=color, label=key.replace("_", " "), **style)
        ax.locator_params("x", integer=True)
        ax.set_xlabel("epoch")
    left.set_ylabel("loss")
    right.set_ylabel("test accuracy (%)")
    return add_legend(figure, 2, left)


def bin_edges(correct: np.ndarray, width: int) -> np.ndarray:
    """Edges of bins of `width` whole images, each halfway between two counts."""
    return np.arange(correct.min(), correct.max() + width + 1, width) - 0.5


def draw_accuracy(family: Any, statistics: dict, name: str) -> Any:
    """Histogram of test accuracy, with normal curves of the observed and the binomial SD."""
    correct, n_test = family.correct, len(family.counts.labels)
    mean, sd = (statistics[name]["estimate"] for name in ("mean", "sd"))
    binomial = statistics["binomial_sd"]
    figure, ax = new_figure(f"Test accuracy: {name}", 4)
    # whole images per bin, and finer than Scott's rule (3.5): the curve shows the smooth shape
    width = max(1, round(2 * sd * n_test / len(correct) ** (1 / 3)))
    edges = bin_edges(correct, width)
    bars = {"color": "#A9CDE5", "edgecolor": "white", "linewidth": 0.5}
    ax.hist(100 * correct / n_test, 100 * edges / n_test, label="runs", **bars)
    x = mean + np.linspace(-3.3, 3.3, 400) * max(sd, binomial)
    curves = [(sd, BLUE, "-", "observed"), (binomial, GRAY, "--", "binomial")]
    for spread, color, line, kind in [curve for curve in curves if curve[0]]:
        density = np.exp(-(((x - mean) / spread) ** 2) / 2) / (spread * math.sqrt(2 * math.pi))
        label = f"normal of the {kind} SD, {100 * spread:.3f} points"
        ax.plot(100 * x, density * len(correct) * width / n_test, line, color=color, label=label)
    ax.axvline(100 * mean, color="black", lw=1, label=f"mean, {100 * mean:.2f} %")
    if reference := statistics["reference"]:
        ax.axvline(100 * reference, color=ORANGE, label=f"reference, {100 * reference:.2f} %")
    ax.locator_params("y", integer=True)
    ax.set_xlim(right=min(ax.get_xlim()[1], 100))
    images = f"{width} image{'s' * (width > 1)}"
    ax.set(xlabel="test accuracy (%)", ylabel=f"runs in each bin of {images}")
    return add_legend(figure, 2, ax)


def draw_epochs(family: Any, statistics: dict, name: str) -> Any:
    """Test accuracy by epoch: all epochs, and the later half alone."""
    epochs = len(family.by_epoch)
    low, p5, median, p95, high = 100 * family.by_epoch.T / len(family.counts.labels)
    starts = [1, epochs // 2] if epochs >= 6 else [1]
    figure, *axes = new_figure(f"Test accuracy by epoch: {name}", 3.8, 1, len(starts))
    for ax, start in zip(axes, starts, strict=True):
        x, late = np.arange(start, epochs + 1), slice(start - 1, None)
        ax.fill_between(x, low[late], high[late], color="#D5E7F2", lw=0, label="lowest to highest")
        ax.fill_between(x, p5[late], p95[late], color="#93C1E0", lw=0, label="5 to 95 % of runs")
        ax.plot(x, median[late], color=BLUE, label="median")
        if reference := statistics["reference"]:
            label = f"reference, {100 * reference:.2f} %"
            ax.axhline(100 * reference, color=ORANGE, lw=1, label=label)
        ax.locator_params("x", integer=True)
        ax.set_xlabel("epoch")
    axes[0].set_ylabel("test accuracy (%)")
    return add_legend(figure, 4, axes[0])


def draw_sources(spreads: list[dict], name: str) -> Any:
    """SD of accuracy by what the seed decides, on this test set and on an infinite one."""
    title = f"Spread of test accuracy by what the seed decides: {name}"
    figure, ax = new_figure(title, 1.5 + 0.6 * len(spreads))
    for key, color, marker, shift, label in (
        ("sd", BLUE, "o", -0.14, "SD on this test set"),
        ("distribution_sd", ORANGE, "D", 0.14, "distribution-wise SD (sign of its variance)"),
    ):
        intervals = [list(each[key].values()) for each in spreads]
        y = np.arange(len(spreads)) + shift
        draw_intervals(ax, intervals, y, color, fmt=marker, label=label)
    many = len({each["learning_rate"] for each in spreads}) > 1
    name = "{vary}" + ", rate {learning_rate:.9g}" * many + "\n{runs} runs"
    ax.set_yticks(range(len(spreads)), [name.format(**each) for each in spreads])
    ax.set(ylim=(len(spreads) - 0.5, -0.5), xlabel="SD (percentage points), 95 % intervals")
    ax.axvline(0, color=GRAY, lw=0.8)
    return add_legend(figure, 2, ax)


def draw_indices(crossed: Any, name: str) -> Any:
    """First-order and total indices of each stream: a Crossed of `crossed_indices`."""
    streams, blocks = list(crossed.test.total), crossed.test.blocks
    title = f"What makes test accuracy vary: {name}, {blocks} blocks of {2 ** len(streams)} runs"
    height = 2.2 + 0.5 * len(streams)
    figure, *axes = new_figure(title, height, 1, 2)
    for ax, of, where in zip(axes, crossed, ("this", "an infinite"), strict=True):
        first = [of.indices[stream] for stream in streams]
        rows, last = np.arange(len(streams)), [len(streams)]
        for shares, color, marker, y, label in (
            (first, BLUE, "o", rows - 0.14, "first-order: removed by fixing this stream alone"),
            (of.total.values(), ORANGE, "D", rows + 0.14, "total: left if all others are fixed"),
            ([of.interactions], "black", "s", last, "interactions: of no single stream"),
        ):
            draw_intervals(ax, shares, y, color, fmt=marker, label=label)
        ax.set_yticks(range(len(streams) + 1), [*streams, "interactions"] if ax is axes[0] else [])
        sd = 100 * float(signed_sqrt(of.variance.estimate))
        label = f"% of the variance on {where} test set\n(SD {sd:.3f} points), 95 % intervals"
        ax.set(ylim=(len(streams) + 0.5, -0.5), xlabel=label)
        for share in (0, 100):
            ax.axvline(share, color=GRAY, lw=0.8)
    axes[0].sharex(axes[1])
    return add_legend(figure, 1, axes[0])


def draw_comparison(a: Any, b: Any, comparison: Any, names: tuple[str, str], n_test: int) -> Any:
    """The accuracies [R] of A and B on `n_test` images, and their Comparison beside its margin."""
    runs = f"{comparison.runs_a} and {comparison.runs_b} independent runs"
    kind = f"{comparison.pairs} shared seeds" if comparison.pairs else runs
    title = f"A against B: {comparison.verdict}, {kind}"
    figure, left, right = new_figure(title, 3.6, 1, 2)
    correct = np.rint(n_test * np.concatenate([a, b]))
    edges = 100 / n_test * bin_edges(correct, math.ceil(max(1, np.ptp(correct) / 30)))
    for scores, color, name in ((a, BLUE, f"A: {names[0]}"), (b, ORANGE, f"B: {names[1]}")):
        left.hist(100 * np.asarray(scores), edges, color=color, alpha=0.45, label=name)
        left.axvline(100 * np.mean(scores), color=color, lw=1.5)
    left.locator_params("y", integer=True)
    left.set(xlabel="test accuracy (%), lines: means", ylabel="runs")
    margin = 100 * comparison.margin
    right.axvspan(-margin, margin, color="#E5E5E5", lw=0, label=f"margin, {margin:g} points")
    right.axvline(0, color=GRAY, lw=0.8)
    intervals = (comparison.difference, comparison.over_test_sets)
    draw_intervals(right, intervals, range(2), "black")
    right.set_yticks(range(2), ["these\ntest images", "all such\nimages"])
    right.locator_params("x", nbins=5)
    label = "difference A - B (points), 95 % intervals"
    right.set(ylim=(1.5, -0.5), xlabel=label)
    return add_legend(figure, 1, left, right)  # long names


def draw_hardest(counts: Any, images: np.ndarray, name: str) -> Any:
    """The 24 images most often wrong: their label, what they are taken for, how often."""
    wrong = counts.classes.copy()
    wrong[np.arange(len(images)), counts.labels] = 0
    arrow, errors = "\N{RIGHTWARDS ARROW}", counts.errors
    figure, *axes = new_figure(f"Most often wrong, label {arrow} taken for: {name}", 3.7, 3, 8)
    hardest = np.argsort(-errors, kind="stable")[: min(len(axes), np.count_nonzero(errors))]
    captions = [
        f"{counts.labels[i]} {arrow} {wrong[i].argmax()}  {100 * errors[i] / counts.runs:.0f} %"
        for i in hardest
    ]
    show_images(axes, images[hardest], captions, "gray_r")
    return figure


def draw_digits(images: Sequence[np.ndarray], captions: list[str]) -> Any:
    """Images [28, 28] as the network saw them, eight to a row, each above its caption."""
    rows = -(-len(images) // 8)
    figure, *axes = new_figure("What the network saw", 0.5 + 1.25 * rows, rows, 8)
    show_images(axes, images, captions, "gray")
    return figure
