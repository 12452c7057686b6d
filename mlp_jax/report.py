"""`python -m mlp_jax.report`: how much a sweep's test accuracy varies, and why.

A table, the same numbers as summary.json, and figures. Equal rows give equal bytes, in whichever
files they lie, and predictions are read as a stream: memory does not grow with them.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro

from mlp_jax import cli, files
from mlp_jax.errors import UserError
from mlp_jax.records import rows
from mlp_jax.records.directory import read_metadata
from mlp_jax.records.provenance import Metadata, check_same

DESCRIPTION = "Say how much the test accuracy of a sweep varies and why, in a table and figures."


@dataclasses.dataclass(frozen=True)
class Args:
    directory: tyro.conf.Positional[Path]
    """Directory of the sweep."""
    data_dir: Path | None = None
    """Where TFDS keeps its data; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    out: Path | None = None
    """Directory for summary.json and figures/; default: that of the sweep."""


def main(argv: list[str] | None = None) -> None:
    """Report on one sweep; raises UserError."""
    default = Args(directory=tyro.MISSING)
    args = cli.parse_args(default, argv, prog="python -m mlp_jax.report", description=DESCRIPTION)
    metadata, out = read_metadata(args.directory), args.out or args.directory
    if metadata.seed is not None:
        raise UserError(f"{args.directory} has a single run, which has no spread")
    files.check_writable(out)
    paths = rows.checked_files(args.directory)
    processors = count_processors(paths, metadata)

    # --help does without
    from mlp_jax.analysis.figures import figures
    from mlp_jax.analysis.summary import format_table, summarize
    from mlp_jax.data.dataset import check_dataset, load_dataset

    config = metadata.config
    dataset = load_dataset(config.dataset, args.data_dir, quiet=False, split=config.split)
    check_dataset(args.directory, metadata.fingerprint, metadata.images, dataset)
    try:
        families = read_families(paths, dataset.test.labels, dataset.n_classes)
    except UserError as error:
        raise UserError(f"{args.directory}: {error}") from None
    summary = summarize(families, metadata.recipe, metadata.config, processors)
    files.make_directory(out / "figures")
    files.write_json(out / "summary.json", summary)
    saved = [out / "summary.json"]
    for name, figure in figures(families, summary, dataset.test.images):
        saved.append(out / "figures" / name)
        with files.atomic_write(saved[-1]) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    print(format_table(summary), "", *saved, sep="\n")


def count_processors(paths: Sequence[Path], metadata: Metadata) -> dict[str, int]:
    """How many rows were trained on which processor; UserError for rows of another kind."""
    counts = collections.Counter()
    for path in paths:
        stored = rows.read_metadata(path)
        check_same(path, stored, metadata)
        name = "{processor}, {cores} cores, {device_kind}".format(**stored.environment)
        if stored.mixed:
            name += " (--allow-mixed)"
        counts[name] += rows.count_rows(path)
    return dict(counts)


def read_families(paths: Sequence[Path], labels: np.ndarray, n_classes: int) -> list:
    """The families of a sweep; UserError for rows that contradict themselves."""
    from mlp_jax.analysis.summary import make_families

    names = ("test_correct", "test_loss", "train_loss")
    table = rows.read_table(paths, [*(f"{name}_by_epoch" for name in names), "seconds"])
    columns = (table[f"{name}_by_epoch"].combine_chunks().flatten().to_numpy() for name in names)
    history = {n: c.reshape(len(table), -1) for n, c in zip(names, columns, strict=True)}
    read_predictions = functools.partial(rows.read_predictions, paths)
    finished = (rows.run_ids(table), history, table["seconds"].to_numpy())
    return make_families(*finished, read_predictions, labels, n_classes)


if __name__ == "__main__":
    cli.run_cli(main)
