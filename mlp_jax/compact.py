"""`python -m mlp_jax.compact`: merges the many small files of a sweep; every row stays as it is."""

import dataclasses
from pathlib import Path

import tyro

from mlp_jax import cli, files
from mlp_jax.records import rows
from mlp_jax.records.compaction import compact
from mlp_jax.records.directory import grid_cells, read_metadata


@dataclasses.dataclass(frozen=True)
class Args:
    """Merge the many small files of a sweep into few; every row stays as it is."""

    directory: tyro.conf.Positional[Path]
    """Directory of the sweep, or of a grid."""


def main(argv: list[str] | None = None) -> None:
    """Merge the files of a sweep; raises UserError."""
    args = cli.parse_args(Args, argv, "python -m mlp_jax.compact")
    for directory in grid_cells(args.directory) or [args.directory]:
        read_metadata(directory)  # nothing is created where there are no results
        files.check_writable(directory)
        with files.locked(directory):
            if not (before := len(rows.row_files(directory))):
                continue  # of a grid that has just begun
            compact(directory)
            after = len(rows.row_files(directory))
        print(f"{directory}: {before:,} files are now {after:,}")


if __name__ == "__main__":
    cli.run_cli(main)
