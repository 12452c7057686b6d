"""What was tried before a recipe was fixed, as a table: every sweep of results/search.

    python scripts/search_log.py

Each directory is a sweep with `--split validation`, trained on 50,000 of the training images and
scored on the other 10,000; but for one of an earlier choice, which was scored on the test set. Its
settings are given where they differ from those of the recipe that was sought: with deformed images
and a teacher, with deformed images alone, or without.
"""

import dataclasses
import math
import statistics
from pathlib import Path

import mlp_jax as mj
from mlp_jax.files import write_json
from mlp_jax.records.rows import checked_files, read_metadata, read_scores

RESULTS = Path(__file__).parents[1] / "results"
N_SCORED = 10_000


def main() -> None:
    lines = sorted(map(line_of, (RESULTS / "search").iterdir()), key=lambda line: line["sweep"])
    variances = [line["sd"] ** 2 for line in lines if line["sd"] is not None]
    record = {"command": "python scripts/search_log.py"}
    record["sd within settings"] = math.sqrt(statistics.mean(variances))
    write_json(RESULTS / "search.json", record | {"sweeps": lines})
    for line in lines:
        print(line)


def line_of(directory: Path) -> dict:
    """Settings, and the mean and SD of the accuracies in percent."""
    config = read_metadata((paths := checked_files(directory))[0]).config
    rows = mj.read_runs(directory, ["seed", "vary", "test_correct", "seconds"]).to_pylist()
    assert {row["vary"] for row in rows} == {"all"}, directory
    assert config.dataset == "mnist", directory
    assert all(map(math.isfinite, read_scores(paths).values())), directory
    assert {row["learning_rate"] for row in rows} == {config.learning_rate}, directory
    scores = [100 * row["test_correct"] / N_SCORED for row in rows]
    recipe = "best-distilled" if config.teacher else "best-augmented" if config.augments else "best"
    return {
        "sweep": directory.name,
        "recipe": recipe,
        "settings": differences(config, recipe),
        "split": config.split,
        "seeds": [row["seed"] for row in rows],
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
