"""Progress bars: redrawn on a terminal; in a log file or a notebook, a line every 30 s."""

import sys
from collections.abc import Iterable
from typing import Any

SECONDS_PER_LINE = 30


class _Lines:
    """Output file for tqdm where nothing can be redrawn: each state of the bar is a line."""

    def write(self, text: str) -> None:
        if text := text.strip():
            sys.stderr.write(f"{text}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def can_redraw() -> bool:
    """Whether standard error is a terminal, where a bar can be redrawn."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress_bar(iterable: Iterable | None = None, *, quiet: bool, **options: Any) -> Any:
    """A tqdm bar on standard error, with tqdm's `options`."""
    from tqdm import tqdm

    if sys.stderr is None:  # closed
        quiet = True
    elif not can_redraw():
        # miniters=1, else tqdm's monitor may repeat a line
        options |= {"file": _Lines(), "mininterval": SECONDS_PER_LINE, "miniters": 1}
    return tqdm(iterable, disable=quiet, **options)
