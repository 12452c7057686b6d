"""`python -m mlp_jax.verify`: retrain some stored runs and compare them, as a reader would."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from mlp_jax import cli
from mlp_jax.errors import UserError
from mlp_jax.records import rows
from mlp_jax.records.directory import read_metadata
from mlp_jax.records.provenance import FORMER_NUMERICS, VERSIONS, check_one_sweep, differs_in_code

if TYPE_CHECKING:  # --help does without
    from mlp_jax.training.fit import Progress

TOLERANCES = {"train_loss": 0.03, "test_loss": 0.2}
"""Relative differences of the first epoch's losses allowed for other hardware or versions.

With other rounding (XLA's AVX2 code and fast math), four seeds differed by up to 4e-6 in the mean
training loss of keras-sgd, 9e-4 of keras-rmsprop and 1e-2 of short, and by up to 3e-5, 4e-2 and
4e-2 in the test loss. Later losses drift apart as far as those of two seeds.
"""


@dataclasses.dataclass(frozen=True)
class Args:
    """Retrain some runs of a directory and compare every stored number."""

    directory: tyro.conf.Positional[Path]
    """Directory of a run or a sweep."""
    rows: int = 3
    """How many stored runs to retrain, spread evenly over all of them."""
    teacher: cli.OptionalPath = None
    """The --teacher of the runs, if they had one."""
    data_dir: cli.OptionalPath = None
    """Where TFDS keeps its data; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""


def main(argv: list[str] | None = None) -> None:
    """Exit with status 1 if a run differs; raises UserError."""
    args = cli.parse_args(Args, argv, "python -m mlp_jax.verify")
    cli.check_at_least(args, {"rows": 1})
    metadata, paths = read_metadata(args.directory), rows.checked_files(args.directory)
    rows.check_unique(paths)
    for path in paths:
        check_one_sweep(path, rows.read_metadata(path), metadata)

    # --help does without
    from mlp_jax.data.dataset import check_dataset
    from mlp_jax.experiment import load_data
    from mlp_jax.machine import prepare
    from mlp_jax.training.arrays import for_dataset

    options = {"data_dir": args.data_dir, "quiet": False}
    dataset = load_data(metadata.config, teacher=args.teacher, **options)
    check_dataset(args.directory, metadata.fingerprint, metadata.images, dataset)
    if for_dataset(metadata.config, dataset).teacher != metadata.config.teacher:
        raise UserError(f"{args.directory} had no teacher: leave out --teacher {args.teacher}")
    machine = prepare(metadata, dataset, 1, devices=1, lanes=1).compile()
    ids = rows.run_ids(rows.read_table(paths, []))
    chosen = np.unique(np.linspace(0, len(ids) - 1, min(args.rows, len(ids))).round().astype(int))
    all_equal = True
    for run_id in (ids[i] for i in chosen):
        path, stored = rows.find_row(paths, run_id)
        *_, last = machine.train([run_id])
        there = rows.read_metadata(path)
        exact = same_machine(there.environment, machine.metadata.environment)
        edited = differs_in_code(there, machine.metadata)
        older = there.program is None
        equal, line = compare_rows(stored, last.progress, exact=exact or edited, older=older)
        if edited and not equal:
            line += ": trained with different training code"
        all_equal &= equal
        print("{}, learning rate {:.9g}, seed {}:".format(*run_id), line, flush=True)
    if not all_equal:
        sys.exit(1)


def same_machine(there: dict, here: dict) -> bool:
    """Whether equal bits are promised: the same processor, cores, versions and numerics."""
    there, here = FORMER_NUMERICS | there, FORMER_NUMERICS | here
    if "instructions" not in there:  # an older record; some EPYCs have AVX-512, and some have not
        there["instructions"] = None if "EPYC" in there["processor"] else here["instructions"]
    names = ("processor", "instructions", "cores", "device_kind", "prng", "matmul_precision")
    return all(there[name] == here[name] for name in (*names, *FORMER_NUMERICS)) and all(
        there["versions"][name] == here["versions"][name] for name in VERSIONS
    )


def compare_rows(
    stored: dict, progress: "Progress", *, exact: bool, older: bool = False
) -> tuple[bool, str]:
    """Whether a stored row and its retrained run are equal, and how they compare, in one line.

    `older` rows, which name no training code, have a mean training loss that was multiplied by 1/n
    instead of divided by n, and so may differ in its last bit.
    """
    correct = progress.history["test_correct"][0]
    (row,) = rows.make_rows(stored["recipe"], progress, stored["seconds"])
    if unknown := stored.keys() - row.keys():
        raise UserError(f"the stored rows have {min(unknown)}, which this code does not compute")
    # older rows have fewer columns; float32 numbers were stored as they were
    differing = {name for name in stored if not same_value(stored[name], row[name])}
    if not differing:
        return True, f"equal bit for bit, {correct[-1]} correct"
    if older and all(is_rounding(name, stored[name], row[name]) for name in differing):
        return True, f"equal but for the last bit of training losses, {correct[-1]} correct"
    first = {name: stored[f"{name}_by_epoch"][0] for name in TOLERANCES}
    drift = {name: abs(progress.history[name][0, 0] - first[name]) / first[name] for name in first}
    numbers = f"{stored['test_correct']} correct stored, {correct[-1]} now; in the first epoch the"
    numbers += " training loss differs by {train_loss:.1e}, the test loss by {test_loss:.1e}"
    numbers = numbers.format(**drift)
    if not exact and all(drift[name] <= most for name, most in TOLERANCES.items()):
        return True, f"equal within the tolerance for other hardware or versions ({numbers})"
    return False, f"DIFFERENT ({numbers})"


def same_value(stored: Any, now: Any) -> bool:
    """Whether two values of a row are equal, NaN included."""
    if isinstance(stored, str | bytes):
        return stored == now
    return np.array_equal(stored, now, equal_nan=True)


def is_rounding(name: str, stored: Any, now: Any) -> bool:
    """Whether two values are training losses that differ in a float32's last bit at most."""
    if not name.startswith("train_loss"):
        return False
    difference = np.abs(np.subtract(stored, now, dtype=np.float64))
    return bool(np.all(difference <= np.spacing(np.float32(now))))


if __name__ == "__main__":
    cli.run_cli(main)
