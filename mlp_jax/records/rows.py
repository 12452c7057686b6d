"""The rows of finished runs, in Parquet: the one place that makes, writes and reads them.

A file holds complete rows and is named after its first run and its SHA-256; its schema carries the
metadata of the process that trained them. A file named otherwise is not ours.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlp_jax.errors import UserError
from mlp_jax.files import Damaged, atomic_write, expand, log, read_or_quarantine, read_signed_json
from mlp_jax.records.provenance import Metadata, check_one_sweep, check_same
from mlp_jax.training.run import Run

if TYPE_CHECKING:  # reading does without jax
    from mlp_jax.training.fit import Progress

LOSSES = ("test_loss", "train_loss")

ROW_ID = Run._fields
"""The columns that identify a row of a sweep."""

READ_ROWS = 255  # whose predictions are in memory at a time: what predictions.py counts at once

MERGE = ".mlp_jax-merge.json"
"""While `compact` runs: the file that it writes, and those that it will remove."""

OUR_NAME = re.compile(r"[a-z]+-lr[0-9.e+-]+-seed\d+-[0-9a-f]{16}\.parquet")


def make_rows(recipe: str, progress: "Progress", seconds: float) -> list[dict]:
    """A row per run: each metric after the last epoch and by epoch, and the predictions as bytes.

    `seconds` is the wall time of a run: an equal share for each of those that trained together.
    """
    rows = []
    for i, run in enumerate(progress.runs):
        row = {"recipe": recipe, "vary": run.vary, "seed": np.uint32(run.seed)}
        row |= {"learning_rate": run.learning_rate}
        row |= {f"{stream}_seed": np.uint32(seed) for stream, seed in run.seeds._asdict().items()}
        row |= {name: values[i, -1] for name, values in progress.history.items()}
        row |= {f"{name}_by_epoch": values[i] for name, values in progress.history.items()}
        # one byte per test image, in the order of the data set
        rows.append(row | {"predictions": progress.predictions[i].tobytes(), "seconds": seconds})
    return rows


def last_values(row: dict) -> dict[str, float]:
    """The metrics after the last epoch, the seconds, and whether all losses of a row are finite."""
    names = [name for name in row if f"{name}_by_epoch" in row]
    values = {name: row[name].item() for name in names} | {"seconds": row["seconds"]}
    finite = finite_runs(*(row[f"{name}_by_epoch"][None] for name in LOSSES))
    return values | {"finite": finite.item()}


def by_epoch(table, name: str) -> np.ndarray:
    """A metric [runs, epochs] of a table or batch."""
    import pyarrow.compute as pc

    return pc.list_flatten(table[f"{name}_by_epoch"]).to_numpy().reshape(len(table), -1)


def histories(table) -> dict[str, np.ndarray]:
    """All metrics by epoch, [runs, epochs]."""
    columns = table.column_names
    return {name: by_epoch(table, name) for name in columns if f"{name}_by_epoch" in columns}


def finite_runs(*losses: np.ndarray) -> np.ndarray:
    """Which runs did not diverge: bool [runs], of losses [runs, epochs] that are all finite."""
    return np.all(np.isfinite(losses), axis=(0, 2))


def write_rows(directory: Path, rows: list[dict], metadata: Metadata) -> Path:
    """Write rows of `make_rows` to one Parquet file."""
    import pyarrow as pa

    about = {"about": json.dumps(metadata.to_json())}
    path, content = encode(directory, pa.Table.from_pylist(rows).replace_schema_metadata(about))
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    return path


def encode(directory: Path, table) -> tuple[Path, Any]:
    """The Parquet file of some rows, a pyarrow.Table: where it belongs, and its content."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = pa.BufferOutputStream()
    # neighbours predict nearly the same, which zstd's window sees and a dictionary does not
    options = {"compression": "zstd", "compression_level": 9, "use_dictionary": ["recipe", "vary"]}
    pq.write_table(table, content, **options)
    content = content.getvalue()
    vary, rate, seed = (table[name][0].as_py() for name in ROW_ID)
    name = f"{vary}-lr{rate:.9g}-seed{seed}-{_name_digest(content)}.parquet"
    return directory / "runs" / name, content


