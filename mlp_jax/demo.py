"""`python -m mlp_jax.demo`: a page to draw digits on; one file, which needs no server."""

import base64
import dataclasses
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from mlp_jax import cli, files
from mlp_jax.records.directory import check_replaceable

TEMPLATE = Path(__file__).with_name("demo.html")
TITLE = "<title>Draw a digit</title>"  # of the pages that may be replaced


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Write a page to draw digits on, with trained networks in it that recognize them."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """HTML file to write."""
    run: cli.OptionalPath = None
    """Directory of a run, or of a sweep with --keep-weights.
    Default: the weights that come with mlp_jax."""
    members: int = 5
    """Maximum number of runs to put on the page; each takes 2 to 4 MB."""


def main(argv: list[str] | None = None) -> None:
    """Write the page; raises UserError."""
    args = cli.parse_args(Args, argv, "python -m mlp_jax.demo")
    cli.check_at_least(args, {"members": 1})
    files.check_file(args.out)
    check_replaceable([args.out], (TITLE,))

    # --help does without
    from mlp_jax.records.checkpoint import for_upright, load_committee

    committee = for_upright(load_committee(args.run))
    files.write_text(args.out, make_page(committee, args.members))
    print(args.out)


def make_page(committee, members: int) -> str:
    """The page with the first `members` runs of a committee, their weights unchanged."""
    from mlp_jax.data import photo

    arrays, layers, offset = [], [], 0
    names = [f"hidden_{i}" for i in range(len(committee.config.hidden))] + ["output"]
    for name in names:
        kernel, bias = (committee.params[name][part][:members] for part in ("kernel", "bias"))
        layer = {"kernel": offset, "bias": offset + kernel.size}
        layers.append(layer | dict(zip(("inputs", "outputs"), kernel.shape[1:], strict=True)))
        arrays += [kernel.ravel(), bias.ravel()]
        offset += kernel.size + bias.size
    weights = np.concatenate(arrays)
    with np.errstate(over="ignore"):
        half = weights.astype(np.float16)
    weights = half if np.array_equal(half, weights) else weights  # as of those shipped
    net = {
        "about": page_note(committee, members),
        "seeds": [run.seed for run in committee.runs[:members]],
        "photo": {name: getattr(photo, name) for name in ("BOX", "FINE", "LINE", "MARGIN")},
        "layers": layers,
        "dtype": weights.dtype.name,
        "weights": base64.b64encode(weights.astype(weights.dtype.newbyteorder("<"))).decode(),
    }
    return TEMPLATE.read_text(encoding="utf-8").replace("{{NET}}", json.dumps(net))


def page_note(committee, members: int) -> str:
    """The text under the page's title."""
    correct = sorted(metrics["test_correct"] for metrics in committee.metrics[:members])
    counts = " to ".join(f"{n:,}" for n in dict.fromkeys((correct[0], correct[-1])))
    name = committee.config.dataset.replace("mnist", "MNIST")
    found = f"{counts} of the {committee.config.split} images of {name}"
    if len(correct) == 1:
        return f"The network in this page recognizes {found}."
    alike = len({run.family for run in committee.runs[:members]}) == 1
    what = "seed" if alike else "seeds and learning rates"
    return (
        f"The {len(correct)} networks in this page differ in nothing but their {what}. Each"
        f" recognizes {found}; on a doubtful digit they disagree."
    )


if __name__ == "__main__":
    cli.run_cli(main)
