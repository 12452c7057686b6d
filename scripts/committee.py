"""How accurate the runs of a sweep are together, by how many of them there are.

    python -m mlp_jax.sweep --recipe best-augmented --seeds 100:125 --keep-weights --out runs/best
    python scripts/committee.py runs/best --out results/committee-best-augmented.json

A committee names the class with the largest sum of probabilities. Its members are taken in random
orders: for each size, the mean and the central 95 % of the accuracies over these. Writes the curve
and a figure of it.
"""

import dataclasses
import shlex
import sys
from pathlib import Path

import jax
import numpy as np
import tyro

import mlp_jax as mj
from mlp_jax.analysis.figures import BLUE, GRAY, new_figure
from mlp_jax.analysis.stats import jeffreys
from mlp_jax.data.dataset import check_dataset
from mlp_jax.errors import UserError
from mlp_jax.files import save_figure, write_json
from mlp_jax.records.checkpoint import check_predictions, load_committee

ORDERS = 500


@dataclasses.dataclass(frozen=True)
class Args:
    directory: tyro.conf.Positional[Path]
    """Directory of a sweep with --keep-weights."""
    out: Path
    """File for the curve, as JSON; its figure is put beside it."""
    data_dir: Path | None = None
    """Where TFDS keeps its data; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""


def count_correct(probabilities: np.ndarray, labels: np.ndarray, orders: int) -> np.ndarray:
    """Correct images [orders, members] of committees that grow by one member at a time.

    `probabilities` are [members, n, classes]. The first order is that of the members.
    """
    rng, n_members = np.random.default_rng(0), len(probabilities)
    drawn = [np.arange(n_members), *(rng.permutation(n_members) for _ in range(orders - 1))]
    correct = np.empty((orders, n_members), int)
    for row, order in zip(correct, drawn, strict=True):
        total = np.zeros(probabilities.shape[1:])
        for i, member in enumerate(order):
            total += probabilities[member]
            row[i] = (total.argmax(axis=-1) == labels).sum()
    return correct


def make_record(committee, dataset) -> dict:
    """The curve, and the accuracy of all members together, as fractions."""
    logits = mj.predict(committee, dataset.test.images)
    probabilities = np.asarray(jax.nn.softmax(logits), float)
    labels, n_test = dataset.test.labels, len(dataset.test.labels)
    correct = count_correct(probabilities, labels, ORDERS)
    low, high = np.percentile(correct, (2.5, 97.5), axis=0)
    curve = zip(correct.mean(axis=0), low, high, strict=True)
    return {
        "config": dataclasses.asdict(committee.config),
        "seeds": [run.seed for run in committee.runs],
        "n_test": n_test,
        "backend": jax.default_backend(),
        "correct_alone": (logits.argmax(axis=-1) == labels).sum(axis=-1).tolist(),
        "correct_together": int(correct[0, -1]),
        "accuracy": jeffreys(int(correct[0, -1]), n_test)._asdict(),
        "orders": ORDERS,
        "by_members": [
            {"members": i, "mean": mean / n_test, "low": low / n_test, "high": high / n_test}
            for i, (mean, low, high) in enumerate(curve, 1)
        ],
    }


def draw(record: dict, name: str):
    """Accuracy by the number of members, with the central 95 % over which members these are."""
    together = 100 * record["correct_together"] / record["n_test"]
    title = f"Test accuracy by members, of {len(record['seeds'])} runs: {name}, {together:.2f} %"
    figure, ax = new_figure(f"{title} together, on {record['backend']}", 3.6)
    names = ("members", "mean", "low", "high")
    members, *shares = (np.array([each[key] for each in record["by_members"]]) for key in names)
    mean, low, high = (100 * share for share in shares)
    ax.fill_between(members, low, high, color=BLUE, alpha=0.2, linewidth=0)
    ax.plot(members, mean, "o-", ms=3, color=BLUE)
    ax.axhline(mean[0], color=GRAY, linewidth=0.5)
    ax.locator_params("x", integer=True)
    label = "members (band: the central 95 % over which runs these are)"
    ax.set(xlabel=label, ylabel=f"{record['config']['split']} accuracy (%)")
    return figure


def main(args: Args) -> None:
    if args.out.suffix != ".json":
        raise UserError(f"--out must end in .json, not {args.out}")
    committee = load_committee(args.directory)
    config = committee.config
    if len({(run.learning_rate, run.vary) for run in committee.runs}) > 1:
        raise UserError(f"{args.directory} has runs of several learning rates or families")
    dataset = mj.load_dataset(config.dataset, args.data_dir, split=config.split)
    check_dataset(args.directory, committee.fingerprint, committee.fingerprint, dataset)
    check_predictions(committee, dataset)
    command = shlex.join(["python", "scripts/committee.py", *sys.argv[1:]])
    record = {"command": command} | make_record(committee, dataset)
    write_json(args.out, record)
    save_figure(args.out.with_suffix(".png"), draw(record, args.directory.name))
    print(f"{len(record['seeds'])} runs, alone {np.mean(record['correct_alone']):.1f} of", end=" ")
    print(f"{record['n_test']} on average; together {record['correct_together']}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