def _name_digest(content) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def row_files(directory: Path) -> list[Path]:
    """The Parquet files that mlp_jax wrote and has not merged; warns of others."""
    while True:  # until no `compact` changed anything while the directory was listed
        merge, files = read_merge(directory), _listed(directory)
        ended = merge and (directory / "runs" / merge["into"]).exists()
        names = {path.name for path in files}
        stable = (merge, files) == (read_merge(directory), _listed(directory))
        if stable and (not ended or merge["into"] in names):
            break
    for path in files:
        if not OUR_NAME.fullmatch(path.name):
            log.warning("%s is ignored: not a name that mlp_jax gives", path)
    merged = merge["merged"] if ended else []
    return [path for path in files if OUR_NAME.fullmatch(path.name) and path.name not in merged]


def _listed(directory: Path) -> list[Path]:
    return sorted((directory / "runs").glob("[!_]*.parquet"))  # _ marks those in quarantine


def read_merge(directory: Path) -> dict:
    """The merge that `compact` noted: files `merged` go `into` another; empty if there is none."""
    try:
        return read_signed_json(directory / MERGE)
    except (FileNotFoundError, Damaged):
        return {}


def check_content(path: Path) -> bool:
    """True; raises Damaged if a Parquet file does not match the SHA-256 in its name."""
    if _name_digest(path.read_bytes()) != path.stem[-16:]:
        raise Damaged(path, "its SHA-256 differs")
    return True


def read_metadata(path: Path) -> Metadata:
    """Metadata of the process that trained the rows of a Parquet file; UserError if not ours."""
    import pyarrow.parquet as pq

    about = (pq.read_schema(_present(path)).metadata or {}).get(b"about", b"{}")
    return Metadata.from_json(json.loads(about), path)


def count_rows(path: Path) -> int:
    import pyarrow.parquet as pq

    return pq.read_metadata(_present(path)).num_rows


def _present(path: Path) -> Path:
    """`path`; UserError if it was removed since it was listed."""
    if not path.exists():
        raise UserError(f"{path} is gone, as after `compact`: run this again")
    return path


def read_batches(paths: Sequence[Path], columns: Sequence[str]) -> Iterator:
    """ROW_ID and `columns` of checked files, as pyarrow batches of at most READ_ROWS runs."""
    import pyarrow.parquet as pq

    names = list(dict.fromkeys([*ROW_ID, *columns]))
    for path in paths:
        with pq.ParquetFile(_present(path), memory_map=True) as file:
            for batch in file.iter_batches(READ_ROWS, columns=names, use_threads=False):
                yield batch.select(names).replace_schema_metadata()


def read_table(paths: Sequence[Path], columns: Sequence[str]):
    """`read_batches` as one pyarrow.Table sorted by ROW_ID, however the rows were split."""
    import pyarrow as pa

    table = pa.Table.from_batches(list(read_batches(paths, columns)))
    if "predictions" in columns:  # sorting puts them in one array, which may pass 2 GiB
        at = table.schema.get_field_index("predictions")
        table = table.set_column(at, "predictions", table[at].cast(pa.large_binary()))
    return table.sort_by([(name, "ascending") for name in ROW_ID])


def read_runs(directory: str | Path, columns: Sequence[str] | None = None):
    """The finished runs of a directory as a pyarrow.Table, sorted by ROW_ID.

    ROW_ID and `columns`, by default all; `.to_pandas()` makes a data frame. Raises UserError if
    there are no rows, and Damaged; warns of rows that --allow-mixed stored.
    """
    import pyarrow.parquet as pq

    paths = checked_files(expand(directory))
    check_unique(paths)
    if n_mixed := sum(count_rows(path) for path in paths if read_metadata(path).mixed):
        log.warning("%s has %d rows stored by --allow-mixed", directory, n_mixed)
    if columns is None:  # those that all files have: rows gained columns
        first, *others = (pq.read_schema(path).names for path in paths)
        columns = [name for name in first if all(name in names for names in others)]
    return read_table(paths, columns)


def stored_program(paths: Sequence[Path]) -> str | None:
    """The code that trained some rows; None if they are older, or all stored by --allow-mixed."""
    every = map(read_metadata, paths)
    return next((each.program for each in every if each.program and not each.mixed), None)


