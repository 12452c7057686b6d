"""How many pairs of runs `compare.decide` takes, and how often it is wrong.

    python scripts/decide_table.py --out results/decide.json

The runs of A and of B are drawn with replacement from the committed rows of one recipe, A's then
moved by the true difference; nothing is trained. The margin is the size that is asked for, and A
is truly better by it, or truly no better.
"""

import dataclasses
from pathlib import Path

import numpy as np
import tyro

import mlp_jax as mj
from mlp_jax.analysis.compare import Verdict, decide
from mlp_jax.files import write_json

RESULTS = Path(__file__).parents[1] / "results"
RECIPES = ("keras-sgd", "keras-rmsprop", "short")
SIZES = (0.1, 0.05, 0.02)  # points
N_TEST = 10_000


@dataclasses.dataclass(frozen=True)
class Args:
    out: Path
    """JSON file to write."""
    simulations: int = 1000
    """Comparisons of each kind."""
    budget: int = 16_384
    """Pairs after which a comparison is given up as undecided."""


def main(args: Args) -> None:
    record = {
        "command": "python scripts/decide_table.py --out results/decide.json"
        f" --simulations {args.simulations} --budget {args.budget}",
        "units": "points; pairs of runs",
        "numpy": np.__version__,
    }
    kinds = [(recipe, size, truth) for recipe in RECIPES for size in SIZES for truth in (size, 0)]
    rows = []
    for kind in kinds:
        rows.append(simulate(*kind, args.simulations, args.budget))
        print(rows[-1], flush=True)
    write_json(args.out, record | {"rows": rows})


def read_scores(recipe: str) -> np.ndarray:
    """Accuracies of the runs in which the seed decides everything, in points."""
    rows = mj.read_runs(RESULTS / recipe, ["test_correct"]).to_pylist()
    return np.array([100 * row["test_correct"] / N_TEST for row in rows if row["vary"] == "all"])


def simulate(recipe: str, size: float, truth: float, simulations: int, budget: int) -> dict:
    """Pairs until decided, with the margin `size`, where A is better by `truth`."""
    scores, right = read_scores(recipe), "better" if truth else "equivalent"
    found = [
        decide_one(
            np.random.default_rng([i, round(1000 * size), bool(truth)]), scores, size, truth, budget
        )
        for i in range(simulations)
    ]
    pairs = [pairs for _, pairs in found]
    verdicts = [verdict for verdict, _ in found]
    undecided = verdicts.count("undecided")
    return {
        "recipe": recipe,
        "sd": float(scores.std(ddof=1)),
        "margin": size,
        "true_difference": truth,
        "median_pairs": float(np.median(pairs)),
        "pairs_of_90_percent": float(np.percentile(pairs, 90)),
        "undecided": undecided,
        "wrong": simulations - undecided - verdicts.count(right),
        "simulations": simulations,
    }


def decide_one(
    rng: np.random.Generator, scores: np.ndarray, margin: float, truth: float, budget: int
) -> tuple[Verdict, int]:
    """The verdict and its number of pairs; more pairs are drawn only where fewer did not decide."""
    differences = np.zeros(0)
    while True:
        more = min(max(128, differences.size), budget - differences.size)
        a, b = rng.choice(scores, (2, more))
        differences = np.append(differences, a - b + truth)
        decision = decide(differences, margin=margin)
        if decision.verdict != "undecided" or differences.size == budget:
            return decision.verdict, decision.pairs


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
