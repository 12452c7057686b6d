"""`python -m mlp_jax.report`: how much a sweep's test accuracy varies, and why.

A table, the same numbers as summary.json, and figures; of a grid, a ranking of its sweeps.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from mlp_jax import cli, files
from mlp_jax.errors import UserError
from mlp_jax.records.directory import grid_cells, read_metadata

DESCRIPTION = (
    "Say how much the test accuracy of a sweep varies and why, in a table and figures; of a grid,"
    " rank its sweeps."
)


@dataclasses.dataclass(frozen=True)
class Args:
    directory: tyro.conf.Positional[Path]
    """Directory of the sweep, or of a grid."""
    data_dir: Path | None = None
    """Where TFDS keeps its data; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    out: Path | None = None
    """Directory for summary.json and figures/; default: that of the sweep."""


class Report(NamedTuple):
    """What a report says: at a terminal, in summary.json, and in figures by their file names."""

    text: str
    summary: dict
    figures: Iterator[tuple[str, Any]]


def main(argv: list[str] | None = None) -> None:
    """Report on a sweep or a grid; raises UserError."""
    default = Args(directory=tyro.MISSING)
    args = cli.parse_args(default, argv, prog="python -m mlp_jax.report", description=DESCRIPTION)
    out = args.out or args.directory
    cells = grid_cells(args.directory)
    if not cells and read_metadata(args.directory).seed is not None:
        raise UserError(f"{args.directory} has a single run, which has no spread")
    files.check_writable(out)
    report = report_grid(cells) if cells else report_sweep(args.directory, args.data_dir)
    files.make_directory(out / "figures")
    files.write_json(out / "summary.json", report.summary)
    saved = [out / "summary.json"]
    for name, figure in report.figures:
        saved.append(out / "figures" / name)
        with files.atomic_write(saved[-1]) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    print(report.text, "", *saved, sep="\n")


def report_sweep(directory: Path, data_dir: Path | None = None) -> Report:
    """The spread of one sweep; raises UserError."""
    # --help does without
    from mlp_jax.analysis.figures import figures
    from mlp_jax.analysis.summary import format_table, summarize
    from mlp_jax.results import open_results, read_blocks, read_families

    metadata, paths, dataset, processors = open_results(directory, data_dir)
    families = read_families(paths, dataset.test.labels, dataset.n_classes)
    blocks = {
        family.rate: read_blocks(paths, family, metadata.config)
        for family in families
        if family.vary == "crossed"
    }
    summary = summarize(families, metadata.recipe, metadata.config, processors, blocks)
    return Report(format_table(summary), summary, figures(families, summary, dataset.test.images))


def report_grid(cells: Sequence[Path]) -> Report:
    """The sweeps of a grid in the order of their means."""
    from mlp_jax.analysis.ranking import draw_ranking, format_ranking, rank
    from mlp_jax.records import rows

    tables = {}
    for cell in cells:
        paths = rows.checked_files(cell)
        table = rows.read_table(paths, ["test_correct", "test_loss", "train_loss"]).to_pydict()
        _, predictions = next(rows.read_predictions(paths))
        tables[cell.name] = table | {"n_test": predictions.shape[1]}
    summary = rank(tables)
    return Report(format_ranking(summary), summary, iter([("grid.png", draw_ranking(summary))]))


if __name__ == "__main__":
    cli.run_cli(main)