def checked_files(directory: Path) -> list[Path]:
    """`row_files`, all intact; UserError if there are none, or they may not be pooled; Damaged."""
    if not (paths := row_files(directory)):
        raise UserError(f"{directory} has no finished runs")
    for path in paths:
        check_content(_present(path))
    known, *others = map(read_metadata, paths)
    for path, stored in zip(paths[1:], others, strict=True):
        check_one_sweep(path, stored, known)
        if known.mixed or not (known.program or stored.mixed):
            known = stored
    return paths


def finished_runs(directory: Path, metadata: Metadata) -> dict[Run, dict]:
    """`last_values` of the stored runs; damaged files are quarantined.

    UserError for rows that may not be pooled with `metadata`.
    """
    finished = {}
    for path in intact_files(directory):
        check_same(path, read_metadata(path), metadata)
        last = ["test_correct", *LOSSES, "seconds"]
        table = read_table([path], [*last, *(f"{name}_by_epoch" for name in LOSSES)])
        finite = finite_runs(*(by_epoch(table, name) for name in LOSSES)).tolist()
        values = table.select(last).to_pylist()
        for run_id, row, ok in zip(run_ids(table), values, finite, strict=True):
            finished[run_id] = row | {"finite": ok}
    return finished


def intact_files(directory: Path) -> list[Path]:
    """The intact ones of `row_files`; quarantines the others."""
    if merge := read_merge(directory):  # once quarantined, it no longer hides what it merged
        read_or_quarantine(check_content, directory / "runs" / merge["into"])
    return [path for path in row_files(directory) if read_or_quarantine(check_content, path)]


def run_ids(table) -> list[Run]:
    """The id of each row of a table or batch."""
    return list(map(Run, *(table[name].to_pylist() for name in ROW_ID)))


def find_row(paths: Sequence[Path], run_id: Run) -> tuple[Path, dict]:
    """The file and the row of a run; KeyError if no file has it."""
    import pyarrow.parquet as pq

    for path in paths:
        if run_id in (ids := run_ids(pq.read_table(path, columns=list(ROW_ID)))):
            return path, pq.read_table(path).slice(ids.index(run_id), 1).to_pylist()[0]
    raise KeyError(run_id)


def read_predictions(paths: Sequence[Path]) -> Iterator[tuple[list[Run], np.ndarray]]:
    """`run_ids` of some runs and their predictions, uint8 [runs, images], until all are read."""
    for batch in read_batches(paths, ["predictions"]):
        yield run_ids(batch), predictions(batch["predictions"])


def read_scores(paths: Sequence[Path]) -> dict[Run, float]:
    """Accuracy of each run in `checked_files`, nan where it diverged; UserError for one twice."""
    check_unique(paths)
    table = read_table(paths, ["test_correct", *(f"{name}_by_epoch" for name in LOSSES)])
    _, first = next(read_predictions(paths))
    shares = table["test_correct"].to_numpy() / first.shape[1]
    finite = finite_runs(*(by_epoch(table, name) for name in LOSSES))
    return dict(zip(run_ids(table), np.where(finite, shares, np.nan).tolist(), strict=True))


def check_unique(paths: Sequence[Path]) -> None:
    """UserError, naming the files and what to do, if a run is stored twice."""
    seen: dict[Run, Path] = {}
    for path in paths:
        runs = run_ids(read_table([path], []))
        if len(set(runs)) < len(runs):
            raise UserError(f"{path} contains a run twice")
        if other := next((seen[run] for run in runs if run in seen), None):
            theirs = {run for run in seen if seen[run] == other}
            advice = "move one of them away, and train its other runs again"
            for smaller, within in ((path, theirs >= set(runs)), (other, theirs <= set(runs))):
                if within:
                    advice = f"remove {smaller.name}, since the other has all of its runs"
            raise UserError(f"{other} and {path} contain the same run: {advice}")
        seen |= dict.fromkeys(runs, path)


def predictions(column) -> np.ndarray:
    """uint8 [runs, images] of a Parquet column of predictions."""
    return np.stack([np.frombuffer(row.as_buffer(), np.uint8) for row in column])
