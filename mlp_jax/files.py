"""Files that are complete or absent, and verified when read.

JSON and array files carry the SHA-256 of their content. A mismatch raises Damaged; a file that
cannot be read raises OSError instead.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mlp_jax.errors import UserError, one_line

T = TypeVar("T")

log = logging.getLogger("mlp_jax")

LOCK = ".mlp_jax-lock-"
OUR_DIRECTORIES = ("", "runs", "checkpoints", "weights")
"""Where only the holder of the lock writes; `report` needs none, and writes figures."""


class Damaged(UserError):
    """A file does not hold what was written to it."""

    def __init__(self, path: Path, reason: Exception | str):
        self.path = path
        self.reason = one_line(reason) if isinstance(reason, Exception) else reason
        super().__init__(f"{path} is damaged ({self.reason}): rerun the command that wrote it")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which it replaces once the block has written it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_signed_json(path: Path, value: dict) -> None:
    write_json(path, value | {"sha256": json_digest(value)})


def read_signed_json(path: Path) -> dict:
    """What `write_signed_json` wrote; raises Damaged, and OSError."""
    content = path.read_bytes()
    try:
        value = json.loads(content)
        digest = value.pop("sha256")
        if digest != json_digest(value):
            raise ValueError("its SHA-256 differs")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(path, error) from None
    return value


def json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save_arrays(path: Path, arrays: dict[str, np.ndarray], metadata: dict) -> None:
    """An .npz of `arrays`, with `metadata` as JSON and the SHA-256 of both."""
    arrays = dict(map(_to_plain, arrays.keys(), arrays.values()))
    encoded = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    digest = np.frombuffer(_array_digest(arrays | {"metadata": encoded}), np.uint8)
    content: dict[str, Any] = arrays | {"metadata": encoded, "sha256": digest}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **content)


def load_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays and the metadata of `save_arrays`; raises Damaged, and OSError."""
    content = path.read_bytes()  # outside the try: parsing errors mean damage, these do not
    try:
        arrays = dict(np.load(io.BytesIO(content), allow_pickle=False))
        digest = arrays.pop("sha256").tobytes()
        if digest != _array_digest(arrays):
            raise ValueError("its SHA-256 differs")
        metadata = json.loads(arrays.pop("metadata").tobytes())
        for name in [name for name in arrays if "::" in name]:
            own, _, dtype = name.partition("::")
            arrays[own] = arrays.pop(name).view(dtype)
        return arrays, metadata
    except MemoryError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy each raise their own
        raise Damaged(path, error) from None


def load_fields(path: Path) -> dict:
    """The metadata of `save_arrays`, unverified, without reading the arrays; errors as above."""
    with path.open("rb") as file:
        try:
            return json.loads(np.load(file, allow_pickle=False)["metadata"].tobytes())
        except MemoryError:
            raise
        except Exception as error:
            raise Damaged(path, error) from None


def _to_plain(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """An array of a type that NumPy's files cannot name, such as bfloat16, as integers."""
    if array.dtype.kind != "V":
        return name, array
    return f"{name}::{array.dtype}", array.view(f"u{array.itemsize}")


def _array_digest(arrays: dict[str, np.ndarray]) -> bytes:
    """SHA-256 of the names, types, shapes and bytes of arrays."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.digest()


def read_or_quarantine(read: Callable[[Path], T], path: Path) -> T | None:
    """What `read` makes of a file; None if it is missing or damaged, and then renamed, so that it
    is rewritten but can still be inspected.

    Readers of Parquet skip names that begin with an underscore.
    """
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except Damaged as damaged:
        name = f"_{path.name}.corrupt"
        try:
            path.replace(path.with_name(name))
            done = f"renamed to {name}"
        except OSError:  # read-only, or another process was first
            done = "left where it is"
        log.warning("%s is damaged (%s): %s", path, damaged.reason, done)
        return None


def save_figure(path: Path, figure: Any, dpi: int = 150) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def expand(path: str | Path) -> Path:
    """`path`, of which a leading ~ or ~user is a home directory, as in a shell and in pyarrow."""
    found = Path(os.path.expanduser(path))
    return found.absolute() if ":" in str(found) else found  # pyarrow takes s3:x for an address


def check_writable(directory: Path) -> None:
    """UserError unless `directory`, which need not exist, is writable; creates nothing."""
    existing = directory
    try:
        str(directory).encode()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            directory.stat()  # exists() hides what is wrong with a name, from Python 3.14 on
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
    except (OSError, ValueError) as error:  # a name that is too long or not text
        reason = getattr(error, "strerror", None) or "its name is not valid text"
        raise UserError(f"cannot write to {str(directory)!r}: {reason}") from None
    if not existing.is_dir():
        raise UserError(f"cannot write to {directory}: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {directory}: no permission in {existing}")


def check_file(path: Path) -> None:
    """UserError unless a file can be written at `path`, whose directory must exist."""
    check_writable(path.parent)
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: {path.parent} is not a directory")


def make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}") from None


@contextlib.contextmanager
def locked(directory: Path, shard: int = 0, shards: int = 1) -> Iterator[None]:
    """Lock `directory` for a command whose `shards` processes share it; creates it if needed.

    UserError if another command holds it. The kernel drops a lock with its process, so a leftover
    lock file means nothing.
    """
    make_directory(directory)
    ours = f"-of-{shards}"
    with _flock(directory / f"{LOCK}{shard}{ours}"):
        # look for others only while holding our own lock: of two that start at once, one sees both
        for path in directory.glob(f"{LOCK}*"):
            if not path.name.endswith(ours):
                with _flock(path, fcntl.LOCK_SH):  # as others that start at once may do
                    pass
        if shards == 1:  # else they may belong to another shard at work
            for name in OUR_DIRECTORIES:
                for path in (directory / name).glob(f".*.{'[0-9a-f]' * 16}.tmp"):
                    path.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def _flock(path: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    with path.open("a") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            line = f"{path.parent} is in use by another process: wait until it ends"
            raise UserError(line) from None
        yield


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C until the block ends, as an impatient second one in a notebook."""
    handler, held = signal.getsignal(signal.SIGINT), []
    # other threads get no signals, and a handler that is not Python's cannot be put back
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for number in held[:1]:
            signal.raise_signal(number)


def remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):  # missing, or holding files
        directory.rmdir()
