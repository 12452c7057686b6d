"""`python -m mlp_jax.compare`: whether the runs of one sweep score higher than those of another."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mlp_jax import cli, files
from mlp_jax.errors import UserError
from mlp_jax.records.directory import check_replaceable
from mlp_jax.records.provenance import differs_in_code, numerics, settings
from mlp_jax.training.run import make_runs

if TYPE_CHECKING:  # --help does without
    from mlp_jax.analysis.compare import Comparison, Decision
    from mlp_jax.results import Target

PROG = "python -m mlp_jax.compare"
LOOKED = (
    "The verdict is that of the confidence sequence after {} pairs. The other intervals, p and P"
    " are not valid here: they assume that the number of runs was fixed in advance."
)
STEP = 10  # seeds between two looks of --until-decided


@dataclasses.dataclass(frozen=True)
class Args:
    """Test whether the runs of one sweep score higher than those of another. DIR:FAMILY@RATE names
    one family or learning rate of a sweep, as in runs/why:order or runs/rates@0.1.
    """

    sweeps: tyro.conf.Positional[tuple[str, ...]]
    """Two or more sweeps."""
    margin: float = 0.05
    """Difference in percentage points below which two sweeps count as equivalent."""
    until_decided: bool = False
    """Train more seeds of both sweeps until a confidence sequence, valid at every look, decides."""
    max_seeds: int = 1000
    """Number of seeds after which --until-decided gives up."""
    out: cli.OptionalPath = None
    """Directory for comparison.json and figures; default: nothing is written."""
    data_dir: cli.OptionalPath = None
    """Where TFDS keeps its data; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""


def main(argv: list[str] | None = None) -> None:
    """Print a verdict on each pair of sweeps; raises UserError."""
    args = cli.parse_args(Args, argv, PROG)
    if not 0 < args.margin < 100:
        raise UserError(f"--margin must be between 0 and 100 points, not {args.margin}")
    if len(args.sweeps) < 2 or (args.until_decided and len(args.sweeps) > 2):
        raise UserError("name two sweeps" if args.until_decided else "name two or more sweeps")
    if args.out:
        files.check_writable(args.out)

    # slow to import, so after bad flags are answered
    from mlp_jax.results import open_target

    targets = [open_target(sweep) for sweep in args.sweeps]
    check_comparable(targets)
    if args.out:
        figures = figure_paths(args.out, math.comb(len(targets), 2))
        check_replaceable([args.out / "comparison.json", *figures])
    decision = None
    if args.until_decided:
        again = cli.command_line(PROG, argv)
        targets, decision = train_until_decided(targets, args, again)
    pairs = list(itertools.combinations(targets, 2))
    compared = [compare_targets(a, b, args.margin / 100, args.data_dir) for a, b in pairs]
    if decision:  # a verdict of one look would be wrong too often after many
        compared = [compared[0]._replace(verdict=decision.verdict)]
    for (a, b), comparison in zip(pairs, compared, strict=True):
        print(format_verdict(a, b, comparison), format_details(a, b, comparison), sep="\n")
    if decision:
        print(LOOKED.format(decision.pairs))
    if args.out:
        write(args.out, pairs, compared, decision)


def compare(a: str | Path, b: str | Path, *, margin: float = 0.05) -> "Comparison":
    """A `Comparison` of the test accuracies (as fractions) of two sweeps, from the rows on disk.

    Each is a directory, or DIR:FAMILY@RATE as on the command line. `margin` is in percentage
    points. Paired by seed if at least half of the smaller sweep's seeds are shared.
    UserError if the two were evaluated on different data.
    """
    from mlp_jax.results import open_target

    targets = [open_target(str(sweep)) for sweep in (a, b)]
    check_comparable(targets)
    return compare_targets(*targets, margin / 100)


def check_comparable(targets: Sequence["Target"]) -> None:
    """UserError if the targets were evaluated on different data."""
    first = targets[0]
    for other in targets[1:]:
        for name in ("dataset", "split"):
            ours, theirs = (getattr(each.metadata.config, name) for each in (first, other))
            if ours != theirs:
                raise UserError(f"{first.name} has {name}={ours}, and {other.name} {name}={theirs}")


