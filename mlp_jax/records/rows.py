"""What a run leaves behind: JSON files, and Parquet rows of many runs, with where they came from.

Files appear by atomic rename, so whatever exists was whole; config.json and the rows carry their
SHA-256, so whatever is read still is. pyarrow is imported by the functions that need it: a single
run does without.
"""

import collections
import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlp_jax.records import provenance
from mlp_jax.training.config import UserError, one_line

ROW_ID = ("vary", "learning_rate", "seed")
"""The columns that tell the rows of one sweep apart."""

READ_ROWS = 255
"""Runs whose predictions are in memory at a time: as many as stats.py counts at once."""


class Damaged(UserError):
    """A file does not hold what was written into it."""

    def __init__(self, path: Path, reason: Exception | str):
        self.reason = one_line(reason) if isinstance(reason, Exception) else reason
        super().__init__(
            f"{path} is damaged ({self.reason}): the command that made it makes it anew"
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block has written it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def check_writable(directory: Path) -> None:
    """UserError unless files can be made in `directory`, which need not exist; creates nothing."""
    existing = directory
    try:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
    except OSError as error:  # a name that is too long
        raise UserError(f"cannot write to {directory}: {error.strerror}") from None
    if not existing.is_dir():
        raise UserError(f"cannot write to {directory}: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {directory}: no permission in {existing}")


def check_out(directory: Path) -> bool:
    """Whether `directory` holds results; UserError where none can be made, or another's are."""
    check_writable(directory)
    names = {path.name for path in directory.glob("[!.]*")}  # locks are hidden
    results = bool(names & {"config.json", "_config.json.corrupt"})
    if names and not results:
        raise UserError(f"{directory} is not empty, and holds no results: name another --out")
    if "config.json" in names:
        with contextlib.suppress(Damaged):  # ours, and made anew
            read_config(directory)
    return results


def make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}") from None


@contextlib.contextmanager
def sole_use(directory: Path, process: int = 0, processes: int = 1) -> Iterator[None]:
    """Hold `directory` for the command that `processes` run, of which this is one; made if need be.

    UserError where another command holds it. The locks are the kernel's: they end with their
    process, and a file that is left means nothing.
    """
    make_directory(directory)
    own = f"-of-{processes}"
    with _lock(directory / f".lock-{process}{own}"):
        # looked for with the own held: of two commands that begin at once, one sees the other
        for path in directory.glob(".lock-*"):
            if not path.name.endswith(own):
                with _lock(path):
                    pass
        if processes == 1:  # else they may be another's, at work
            for path in directory.rglob(".*.tmp"):
                path.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = f"{path.parent} is in use by another process: let it end"
            raise UserError(said) from None
        yield


def set_aside(path: Path, reason: str) -> None:
    """Rename what is damaged, so that it is made anew and can still be looked at.

    Readers of Parquet skip what begins with an underscore.
    """
    aside = path.with_name(f"_{path.name}.corrupt")
    print(f"{path} is damaged ({reason}): set aside as {aside.name}, made anew", file=sys.stderr)
    with contextlib.suppress(OSError):  # read-only, or another process was first
        if aside.is_dir():
            shutil.rmtree(aside)
        path.replace(aside)


def _schema():
    import pyarrow as pa

    return pa.schema(
        [
            ("recipe", pa.string()),
            ("vary", pa.string()),
            ("seed", pa.uint32()),
            ("learning_rate", pa.float64()),
            ("test_correct", pa.int32()),
            ("test_loss", pa.float32()),
            ("train_loss", pa.float32()),
            ("test_correct_by_epoch", pa.list_(pa.int32())),
            ("test_loss_by_epoch", pa.list_(pa.float32())),
            ("train_loss_by_epoch", pa.list_(pa.float32())),
            # one byte a test image, in the order of the data set
            ("predictions", pa.binary()),
            # wall time of the fleet, divided by its runs
            ("seconds", pa.float64()),
        ]
    )


def open_directory(directory: Path, about: dict) -> None:
    """Begin in `directory`, or go on where it agrees in all that must: UserError names what not.

    `about` is written to config.json where that is missing or damaged; rows and checkpoints have
    what binds them in themselves.
    """
    path = directory / "config.json"
    try:
        there = read_config(directory) if path.exists() else None
    except Damaged as error:
        set_aside(path, error.reason)
        there = None
    if there is None:
        write_json(path, provenance.sign(about))
    elif differs := provenance.difference(provenance.binding(there), provenance.binding(about)):
        raise UserError(f"{directory} holds results of {differs}; name another --out")


