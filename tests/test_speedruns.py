"""scripts/speedruns.py: what may enter the log of a search."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

import mlp_jax as mj

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import speedruns


@pytest.fixture
def sweep(config, small, here):
    """Sweeps of `small`, as if it were MNIST's validation split."""
    dataset = small._replace(name="mnist", split="validation")

    def sweep(out, *, seeds=range(2), vary=("all",), split="validation", **changes):
        changed = dataclasses.replace(config, **changes)
        mj.sweep(changed, dataset._replace(split=split), out, seeds=seeds, vary=vary)
        return Path(out)

    return sweep


def test_a_setting_is_a_row_and_a_seed_counts_once(sweep):
    places = [sweep("a"), sweep("b", seeds=(1, 2)), sweep("c", learning_rate=0.2, seeds=[5])]
    first, second = speedruns.search_rows(places)
    assert first["seeds"] == [0, 1, 2]
    assert first["learning_rate"] == pytest.approx(0.1)
    rows = mj.read_runs("a").to_pylist() + mj.read_runs("b").to_pylist()[1:]
    assert first["mean"] == pytest.approx(sum(row["test_correct"] for row in rows) / 300, abs=5e-4)
    assert (second["seeds"], "sd" in second) == ([5], False)


def test_the_log_is_that_of_its_rows():
    log = json.loads(speedruns.SEARCH.read_text())
    assert log["rows"] == speedruns.search_rows(speedruns.searched())


def test_what_is_no_search_is_refused(sweep):
    for place, words in [
        (sweep("a", split="test"), "a was scored on mnist, test split"),
        (sweep("b", vary=("init",)), "b has the family init: log sweeps of all"),
        (sweep("c", learning_rate=1e30), "c has runs that diverged"),
    ]:
        with pytest.raises(mj.UserError, match=words):
            speedruns.search_rows([place])