def compare_targets(
    a: "Target", b: "Target", margin: float, data_dir: Path | None = None
) -> "Comparison":
    """A against B, of the runs that did not diverge; `margin` is a fraction."""
    from mlp_jax.analysis.compare import compare as compare_scores
    from mlp_jax.analysis.predictions import error_covariance, sd_over_test_sets

    for target in (a, b):
        if len(target.finite) < 2:
            raise UserError(f"{target.name} has fewer than two runs that did not diverge")
    shared = a.finite.keys() & b.finite.keys()
    counts = [target.read_family(data_dir).counts for target in (a, b)]
    right = [target.read_correct(shared, counts[0].labels) if shared else {} for target in (a, b)]
    pairs = ((right[0][seed], right[1][seed]) for seed in shared)
    covariance = error_covariance(pairs, len(counts[0].labels))
    spread = sd_over_test_sets(*counts, pairs=len(shared), covariance=covariance)
    options = {"sd_over_test_sets": spread, "resolution": 1 / len(counts[0].labels)}
    return compare_scores(a.finite, b.finite, margin=margin, **options)


def format_verdict(a: "Target", b: "Target", comparison: "Comparison") -> str:
    """The verdict in one sentence."""
    from mlp_jax.analysis.compare import verdict_sentence

    return verdict_sentence(comparison, *labels(a, b), scored=a.metadata.config.split)


def labels(a: "Target", b: "Target") -> tuple[str, str]:
    """The last parts of the names, if these tell the targets apart."""
    short = (Path(a.name).name, Path(b.name).name)
    return short if len(set(short)) == 2 else (a.name, b.name)


def differences(a: "Target", b: "Target") -> dict[str, tuple]:
    """What may have made the difference: settings, and what else can change a number."""
    from mlp_jax.training.programs import FIXED_VALUES

    ours, theirs = (
        settings(each.metadata)
        | numerics(each.metadata)
        | {"family": each.vary, "learning_rate": each.rate}
        for each in (a, b)
    )
    found = {n: (ours[n], theirs.get(n)) for n in ours if ours[n] != theirs.get(n)}
    # other settings make another program of the same code
    programs = [dataclasses.replace(each.metadata.config, **FIXED_VALUES) for each in (a, b)]
    edited = differs_in_code(a.metadata, b.metadata)
    if not edited or programs[0] != programs[1] or "teacher" in found:
        found.pop("program", None)
    return found


def format_details(a: "Target", b: "Target", comparison: "Comparison") -> str:
    """What the two differ in, and what the comparison rests on."""
    texts = [
        "training code" if name == "program" else f"{name.replace('_', ' ')} ({ours}, {theirs})"
        for name, (ours, theirs) in differences(a, b).items()
    ]
    text = f"They differ in {', '.join(texts) or 'no setting'}; p = {comparison.p_value:.2g}"
    if not math.isnan(comparison.correlation):
        text += (
            f"; paired by seed with a correlation of {comparison.correlation:.2f}, which leaves"
            f" {comparison.variance_ratio:.2f} of the variance of independent runs"
        )
    return "\n".join([text + ".", *caveats(a, comparison), *caveats(b, comparison), ""])


def caveats(target: "Target", comparison: "Comparison") -> list[str]:
    """Which runs are excluded from the numbers or were trained differently, and if too few."""
    diverged = sorted(seed for seed, score in target.scores.items() if math.isnan(score))
    two = len(target.scores) - len(diverged) == 2 and not comparison.pairs
    of = target.processors.items()
    n_mixed = sum(count for name, count in of if "--allow-mixed" in name)
    n, left_out = len(diverged), "excluded from all numbers here"
    texts = {
        f"{n} runs that diverged, {left_out}: seeds {diverged}": n,
        f"{n_mixed} runs in its directory that were pooled by --allow-mixed": n_mixed,
        # Welch's interval, by simulation: with 2 normal runs against 2 to 100
        "two runs, which are too few: the interval misses in up to 12 % of cases, not 5 %": two,
    }
    return [f"{target.name} has {text}." for text, there in texts.items() if there]


def compared_scores(a: "Target", b: "Target", comparison: "Comparison") -> list[list[float]]:
    """Accuracies of the runs of each side that `comparison` is of."""
    shared = a.finite.keys() & b.finite.keys()
    paired = bool(comparison.pairs)
    return [
        [s for seed, s in each.finite.items() if seed in shared or not paired] for each in (a, b)
    ]


def figure_paths(out: Path, n_pairs: int) -> list[Path]:
    numbers = [""] if n_pairs == 1 else [f"-{i + 1}" for i in range(n_pairs)]
    return [out / f"comparison{number}.png" for number in numbers]