def read_config(directory: Path) -> dict:
    """A directory's config.json; raises UserError where there is none of ours, and Damaged."""
    path = directory / "config.json"
    try:
        about = json.loads(path.read_bytes())
        if not isinstance(about, dict) or "sha256" not in about:
            raise UserError(f"{directory} holds no run or sweep: its config.json is another's")
        about = provenance.unsign(about)
        provenance.binding(about)
    except FileNotFoundError:
        raise UserError(f"{directory} holds no sweep: it has no config.json") from None
    except OSError as error:  # not for sure damaged, so nothing is set aside
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(path, error) from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{directory} holds results of another version of mlp_jax") from None
    return about


def write_chunk(directory: Path, rows: list[dict], about: dict) -> Path:
    """One Parquet file of whole rows, named after its first and its SHA-256.

    Its schema holds `about`, as config.json does, of the process that trained the rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema().with_metadata({"about": json.dumps(about)})
    content = pa.BufferOutputStream()
    # neighbouring rows predict nearly the same bytes, which zstd's window sees and a dictionary
    # of whole values does not
    options = {"compression": "zstd", "compression_level": 9, "use_dictionary": ["recipe", "vary"]}
    pq.write_table(pa.Table.from_pylist(rows, schema), content, **options)
    content = content.getvalue()
    vary, rate, seed = (rows[0][name] for name in ROW_ID)
    path = directory / "runs" / f"{vary}-lr{rate:g}-seed{seed}-{_name_digest(content)}.parquet"
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return path


def _name_digest(content) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def chunk_paths(directory: Path) -> list[Path]:
    return sorted((directory / "runs").glob("*.parquet"))


def open_chunk(path: Path):
    """A chunk as a pyarrow ParquetFile, read whole; raises Damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = path.read_bytes()
    if _name_digest(content) != path.stem.rpartition("-")[2]:
        raise Damaged(path, "its SHA-256 is another")
    return pq.ParquetFile(pa.BufferReader(content))


def checked_about(path: Path, file, about: dict) -> dict:
    """What an open chunk's `write_chunk` was given; UserError if it does not go with `about`."""
    there = json.loads(file.schema_arrow.metadata[b"about"])
    if differs := provenance.difference(provenance.binding(there), provenance.binding(about)):
        raise UserError(f"{path} holds rows of {differs}: remove it, or name another --out")
    return there


def processors(directory: Path, about: dict) -> dict[str, int]:
    """How many rows were trained on which processor; raises Damaged, and as `checked_about`."""
    counts = collections.Counter()
    for path in chunk_paths(directory):
        with open_chunk(path) as file:
            environment = checked_about(path, file, about)["environment"]
            name = "{processor}, {cores} cores, {device_kind}".format(**environment)
            counts[name] += file.metadata.num_rows
    return dict(counts)


def read_batches(directory: Path, columns: list[str]) -> Iterator:
    """ROW_ID and `columns` as pyarrow batches of READ_ROWS runs at most, file by file.

    Raises Damaged.
    """
    names = list(dict.fromkeys([*ROW_ID, *columns]))
    for path in chunk_paths(directory):
        with open_chunk(path) as file:
            for batch in file.iter_batches(READ_ROWS, columns=names, use_threads=False):
                yield batch.select(names).replace_schema_metadata()


def read_runs(directory: Path, columns: list[str] | None = None):
    """All rows of a sweep as one pyarrow.Table, in the order of ROW_ID whatever the chunks were.

    `columns` are read beside ROW_ID's, else all. Raises UserError where there are no rows.
    """
    import pyarrow as pa

    batches = list(read_batches(directory, _schema().names if columns is None else columns))
    if not batches:
        raise UserError(f"{directory} holds no finished runs")
    return pa.Table.from_batches(batches).sort_by([(name, "ascending") for name in ROW_ID])


def finished(directory: Path, about: dict) -> dict[tuple[str, float, int], int]:
    """ROW_ID and test_correct of the runs that are whole; a damaged file is set aside.

    Raises as `checked_about`.
    """
    done = {}
    for path in chunk_paths(directory):
        try:
            file = open_chunk(path)
        except Damaged as error:
            set_aside(path, error.reason)
            continue
        except FileNotFoundError:  # another process of this command set it aside
            continue
        with file:
            checked_about(path, file, about)
            rows = file.read([*ROW_ID, "test_correct"]).to_pylist()
        done |= {tuple(row[name] for name in ROW_ID): row["test_correct"] for row in rows}
    return done


def predictions(column) -> np.ndarray:
    """uint8 [runs, images] of a Parquet column of predictions."""
    return np.stack([np.frombuffer(row.as_buffer(), np.uint8) for row in column])
