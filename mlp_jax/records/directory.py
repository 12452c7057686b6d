"""Whether a directory is ours, and what it holds.

A directory is ours if something in it proves so: config.json, rows, a checkpoint or weights that
match their hash, the sweeps of a grid, or, where there is nothing else to lose, the lock that
mlp_jax leaves. A damaged file proves nothing, and what is not ours is left alone.
"""

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlp_jax.errors import UserError
from mlp_jax.files import (
    LOCK,
    Damaged,
    check_writable,
    load_arrays,
    read_or_quarantine,
    read_signed_json,
    remove_if_empty,
    write_signed_json,
)
from mlp_jax.records import rows
from mlp_jax.records.provenance import Metadata, check_same
from mlp_jax.training.config import format_setting

CONFIG = "config.json"
CURVE = "curve.png"
WEIGHTS_NAME = re.compile(r"[a-z]+-lr[0-9.e+-]+-seed\d+\.npz")
CHECKPOINT_NAME = re.compile(r"[0-9a-f]{16}\.npz")
NOT_OURS = "{} is not empty and contains no mlp_jax results"
SINGLE_RUN_FILES = ("metrics.jsonl", "summary.json", CURVE)
UNITS = ('"units": "fractions (0 to 1)', '"units": "shares of 1')
"""In each summary of a report or a comparison; the second in older ones."""


def read_metadata(directory: Path) -> Metadata:
    """Metadata of the results in `directory`; UserError if there are none, or unreadable ones."""
    try:
        if metadata := stored_metadata(directory):
            return metadata
        exists = (directory / CONFIG).exists()
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}") from None
    reason = "was not written by mlp_jax, or is damaged" if exists else "is missing"
    raise UserError(f"{directory} contains no mlp_jax results: config.json {reason}")


def check_replaceable(paths: Sequence[Path], marks: Sequence[str] = UNITS) -> None:
    """UserError if one of `paths` exists, unless the first holds one of `marks`: it is ours."""
    existing = [path for path in paths if path.exists()]
    first = paths[0].read_text(errors="replace") if paths[0].is_file() else ""
    if existing and not any(mark in first for mark in marks):
        raise UserError(
            f"{existing[0]} was perhaps not written by mlp_jax: move it, or name another --out"
        )


def _from_config(directory: Path) -> Metadata:
    path = directory / CONFIG
    return Metadata.from_json(read_signed_json(path), path)


def _from_files(directory: Path) -> Metadata | None:
    """Metadata of the first intact rows, if possible not marked as mixed; else of other files."""
    mixed = None
    for path in rows.row_files(directory):
        with contextlib.suppress(UserError):
            rows.check_content(path)
            if not (metadata := rows.read_metadata(path)).mixed:
                return metadata
            mixed = mixed or metadata._replace(program=None)
    if mixed:
        return mixed
    for path in _array_files(directory):
        with contextlib.suppress(UserError, KeyError):
            return Metadata.from_json(load_arrays(path)[1]["run"], path)
    return None


def check_out_dir(directory: Path) -> bool:
    """Whether `directory` has results; UserError if it is not ours, or cannot be written."""
    check_writable(directory)
    if not any(directory.glob("[!.]*")):
        return False
    if _has_grid(directory):
        raise UserError(f"{directory} has a grid of sweeps: name one of its directories")
    try:
        _from_config(directory)
        return True
    except FileNotFoundError:
        refusal = NOT_OURS.format(directory)
    except Damaged as damaged:
        refusal = f"{damaged.path} was not written by mlp_jax, or is damaged ({damaged.reason})"
    except OSError as error:
        raise UserError(f"{directory / CONFIG} cannot be read: {error.strerror}") from None
    if not (_from_files(directory) or _was_claimed(directory)):
        raise UserError(f"{refusal}: name another --out")
    return True


def _was_claimed(directory: Path) -> bool:
    """Whether our lock is there, and no file under a name that ours have: it may be another's."""
    left = [*map(directory.joinpath, SINGLE_RUN_FILES), *directory.glob("*/*.npz")]
    return any(directory.glob(f"{LOCK}*")) and not any(path.exists() for path in left)


