"""`python -m mlp_jax.predict`: which digit is in an image, and how sure trained runs are."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import tyro

from mlp_jax import cli, files
from mlp_jax.errors import UserError

MENTIONED = 0.01
"""Lowest probability at which another digit is named too."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Recognize the digit in each image: photos, scans and drawings of any size and colour."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, each of one digit."""
    run: cli.OptionalPath = None
    """Directory of a run, or of a sweep with --keep-weights, whose runs vote.
    Default: the weights that come with mlp_jax."""
    json: bool = False
    """Print an object per image: file, digit, probabilities, and the votes for each digit."""
    sheet: cli.OptionalPath = None
    """PNG file for a picture of what the network saw."""


def main(argv: list[str] | None = None) -> None:
    """Answer for each readable image; exit with status 1 if any was not. Raises UserError."""
    args = cli.parse_args(Args, argv, "python -m mlp_jax.predict")
    if not args.images:
        raise UserError("name at least one image")
    if args.sheet:
        files.check_file(args.sheet)
        if args.sheet.exists():  # perhaps a photo
            raise UserError(f"--sheet {args.sheet} exists: name a new file, or remove it")

    # slow to import, so after bad flags are answered
    from mlp_jax.data.photo import read_digit
    from mlp_jax.records.checkpoint import for_upright, load_committee, predict

    committee = for_upright(load_committee(args.run))
    digits = {}
    for path in dict.fromkeys(args.images):
        try:
            digits[path] = read_digit(path)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
    if digits:
        probabilities, votes = count_votes(predict(committee, np.stack(list(digits.values()))))
        names = [os.fsencode(path).decode(errors="replace") for path in digits]
        answers = list(zip(names, probabilities, votes, strict=True))
        print(*(format_answer(*answer, args.json) for answer in answers), sep="\n")
        if args.sheet:
            write_sheet(args.sheet, list(digits.values()), answers)
    if len(digits) < len(set(args.images)):
        sys.exit(1)


def count_votes(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean probabilities [n, classes] and votes [n, classes] of logits [runs, n, classes]."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    votes = np.eye(logits.shape[-1], dtype=int)[logits.argmax(-1)].sum(0)
    return (powers / powers.sum(-1, keepdims=True)).mean(0), votes


def format_answer(name: str, probabilities: np.ndarray, votes: np.ndarray, as_json: bool) -> str:
    """A line of text, most probable digit first, or of JSON."""
    digit = int(probabilities.argmax())
    if as_json:
        numbers = {"probabilities": probabilities.tolist(), "votes": votes.tolist()}
        return json.dumps({"file": name, "digit": digit} | numbers)
    texts = []
    for k in np.argsort(-probabilities, kind="stable"):
        if k == digit or votes[k] or probabilities[k] >= MENTIONED:
            counted = f", {votes[k]} of {votes.sum()} votes" if votes.sum() > 1 else ""
            texts.append(f"{k} ({probabilities[k]:.1%}{counted})")
    return f"{name}: {' or '.join(texts)}"


def write_sheet(path: Path, images: list[np.ndarray], answers: list[tuple]) -> None:
    from mlp_jax.analysis.figures import draw_digits

    captions = []
    for name, probabilities, _ in answers:
        short = Path(name).name
        if len(short) > 13:
            short = f"{short[:6]}\N{HORIZONTAL ELLIPSIS}{short[-6:]}"
        captions.append(f"{short}\n{probabilities.argmax()} ({probabilities.max():.1%})")
    files.save_figure(path, draw_digits(images, captions), dpi=100)


if __name__ == "__main__":
    cli.run_cli(main)