def write(
    out: Path,
    pairs: Sequence[tuple],
    comparisons: Sequence["Comparison"],
    decision: "Decision | None",
) -> None:
    """comparison.json, with p values adjusted for the number of pairs, too; a figure for each."""
    from mlp_jax.analysis.compare import holm
    from mlp_jax.analysis.figures import draw_comparison
    from mlp_jax.analysis.summary import to_json
    from mlp_jax.results import count_images

    adjusted = holm([comparison.p_value for comparison in comparisons]).tolist()
    files.make_directory(out)
    record, paths = [], figure_paths(out, len(pairs))
    for i, ((a, b), comparison) in enumerate(zip(pairs, comparisons, strict=True)):
        each = {"a": a.name, "b": b.name, "differences": differences(a, b)}
        each |= comparison._asdict() | {"p_value_holm": adjusted[i]}
        looked = [LOOKED.format(decision.pairs)] if decision else []
        known = [*caveats(a, comparison), *caveats(b, comparison)]
        each |= {"until_decided": decision, "caveats": [*looked, *known]}
        record.append(to_json(each | {"says": format_verdict(a, b, comparison)}))
        compared = compared_scores(a, b, comparison)
        names = []
        for label, side in zip(labels(a, b), (a, b), strict=True):
            about = side.metadata
            title = about.title(about.changed([side.rate]))
            names.append(f"{label}, {title} on {about.device_kind}")
        figure = draw_comparison(*compared, comparison, tuple(names), count_images(a.paths))
        files.save_figure(paths[i], figure)
    units = "fractions (0 to 1); intervals at 95 %"
    files.write_json(out / "comparison.json", {"units": units, "comparisons": record})


def train_until_decided(
    targets: Sequence["Target"], args: Args, again: str
) -> tuple[list["Target"], "Decision"]:
    """Train the same seeds of both until their difference is decided, or max_seeds; reopen them."""
    from mlp_jax.analysis.compare import FIRST_LOOK, decide
    from mlp_jax.results import count_images, open_target
    from mlp_jax.sweep import Cell, train_cell
    from mlp_jax.training.parallel import use_cores

    if args.max_seeds < FIRST_LOOK:
        raise UserError(f"--max-seeds must be at least {FIRST_LOOK}, not {args.max_seeds}")
    if taught := [target.name for target in targets if target.metadata.config.teacher]:
        line = f"{taught[0]} has a teacher: add seeds with sweep --teacher, and then compare"
        raise UserError(line)
    use_cores()
    resolution = 1 / count_images(targets[0].paths)
    seeds = sorted(set().union(*(target.scores for target in targets)))
    lacking = (i for i, seed in enumerate(seeds) if any(seed not in t.scores for t in targets))
    wanted = max(FIRST_LOOK, next(lacking, len(seeds)))
    with cli.StopSignals() as stop:
        while True:
            seeds += range(seeds[-1] + 1, seeds[-1] + 1 + wanted - len(seeds))
            for target in targets:
                config, recipe = target.metadata.config, target.metadata.recipe
                own = sorted({*seeds[:wanted], *target.scores})  # fewer runs would take fewer lanes
                runs = make_runs(own, [target.vary], [target.rate])
                data = {"data_dir": args.data_dir, "quiet": True}
                cell = Cell(target.directory, config, runs)
                options = {"recipe": recipe, "lanes": target.lanes}
                options["keep_weights"] = any(target.directory.glob("weights/*.npz"))
                if train_cell(cell, data, options, stop):
                    stop.exit(f"what is finished is stored; resume with: {again}")
            targets = [open_target(target.name) for target in targets]
            a, b = (target.scores for target in targets)
            pairs = [d for seed in seeds[:wanted] if not math.isnan(d := a[seed] - b[seed])]
            if not pairs:
                raise UserError("in every pair a run diverged: there is nothing to compare")
            decision = decide(pairs, margin=args.margin / 100, resolution=resolution)
            print(format_decision(decision, len(pairs), *labels(*targets)), flush=True)
            if decision.verdict != "undecided" or wanted >= args.max_seeds:
                return targets, decision
            wanted = min(wanted + STEP, args.max_seeds)


def format_decision(decision: "Decision", n_pairs: int, a: str, b: str) -> str:
    """What the confidence sequence says after `n_pairs`, in one line."""
    mean, low, high = (100 * end for end in decision.difference)
    ends = "too few for an interval" if math.isnan(low) else f"{low:+z.3f} to {high:+z.3f}"
    verdicts = {"better": f"{a} is better", "worse": f"{b} is better"}
    verdict = verdicts.get(decision.verdict, decision.verdict)
    of = f"{decision.pairs} of " * (decision.pairs < n_pairs)
    return f"{of}{n_pairs} pairs: {mean:+z.3f} ({ends}) points: {verdict}"


if __name__ == "__main__":
    cli.run_cli(main)