def check_grid_dir(directory: Path) -> None:
    """UserError unless `directory` can be written, and is empty or has a grid of ours."""
    check_writable(directory)
    if stored_metadata(directory):
        raise UserError(f"{directory} has a sweep: name another --out for a grid")
    ours = any(directory.glob(f"{LOCK}*")) or _has_grid(directory)
    if any(directory.glob("[!.]*")) and not ours:
        raise UserError(f"{NOT_OURS.format(directory)}: name another --out")


def stored_metadata(directory: Path) -> Metadata | None:
    """Metadata from config.json or, if that is missing or damaged, from the other files."""
    try:
        return _from_config(directory)
    except (FileNotFoundError, Damaged):
        return _from_files(directory)


def grid_cells(directory: Path) -> list[Path]:
    """The sweeps of a grid, in directories named after their settings."""
    return sorted({path.parent for n in (CONFIG, "runs") for path in directory.glob(f"*=*/{n}")})


def _has_grid(directory: Path) -> bool:
    return any(map(stored_metadata, grid_cells(directory)))


def cell_names(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each cell's name: the settings that differ, as in hidden=8,dropout=0.2; "" if none do."""
    differing = [name for name in cells[0] if len({cell.get(name) for cell in cells}) > 1]

    def text(name: str, value: Any) -> str:
        return f"{name}={format_setting(value)}".replace("/", "-")

    return [",".join(text(name, cell.get(name)) for name in differing) for cell in cells]


def claim(directory: Path, metadata: Metadata) -> None:
    """Write config.json if it is missing or damaged, from the rows if there are any.

    It gains the fingerprint of the code that will train the first rows. UserError, before any
    write, if what is there may not be pooled with `metadata`.
    """
    if stored := stored_metadata(directory):
        check_same(directory, stored, metadata)
    path, kept = directory / CONFIG, stored or metadata
    if not kept.program:  # as in older records: that of their newer rows, or of the next
        known = rows.stored_program(rows.intact_files(directory))
        kept = kept._replace(program=known or (None if metadata.mixed else metadata.program))
    gained = stored and kept.program != stored.program
    if not read_or_quarantine(read_signed_json, path) or gained:
        write_signed_json(path, kept._replace(mixed=False).to_json())


def clear(directory: Path) -> None:
    """Remove the results of a single run; files that mlp_jax did not write stay."""
    if (stored := stored_metadata(directory)) and stored.seed is None:
        raise UserError(f"{directory} has a sweep: name another --out")
    for path in [*rows.row_files(directory), *filter(_is_ours, _array_files(directory))]:
        path.unlink()
    for name in SINGLE_RUN_FILES:
        (directory / name).unlink(missing_ok=True)
    # config.json last: it shows whose the rest is
    if read_or_quarantine(read_signed_json, directory / CONFIG):
        (directory / CONFIG).unlink()
    for name in ("checkpoints", "weights"):
        remove_if_empty(directory / name)


def _array_files(directory: Path) -> Iterator[Path]:
    """Checkpoints and weights, under the names that mlp_jax gives."""
    for folder, name in (("checkpoints", CHECKPOINT_NAME), ("weights", WEIGHTS_NAME)):
        paths = sorted((directory / folder).glob("*.npz"))
        yield from (path for path in paths if name.fullmatch(path.name))


def _is_ours(path: Path) -> bool:
    try:
        return "run" in load_arrays(path)[1]
    except Damaged:
        return False


def new_directory(directory: Path) -> Path:  # type: ignore[return]  # count() has no end
    """Create `directory`, or the first of directory-2, directory-3, ... that does not exist."""
    for i in itertools.count(1):
        candidate = directory if i == 1 else directory.with_name(f"{directory.name}-{i}")
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            if not candidate.exists():  # a parent is a file, or a broken link
                raise UserError(f"cannot write to {candidate}: no such directory") from None
        except OSError as error:
            raise UserError(f"cannot write to {candidate}: {error.strerror}") from None
