"""What tests of README and of the records share."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def read(path):
    return json.loads((ROOT / path).read_text())


def row(*cells):
    return "| " + " | ".join(cells) + " |"


def points(interval, digits=3):
    """An interval in percentage points."""
    return "{} ({} to {})".format(*(f"{100 * end:.{digits}f}" for end in interval.values()))


def close(a, b):
    """Equal but for the last bits, which another processor or NumPy may round otherwise."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-9) if isinstance(a, float) else a == b
