"""Whether one set of runs scores higher than another: the difference A - B, and when it is decided.

Scores are accuracies as fractions, keyed by seed. Intervals are at 95 %: for a fixed number of
runs they hold for one look, the confidence sequence and the e-value for any number of looks.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from mlp_jax.analysis.stats import (
    HIGH,
    Interval,
    Z,
    brunner_munzel,
    paired_improvement,
    sd_of_rounding,
    welch,
)

ALPHA = 0.05
FIRST_LOOK = 30  # pairs before the sequence starts: it needs an SD
TUNED_FOR = 50  # pairs at which no other rho makes the sequence narrower

Verdict = Literal["better", "worse", "equivalent", "undecided"]


class Comparison(NamedTuple):
    """A against B; fields that need pairs, or predictions, are nan without them."""

    runs_a: int
    runs_b: int
    pairs: int  # shared seeds, if paired; 0 if all runs are treated as independent
    difference: Interval  # of means
    over_test_sets: Interval  # on all images, of which the test images are a sample
    p_value: float  # of no difference, two-sided
    correlation: float  # of the paired scores
    variance_ratio: float  # s_d^2 / (s_A^2 + s_B^2): below 1, pairing saves runs
    probability: Interval  # P(A > B)
    margin: float
    tost_p: float  # of a difference beyond the margin
    verdict: Verdict


class Decision(NamedTuple):
    """What the confidence sequence says, and after how many pairs it first did."""

    verdict: Verdict
    pairs: int
    difference: Interval
    sign_e_value: float  # against P(A > B) = 1/2: 20 or more rejects it at 5 %, whenever looked at


def compare(
    a: Mapping[int, float],
    b: Mapping[int, float],
    *,
    margin: float,
    sd_over_test_sets: float = math.nan,
    resolution: float = 0.0,
) -> Comparison:
    """A against B on their shared seeds, if at least half of the smaller side's are, else on all.

    Shared seeds: paired t and Jeffreys; all runs: Welch and Brunner-Munzel. Equivalence by two
    one-sided tests at 5 % (Schuirmann 1987, 10.1007/BF01068419). `sd_over_test_sets` is that of the
    difference, from `predictions.sd_over_test_sets`. `resolution` is the step between two possible
    accuracies, 1 / test images: an SD below that of rounding to it, as of two runs that happen to
    be equal, is not believed. ValueError for fewer than two runs.
    """
    shared = sorted(a.keys() & b.keys())
    if min(len(a), len(b)) < 2:
        raise ValueError("each side needs two runs")
    paired = len(shared) >= max(2, min(len(a), len(b)) / 2)
    x, y = (np.array([s[i] for i in (shared if paired else sorted(s))], float) for s in (a, b))
    correlation = ratio = math.nan
    error, df = welch(x, y, resolution=resolution)
    if paired:
        own = (x - y).var(ddof=1)
        if np.ptp(x) and np.ptp(y):
            correlation, ratio = np.corrcoef(x, y)[0, 1], own / (x.var(ddof=1) + y.var(ddof=1))
        own = max(own, 2 * sd_of_rounding(resolution) ** 2)
        error, df = math.sqrt(own / x.size), x.size - 1
    mean, half = float(x.mean() - y.mean()), float(stats.t.ppf(HIGH, df) * error)
    wider = math.hypot(half, Z * sd_over_test_sets)
    with np.errstate(divide="ignore", invalid="ignore"):  # equal runs: 0 / 0 is no difference
        t = np.divide([mean, mean + margin, mean - margin], error)
        t = np.where(np.isnan(t), 0, t)
    tost_p = max(stats.t.sf(t[1], df), stats.t.cdf(t[2], df))
    difference = Interval(mean, mean - half, mean + half)
    return Comparison(
        x.size,
        y.size,
        len(shared) if paired else 0,
        difference,
        Interval(mean, mean - wider, mean + wider),
        float(2 * stats.t.sf(abs(t[0]), df)),
        float(correlation),
        float(ratio),
        paired_improvement(x, y) if paired else brunner_munzel(x, y),
        margin,
        float(tost_p),
        _verdict(difference, equivalent=tost_p < ALPHA),
    )


def _verdict(difference: Interval, equivalent: bool) -> Verdict:
    if difference.low > 0:
        return "better"
    if difference.high < 0:
        return "worse"
    return "equivalent" if equivalent else "undecided"


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's adjusted p values: those below alpha keep the chance of one false claim below it."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(np.arange(p.size, 0, -1) * p[order]).clip(max=1)
    return adjusted[np.argsort(order)]


def sign_test(a: ArrayLike, b: ArrayLike) -> float:
    """Exact two-sided p value of P(A > B) = P(A < B); a[j], b[j] share a seed, ties dropped."""
    signs = np.sign(np.subtract(a, b, dtype=np.float64))
    wins, losses = int((signs > 0).sum()), int((signs < 0).sum())
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def confidence_sequence(
    differences: ArrayLike, *, resolution: float = 0.0
) -> tuple[NDArray, NDArray]:
    """Low and high ends after 1, 2, ... pairs, infinite before FIRST_LOOK; valid at all looks.

    `resolution` is that of `compare`: pairs that happen to be equal are not believed to stay so.
    Waudby-Smith et al., arXiv 2103.06476: Robbins' normal mixture, asymptotic in pairs. Ever wrong
    in 1,000 pairs: 3 to 4 % of the time for normal, heavy-tailed and equally skewed
    scores, 5 % where the differences have a skewness of 1, 8 % where they are exponential.
    """
    d = np.asarray(differences, np.float64)
    t = np.arange(1, d.size + 1)
    mean = d.cumsum() / t
    centred = d - d[:1]  # else small differences of large numbers
    squares = (centred**2).cumsum() - centred.cumsum() ** 2 / t
    sd = np.sqrt(squares.clip(min=0) / np.maximum(t - 1, 1))
    sd = np.maximum(sd, sd_of_rounding(resolution) * math.sqrt(2))
    rho2 = (-special.lambertw(-(ALPHA**2) / math.e, -1).real - 1) / TUNED_FOR
    grown = t * rho2 + 1
    half = sd * np.sqrt(2 * grown / (t**2 * rho2) * np.log(np.sqrt(grown) / ALPHA))
    half[: FIRST_LOOK - 1] = math.inf
    return mean - half, mean + half


def sign_e_values(differences: ArrayLike) -> NDArray[np.float64]:
    """E-value against P(A > B) = P(A < B) after 1, 2, ... pairs, ties dropped; exact at any look.

    2^(w + l) B(w + 1, l + 1) of w wins and l losses: a uniform mixture of likelihood ratios.
    """
    signs = np.sign(np.asarray(differences, np.float64))
    wins, losses = (signs > 0).cumsum(), (signs < 0).cumsum()
    log = (wins + losses) * math.log(2) + special.betaln(wins + 1, losses + 1)
    return np.exp(np.minimum(log, 700))  # a float64 ends at e^709


def decide(differences: ArrayLike, *, margin: float, resolution: float = 0.0) -> Decision:
    """The first verdict of the confidence sequence on differences A - B, in the order of pairs."""
    low, high = confidence_sequence(differences, resolution=resolution)
    equivalent = np.maximum(-low, high) < margin
    decided = (low > 0) | (high < 0) | equivalent
    at = int(decided.argmax()) if decided.any() else len(low) - 1
    mean, e_value = np.mean(np.asarray(differences)[: at + 1]), sign_e_values(differences)[at]
    difference = Interval(*map(float, (mean, low[at], high[at])))
    verdict = _verdict(difference, bool(equivalent[at]))
    if at + 1 < FIRST_LOOK:
        difference = difference._replace(low=math.nan, high=math.nan)
    return Decision(verdict, at + 1, difference, float(e_value))


def verdict_sentence(comparison: Comparison, a: str, b: str, *, scored: str = "test") -> str:
    """The verdict in one sentence, in percentage points; `scored` says on which images."""

    def points(interval: Interval) -> str:
        return "{:+z.3f} points ({:+z.3f} to {:+z.3f})".format(*(100 * end for end in interval))

    seeds, margin = f"{comparison.pairs} shared seeds", f"{100 * comparison.margin:g} points"
    if not comparison.pairs:
        seeds = f"{comparison.runs_a} and {comparison.runs_b} independent runs"
    verdict = {
        "better": f"{a} scores higher than {b}",
        "worse": f"{a} scores lower than {b}",
        "equivalent": f"{a} and {b} are equivalent within {margin}",
        "undecided": f"it is undecided whether {a} or {b} scores higher",
    }[comparison.verdict]
    if comparison.verdict in ("better", "worse") and comparison.tost_p < ALPHA:
        verdict += f", but by less than {margin}"
    chance = "{:.2f} ({:.2f} to {:.2f})".format(*comparison.probability)
    text = (
        f"On this {scored} set {verdict}: the difference is {points(comparison.difference)} over"
        f" {seeds}, and P({a} > {b}) is {chance}"
    )
    if not math.isnan(comparison.over_test_sets.low):
        text += f"; over all images like these, {points(comparison.over_test_sets)}"
    return text + "."
