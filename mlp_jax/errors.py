"""Errors that a user can act on, each one line."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input, in one line; the command line prints it and exits with `status`."""

    def __init__(self, line: str, status: int = 2):
        super().__init__(line.replace("\n", " "))  # a path may have any character
        self.status = status


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(": ")


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known word closest to `word`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
