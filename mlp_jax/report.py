"""`python -m mlp_jax.report`: how much a sweep's test accuracy varies, and why.

A table, its numbers as summary.json, and figures; for a grid, a ranking of its sweeps.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from mlp_jax import cli, files
from mlp_jax.errors import UserError
from mlp_jax.records.directory import (
    cell_names,
    check_replaceable,
    grid_cells,
    read_metadata,
    stored_metadata,
)
from mlp_jax.records.provenance import Metadata, numerics, settings
from mlp_jax.training.run import used_streams


@dataclasses.dataclass(frozen=True)
class Args:
    """Show how much the test accuracy of a sweep varies and why, in a table and figures; for a
    grid, rank its sweeps.
    """

    directory: tyro.conf.Positional[Path]
    """Directory of the sweep, or of a grid."""
    data_dir: cli.OptionalPath = None
    """Where TFDS keeps its data; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    out: cli.OptionalPath = None
    """Directory for summary.json and figures/; default: that of the sweep."""
    html: bool = False
    """Also write report.html, a self-contained page with all of this."""


class Report(NamedTuple):
    """A report: terminal text, summary.json, and figures by file name."""

    text: str
    summary: dict
    figures: list[tuple[str, Any]]
    settings: dict[str, Any]  # of a sweep, and where its rows come from

    @property
    def page(self) -> str:
        from mlp_jax.analysis.page import make_page

        return make_page(self.text, self.summary, self.figures, self.settings)


def main(argv: list[str] | None = None) -> None:
    """Report on a sweep or a grid; raises UserError."""
    args = cli.parse_args(Args, argv, "python -m mlp_jax.report")
    out = args.out or args.directory
    files.check_writable(out)
    if out.resolve() != args.directory.resolve() and stored_metadata(out):
        raise UserError(f"{out} has results of its own: name another --out")
    made = report(args.directory, args.data_dir)
    paths = [out / "summary.json", *(out / "figures" / name for name, _ in made.figures)]
    paths += [out / "report.html"] * args.html
    check_replaceable(paths)
    if args.html:
        from mlp_jax.analysis.page import NOTE

        check_replaceable(paths[-1:], (NOTE,))
    files.make_directory(out / "figures")
    files.write_json(out / "summary.json", made.summary)
    for path, (_, figure) in zip(paths[1:], made.figures, strict=False):
        files.save_figure(path, figure)
    if args.html:
        files.write_text(paths[-1], made.page)
    print(made.text, "", *paths, sep="\n")


def report(directory: str | Path, data_dir: str | Path | None = None) -> Report:
    """The spread of the sweep in `directory`, or the ranking of a grid; writes nothing.

    UserError if there are no runs, or if they were trained on other data.
    """
    directory = files.expand(directory)
    if cells := grid_cells(directory):
        if stored_metadata(directory):
            raise UserError(f"{directory} has runs of its own and a grid: move one of them away")
        return report_grid(cells)
    if read_metadata(directory).seed is not None:
        raise UserError(f"{directory} has a single run, which has no spread")
    return report_sweep(directory, data_dir)


def report_sweep(directory: Path, data_dir: str | Path | None) -> Report:
    # --help does without
    from mlp_jax.analysis.crossed import crossed_indices
    from mlp_jax.analysis.figures import figures
    from mlp_jax.analysis.summary import summarize
    from mlp_jax.analysis.tables import format_table
    from mlp_jax.records import rows
    from mlp_jax.results import count_processors, open_dataset, read_blocks, read_families

    metadata, paths = read_metadata(directory), rows.checked_files(directory)
    processors = count_processors(paths, metadata)
    dataset = open_dataset(directory, metadata, data_dir)
    families = read_families(paths, dataset.test.labels, dataset.n_classes)
    config, crossed = metadata.config, {}
    for family in families:
        if family.vary == "crossed":
            sums = read_blocks(paths, family, config)
            crossed[family.rate] = sums and crossed_indices(sums, used_streams(config))
    summary = summarize(families, metadata.recipe, config, processors, crossed)
    title = metadata.title(metadata.changed({family.rate for family in families}))
    drawn = list(figures(families, summary, dataset.test.images, crossed, title))
    settings = dataclasses.asdict(config) | {"data, SHA-256": metadata.fingerprint}
    settings["learning_rate"] = format_rates({family.rate for family in families})
    settings |= {f"runs on {name}": count for name, count in processors.items()}
    settings |= metadata.environment["versions"]
    return Report(format_table(summary), summary, drawn, settings)


