"""Progress bars: redrawn on a terminal; in a log file or a notebook, a line now and then."""

import sys
from collections.abc import Iterable
from typing import Any

SECONDS_A_LINE = 30


class _Lines:
    """What tqdm writes to, where nothing can be redrawn: each state of the bar is a line."""

    def write(self, text: str) -> None:
        if text := text.strip():
            sys.stderr.write(f"{text}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def redrawn() -> bool:
    """Whether a bar on standard error is seen on a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress_bar(iterable: Iterable | None = None, *, quiet: bool, **options: Any) -> Any:
    """A tqdm bar on standard error, with tqdm's `options`."""
    from tqdm import tqdm

    if sys.stderr is None:  # closed
        quiet = True
    elif not redrawn():
        # not so many updates at a time that tqdm's monitor repeats a line
        options |= {"file": _Lines(), "mininterval": SECONDS_A_LINE, "miniters": 1}
    return tqdm(iterable, disable=quiet, **options)
