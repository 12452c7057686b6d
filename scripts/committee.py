"""How accurate the runs of a sweep are together, by how many of them there are.

    python scripts/seed_sweep.py best-augmented
    python scripts/committee.py results/best-augmented --out results/committee-best-augmented.json

A committee names the class with the largest sum of probabilities. Its members are taken in random
orders: for each size, the mean and the central 95 % of the accuracies over these. Writes the curve,
a figure of it, and the members' probabilities, from which the curve can be computed again. Members
that are stored there stay in the committee when their weights are gone, so it may be trained on
several machines, one after another.
"""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

import mlp_jax as mj
from mlp_jax.analysis.figures import BLUE, GRAY, new_figure
from mlp_jax.analysis.stats import jeffreys
from mlp_jax.data.dataset import check_dataset
from mlp_jax.errors import UserError
from mlp_jax.files import atomic_write, save_figure, write_json
from mlp_jax.records.checkpoint import Committee, check_predictions, load_committee

ORDERS = 500
THOUSANDTHS = 1000


@dataclasses.dataclass(frozen=True)
class Args:
    directory: tyro.conf.Positional[Path]
    """Directory of a sweep with --keep-weights."""
    out: Path
    """File for the curve, as JSON; the figure and the members are put beside it."""
    data_dir: Path | None = None
    """Where TFDS keeps its data; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""


class Member(NamedTuple):
    """A run and what it says of the test images."""

    correct: int
    probabilities: np.ndarray  # uint16 [n, classes], in thousandths


def ask_members(committee: Committee, images: np.ndarray) -> dict[int, Member]:
    """The members whose weights are there, by seed."""
    probabilities = np.asarray(jax.nn.softmax(mj.predict(committee, images)), float)
    rounded = np.round(THOUSANDTHS * probabilities).astype(np.uint16)
    answers = zip(committee.runs, committee.metrics, rounded, strict=True)
    return {run.seed: Member(metrics["test_correct"], each) for run, metrics, each in answers}


def read_members(path: Path, origin: dict | None = None) -> dict[int, Member]:
    """The members stored at `path`, none if there is no file; UserError if of another `origin`."""
    if not path.exists():
        return {}
    table = pq.read_table(path)
    stored = json.loads(table.schema.metadata[b"origin"])
    if origin and stored != origin:
        raise UserError(f"{path} has members of other settings or data: name another --out")
    shape = (-1, stored["config"]["n_classes"])
    return {
        row["seed"]: Member(row["correct"], np.frombuffer(row["thousandths"], "<u2").reshape(shape))
        for row in table.to_pylist()
    }


def write_members(path: Path, members: dict[int, Member], origin: dict) -> None:
    columns = {
        "seed": [*members],
        "correct": [member.correct for member in members.values()],
        "thousandths": [
            member.probabilities.astype("<u2").tobytes() for member in members.values()
        ],
    }
    table = pa.table(columns).replace_schema_metadata({"origin": json.dumps(origin)})
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", compression_level=19)


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


def make_curve(members: dict[int, Member], labels: np.ndarray) -> dict:
    """The curve, and the accuracy of all members together, as fractions."""
    probabilities, n_test = np.stack([each.probabilities for each in members.values()]), len(labels)
    correct = count_correct(probabilities, labels, ORDERS)
    low, high = np.percentile(correct, (2.5, 97.5), axis=0)
    curve = zip(correct.mean(axis=0), low, high, strict=True)
    return {
        "seeds": [*members],
        "n_test": n_test,
        "correct_alone": [member.correct for member in members.values()],
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
    config = json.loads(json.dumps(dataclasses.asdict(config)))
    origin = {"config": config, "vary": committee.runs[0].vary, "data": dataset.fingerprint}
    path = args.out.with_suffix(".parquet")
    members = read_members(path, origin) | ask_members(committee, dataset.test.images)
    members = dict(sorted(members.items()))
    write_members(path, members, origin)
    command = shlex.join(["python", "scripts/committee.py", *sys.argv[1:]])
    record = {"command": command, "config": config, "backend": jax.default_backend()}
    record |= make_curve(members, dataset.test.labels)
    write_json(args.out, record)
    save_figure(args.out.with_suffix(".png"), draw(record, args.directory.name))
    print(f"{len(record['seeds'])} runs, alone {np.mean(record['correct_alone']):.1f} of", end=" ")
    print(f"{record['n_test']} on average; together {record['correct_together']}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
