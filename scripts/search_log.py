"""What was tried before a recipe was fixed, as a table: every sweep of results/search.

    python scripts/search_log.py

Each directory is a sweep with `--split validation`: trained on 50,000 of the training images and
scored on the other 10,000. Its settings are given where they differ from those of the recipe that
was sought: with deformed images or without.
"""

import dataclasses
import math
import statistics
from pathlib import Path

import mlp_jax as mj
from mlp_jax.files import write_json
from mlp_jax.records.rows import checked_files, read_metadata, read_scores

RESULTS = Path(__file__).parents[1] / "results"
N_VALIDATION = 10_000


def main() -> None:
    lines = sorted(map(line_of, (RESULTS / "search").iterdir()), key=lambda line: line["sweep"])
    command = "python scripts/search_log.py"
    write_json(
        RESULTS / "search.json", {"command": command, "scored": "validation", "sweeps": lines}
    )
    for line in lines:
        print(line)


def line_of(directory: Path) -> dict:
    """Settings, and the mean and SD of the validation accuracies in percent."""
    config = read_metadata((paths := checked_files(directory))[0]).config
    rows = mj.read_runs(directory, ["vary", "test_correct", "seconds"]).to_pylist()
    assert {row["vary"] for row in rows} == {"all"}, directory
    assert config.dataset == "mnist", directory
    assert all(map(math.isfinite, read_scores(paths).values())), directory
    assert config.split == "validation", directory
    assert {row["learning_rate"] for row in rows} == {config.learning_rate}, directory
    scores = [100 * row["test_correct"] / N_VALIDATION for row in rows]
    return {
        "sweep": directory.name,
        "recipe": (recipe := "best-augmented" if config.augments else "best"),
        "settings": differences(config, recipe),
        "runs": len(rows),
        "mean": statistics.mean(scores),
        "sd": statistics.stdev(scores) if len(scores) > 1 else None,
        "seconds a run": statistics.mean(row["seconds"] for row in rows),
    }


def differences(config: mj.Config, recipe: str) -> dict:
    """The settings that differ from the recipe's, but for the split."""
    own = dataclasses.asdict(dataclasses.replace(mj.RECIPES[recipe], split=config.split))
    return {name: value for name, value in dataclasses.asdict(config).items() if value != own[name]}


if __name__ == "__main__":
    main()