def report_grid(cells: Sequence[Path]) -> Report:
    from mlp_jax.analysis.ranking import draw_ranking, format_ranking, rank
    from mlp_jax.records import rows
    from mlp_jax.results import count_images, count_processors

    stored = [read_metadata(cell) for cell in cells]
    if len({(each.config.dataset, each.config.split) for each in stored}) > 1:
        raise UserError(f"{cells[0].parent} has sweeps on different images: report on each of them")
    scores: dict[str, dict] = {}
    resolution = 0.0
    for cell, metadata, name in zip(cells, stored, name_cells(cells, stored), strict=True):
        paths = rows.row_files(cell)  # none of a sweep that has just begun
        mixed = any("--allow-mixed" in each for each in count_processors(paths, metadata))
        checked = rows.checked_files(cell) if paths else []
        scores[name + " (--allow-mixed)" * mixed] = rows.read_scores(checked) if checked else {}
        resolution = 1 / count_images(checked) if checked else resolution
    summary = rank(scores, resolution=resolution)
    if not summary["cells"]:
        raise UserError(f"{cells[0].parent} has no runs to rank: report on each of its sweeps")
    first = stored[0]
    rates = {run_id.learning_rate for cell in scores.values() for run_id in cell}
    changed = shared_items([each.changed(rates) for each in stored])
    drawn = []
    if any(cell["runs"] for cell in summary["cells"]):
        figure = draw_ranking(summary, f"{first.title(changed)} on {first.device_kind}")
        drawn = [("grid.png", figure)]
    settings = shared_items([vars(each.config) for each in stored])
    settings |= {"learning_rate": format_rates(rates)} | first.environment["versions"]
    return Report(format_ranking(summary), summary, drawn, settings)


def format_rates(rates: set[float]) -> str:
    return ", ".join(f"{rate:.9g}" for rate in sorted(rates))


def shared_items(dicts: Sequence[dict]) -> dict:
    """The items that all have, in the order of the first."""
    items = dicts[0].items()
    return {name: v for name, v in items if all(name in d and d[name] == v for d in dicts)}


def name_cells(cells: Sequence[Path], stored: Sequence[Metadata]) -> list[str]:
    """Names from the settings in which the sweeps differ, whatever their directories are called.

    UserError if two have the same settings, or different data under one name.
    """
    # the settings determine the program
    alike = [each._replace(seed=None, program=None) for each in stored]
    known = [settings(each) | numerics(each) for each in alike]
    cell_of: dict[str, Path] = {}
    names = cell_names(known) if len(cells) > 1 else [cells[0].name]
    if len(set(names)) < len(names):  # a sweep for each learning rate
        rates = [{"learning_rate": each.config.learning_rate} for each in stored]
        names = cell_names([own | rate for own, rate in zip(known, rates, strict=True)])
    for cell, metadata, name in zip(cells, stored, names, strict=True):
        if (other := cell_of.setdefault(name, cell)) != cell:
            raise UserError(f"{other} and {cell} have the same settings: move one of them away")
        if metadata.fingerprint != stored[0].fingerprint:
            name = metadata.config.dataset
            raise UserError(f"{cell} and the others were trained on different data named {name}")
    return names


if __name__ == "__main__":
    cli.run_cli(main)
