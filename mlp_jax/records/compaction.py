"""Merges the small Parquet files of a sweep; every row stays as it is.

A merge is one rename. A note beside the rows says which file will replace which: before the rename
the one does not exist, and after it the others are no longer read. Interrupted at any point, the
next merge cleans up.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from mlp_jax import files
from mlp_jax.records import rows

SIZE = 256  # runs in a merged file: what a damaged one costs


def compact(directory: Path) -> None:
    """Merge small files of one origin into files of SIZE runs or more.

    `directory` must be locked. UserError if it has no runs, and Damaged before anything is written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    finish_merge(directory)
    rows.check_unique(rows.checked_files(directory))
    for paths in list(_groups(directory)):
        table = pa.concat_tables([pq.read_table(path) for path in paths])
        table = table.sort_by([(name, "ascending") for name in rows.ROW_ID])
        merged, content = rows.encode(directory, table)
        names = {"into": merged.name, "merged": [path.name for path in paths]}
        files.write_signed_json(directory / rows.MERGE, names)
        with files.atomic_write(merged) as temporary:
            temporary.write_bytes(content)
        finish_merge(directory)


def _groups(directory: Path) -> Iterator[list[Path]]:
    """Files to merge: of the same metadata and columns, and together of at most 2 SIZE runs."""
    import pyarrow.parquet as pq

    groups: dict[bytes, list[Path]] = defaultdict(list)
    counts: dict[bytes, int] = defaultdict(int)
    for path in rows.checked_files(directory):
        if (count := rows.count_rows(path)) >= SIZE:
            continue
        origin = pq.read_schema(path).serialize().to_pybytes()
        groups[origin].append(path)
        counts[origin] += count
        if counts[origin] >= SIZE:
            yield groups.pop(origin)
            del counts[origin]
    yield from (paths for paths in groups.values() if len(paths) > 1)


def finish_merge(directory: Path) -> None:
    """Remove what an interrupted merge left, which other readers of Parquet would count twice."""
    merge = rows.read_merge(directory)
    into = directory / "runs" / merge.get("into", "")
    if merge:
        # if it is damaged, the files that it merged are still wanted
        intact = files.read_or_quarantine(rows.check_content, into)
        for name in merge["merged"] if intact else ():
            (directory / "runs" / name).unlink(missing_ok=True)
    (directory / rows.MERGE).unlink(missing_ok=True)
