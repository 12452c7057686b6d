"""scripts/benchmark.py: what needs neither Keras nor PyTorch."""

import ast
import itertools
import json
import statistics
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import make_split

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import _peers  # noqa: E402
import benchmark  # noqa: E402
import threefry  # noqa: E402

from mlp_jax.training import step  # noqa: E402
from mlp_jax.training.config import RECIPES  # noqa: E402


class EnoughTurns(Exception):
    """Ends a peer, which would train for ever."""


def a_row(what, ratio, accuracy=0.95):
    seconds = {"seconds": 1.1 * ratio, "seconds min": ratio, "seconds max": 1.2 * ratio}
    ratios = {"ratio": ratio, "ratio min": 0.9 * ratio, "ratio max": 1.2 * ratio}
    return {"what": what} | seconds | ratios | {"test accuracy": accuracy, "after epochs": 7}


def test_a_peer_without_its_packages_is_named_and_left_out(capsys):
    peers = []
    benchmark.add(peers, ("jax", "no_such_package"), "Keras on nothing", pytest.fail)
    assert peers == []
    assert "without Keras on nothing: no_such_package is not installed" in capsys.readouterr().out
    assert _peers.missing(("jax", "sh")) is None


def test_benchmarks_measure_what_users_call():
    """They train, load and read by the public API; beside it they only write files and draw."""
    tools = {"files", "analysis.figures"}
    made_up_rows = {"records", "training.run", "training.fit"}
    allowed = {"benchmark": tools, "_peers": tools, "report_scale": tools | made_up_rows}
    for name, modules in allowed.items():
        tree = ast.parse((ROOT / "scripts" / f"{name}.py").read_text())
        found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        ours = {node.module for node in found if node.module.startswith("mlp_jax")}
        assert ours <= {f"mlp_jax.{module}" for module in modules}
    assert benchmark.EVAL_BATCH == step.EVAL_BATCH


def test_peers_train_the_net_of_the_recipe():
    """Their scripts have its numbers as literals, as users write them."""
    recipe = RECIPES[benchmark.RECIPE]
    sizes = itertools.pairwise((784, *recipe.hidden, recipe.n_classes))
    assert sum((inputs + 1) * outputs for inputs, outputs in sizes) == _peers.PARAMETERS
    assert (recipe.batch_size, recipe.dropout, recipe.learning_rate) == (128, 0.2, 0.01)


def test_the_flax_peer_learns(monkeypatch):
    splits = [make_split(0, 2000), make_split(1, 300)]
    arrays = [(split.images.astype("float32") / 255, split.labels) for split in splits]
    monkeypatch.setattr(_peers, "load", lambda _: arrays)
    accuracies = []

    def turn(new):
        accuracies.extend(new)
        if len(accuracies) == 4:
            raise EnoughTurns

    with pytest.raises(EnoughTurns):
        _peers.train_flax(turn, 0, None)
    assert 0.4 < accuracies[0] < accuracies[-1] <= 1
    assert accuracies[-1] > 0.9


@pytest.mark.parametrize(
    ("what", "accuracy", "is_same"),
    [
        ("Keras on JAX", 0.936, True),
        ("Keras on JAX", 0.93, False),
        ("Keras on JAX", 0.97, False),
        ("PyTorch", 0.93, True),
        ("PyTorch, compiled", 0.92, False),
        ("PyTorch", 0.97, False),
        (benchmark.PRODUCTS, None, True),
    ],
)
def test_accuracies_of_another_training_fail(what, accuracy, is_same):
    rows = [a_row("mlp_jax, one run", 1, 0.95), a_row(what, 2, accuracy)]
    assert benchmark.are_same_training(rows) is is_same
    assert not benchmark.are_same_training([a_row("mlp_jax, one run", 1, 0.7)])


def test_the_figure_shows_every_row(tmp_path):
    floor = a_row(benchmark.PRODUCTS, 0.7, None)
    users = [a_row("mlp_jax, one run", 1), a_row("PyTorch", 2.5), floor]
    sweep = [a_row("mlp_jax, a sweep", 1), a_row("Keras on TF, one per core", 1.5), floor]
    environment = {"processor": "a processor", "cores": 2}
    record = {"environment": environment, "users": users, "sweep": sweep, "scaling": []}
    figure = benchmark.draw(json.loads(json.dumps(record)))
    (ax,) = figure.axes
    assert "2 cores of a processor, 3 rounds" in figure.get_suptitle()
    bars = [row for row in users + sweep if row is not floor]
    assert [bar.get_width() for bar in ax.patches] == [row["ratio"] for row in bars]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [row["what"] for row in bars]
    texts = [text.get_text() for text in ax.texts]
    assert {benchmark.HEADINGS[part] for part in ("users", "sweep")} < set(texts)
    assert "2.50 (2.75 s)" in texts
    floors = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in floors] == [0.7, 0.7]
    assert [line.get_ydata()[1] - line.get_ydata()[0] for line in floors] == [2, 2]
    figure.savefig(tmp_path / "speed.png")


@pytest.mark.parametrize("shape", [(128, 512), (3, 5, 7), (1,)])
def test_unrolled_rounds_give_the_same_bits(shape):
    key = jax.random.key(7)
    same = threefry.rolled_bits(key, shape), threefry.unrolled_bits(key, shape)
    np.testing.assert_array_equal(*same)


def test_the_readme_quotes_what_rolled_rounds_cost():
    record = json.loads((ROOT / "results" / "threefry.json").read_text())
    pairs = zip(record["seconds"]["unrolled"], record["seconds"]["rolled"], strict=True)
    ratios = [unrolled / rolled for unrolled, rolled in pairs]
    found = statistics.median(ratios), min(ratios), max(ratios)
    text = "{:.2f} ({:.2f} to {:.2f}) times as long".format(*found)
    command = f"(`python scripts/threefry.py`, {len(ratios)} turns)"
    assert f"{text} {command}" in " ".join((ROOT / "README.md").read_text().split())
