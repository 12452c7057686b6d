"""What a run leaves behind: JSON files, and Parquet rows of many runs, with where they came from.

Files appear by atomic rename, so whatever exists is whole. pyarrow is imported by the functions
that need it: a single run does without.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mlp_jax.config import UserError

ROW_ID = ("vary", "learning_rate", "seed")
"""The columns that tell the rows of one sweep apart."""

READ_ROWS = 255
"""Runs whose predictions are in memory at a time: as many as stats.py counts at once."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """mkstemp ignores the umask, and it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def write_json_lines(path: Path, values: Iterable[dict]) -> None:
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(value) + "\n" for value in values))


def check_writable(directory: Path) -> None:
    """UserError unless files can be made in `directory`, which need not exist; creates nothing."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"cannot write to {directory}: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {directory}: no permission in {existing}")


def make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}") from None


def describe_environment(devices: Iterable) -> dict:
    """Where numbers come from: versions, hardware, numerics, and the code's commit.

    `devices` are the jax.Devices that train.
    """
    import jax

    devices = list(devices)
    packages = ("mlp_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "backend": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "n_devices": len(devices),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "prng": jax.config.jax_default_prng_impl,
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        "git": _git_state(),
    }


def _processor() -> str:
    """The processor's name: equal bytes are promised on one machine only."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_state() -> dict | None:
    """Commit of this code and whether it was changed since; None outside a git checkout."""

    def git(*args):
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # a package installed into somebody else's repository is not at that repository's commit
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


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


def open_sweep(directory: Path, about: dict) -> None:
    """Begin a sweep in `directory`, or go on with one that is the same in all that must be.

    `about` is written to config.json. UserError names what differs from what is there.
    """
    path = directory / "config.json"
    if not path.exists():
        if directory.exists() and any(directory.iterdir()):
            raise UserError(f"{directory} is not empty, and no sweep: name another --out")
        make_directory(directory / "runs")
        write_json(path, about)
        return
    there = _binding(read_config(directory))
    here = _binding(json.loads(json.dumps(about)))
    for name in there | here:
        old, new = there.get(name), here.get(name)
        if old != new:
            raise UserError(
                f"{directory} holds a sweep with {name.replace('_', ' ')} {old}, not {new};"
                " name another --out"
            )


def read_config(directory: Path) -> dict:
    try:
        return json.loads((directory / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{directory} holds no sweep: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / 'config.json'} cannot be read: {error}") from None


def _binding(about: dict) -> dict:
    """What all rows of a directory share: rows that differ in it are never pooled."""
    environment = about["environment"]
    shared = ("backend", "device_kind", "prng", "matmul_precision")
    return (
        {"recipe": about["recipe"]}
        | about["config"]
        | {"data fingerprint": about["fingerprint"]}
        | {name: environment[name] for name in shared}
        | {"jax": environment["versions"]["jax"]}
    )


def write_chunk(directory: Path, rows: list[dict], environment: dict) -> Path:
    """One Parquet file of whole rows, named after its first; `environment` goes into its schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema().with_metadata({"environment": json.dumps(environment)})
    first = rows[0]
    name = f"{first['vary']}-lr{first['learning_rate']:g}-seed{first['seed']}.parquet"
    path = directory / "runs" / name
    with replacing(path) as temporary:
        # neighbouring rows predict nearly the same bytes, which zstd's window sees and a
        # dictionary of whole values does not
        pq.write_table(
            pa.Table.from_pylist(rows, schema),
            temporary,
            compression="zstd",
            compression_level=9,
            use_dictionary=["recipe", "vary"],
            write_page_checksum=True,
        )
    return path


def chunk_paths(directory: Path) -> list[Path]:
    return sorted((directory / "runs").glob("*.parquet"))


def read_batches(directory: Path, columns: list[str]) -> Iterator:
    """ROW_ID and `columns` as pyarrow batches of READ_ROWS runs at most, file by file.

    Raises UserError for a file that is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys([*ROW_ID, *columns]))
    for path in chunk_paths(directory):
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                for batch in file.iter_batches(READ_ROWS, columns=names, use_threads=False):
                    yield batch.select(names).replace_schema_metadata()
        except (OSError, pa.ArrowException, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{path} cannot be read ({reason}): remove it, and sweep again"
            ) from None


def read_runs(directory: Path, columns: list[str] | None = None):
    """All rows of a sweep as one pyarrow.Table, in the order of ROW_ID whatever the chunks were.

    `columns` are read beside ROW_ID's, else all. Raises UserError where there are no rows.
    """
    import pyarrow as pa

    batches = list(read_batches(directory, _schema().names if columns is None else columns))
    if not batches:
        raise UserError(f"{directory} holds no finished runs")
    return pa.Table.from_batches(batches).sort_by([(name, "ascending") for name in ROW_ID])


def finished(directory: Path) -> set[tuple[str, float, int]]:
    """ROW_ID of the runs whose rows are whole."""
    if not chunk_paths(directory):
        return set()
    return {tuple(row.values()) for row in read_runs(directory, []).to_pylist()}


def predictions(column) -> np.ndarray:
    """uint8 [runs, images] of a Parquet column of predictions."""
    return np.stack([np.frombuffer(row.as_buffer(), np.uint8) for row in column])
