"""What the commands share: flags into a dataclass, shards, signals, and errors in one line.

Imports no jax, so `--help` and bad flags are answered at once.
"""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro

from mlp_jax.errors import UserError
from mlp_jax.files import expand
from mlp_jax.training.config import DEFAULT_RECIPE, FROM_DATA, Config, RecipeName

Args = TypeVar("Args")
# help texts say what happens without the flag, so not "(default: None)"
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
OptionalText = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
OFF = (tyro.conf.FlagCreatePairsOff,)  # --quiet, but no --no-quiet


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingArgs:
    """Flags of every command that trains."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    recipe: RecipeName
    """Named settings; individual flags override them."""
    data_dir: OptionalPath = None
    """TFDS's data directory; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    manual_dir: OptionalPath = None
    """Directory with four IDX files: published ones, or your own under a new --dataset name."""
    teacher: OptionalPath = None
    """Distillation: directory of runs with weights, whose mean prediction replaces the labels;
    default: for best-distilled the committee that comes with mlp_jax."""
    checkpoint_every: int = 10
    """Epochs between checkpoints; 0: save only when stopped."""
    allow_mixed: bool = False
    """Continue even if the code, a version or the numerics have changed; new rows are marked."""
    tensorboard: bool = False
    """Also write curves for TensorBoard, to tensorboard/ beside the results."""
    quiet: bool = False
    """Print only the result and errors."""

    def __post_init__(self):
        if self.teacher:  # instead of the recipe's own
            object.__setattr__(self, "config", dataclasses.replace(self.config, teacher=""))

    def data_options(self) -> dict:
        """The arguments of `load_data` other than the Config."""
        names = ("data_dir", "manual_dir", "quiet", "teacher")
        return {name: getattr(self, name) for name in names}

    def options(self, *more: str) -> dict:
        """Arguments of `open_experiment`, and the fields that the command adds."""
        names = ("recipe", "checkpoint_every", "allow_mixed", *more)
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class _Recipe:
    recipe: RecipeName = DEFAULT_RECIPE


def parse_recipe(argv: Sequence[str] | None) -> RecipeName:
    """The recipe on a command line, which sets the defaults of the other flags."""
    with _one_line_errors():
        named, _ = tyro.cli(_Recipe, args=argv, return_unknown_args=True, add_help=False)
    return named.recipe


def parse_args(
    kind: type[Args], argv: Sequence[str] | None, prog: str, default: Any = None
) -> Args:
    """A command line as the dataclass `kind`, whose docstring is the help's first paragraph.

    UserError if it cannot be parsed.
    """
    with _one_line_errors():
        args = tyro.cli(kind, args=argv, default=default, config=OFF, prog=prog)
    for flag, value in itertools.pairwise(["the first argument", *_words(argv), "-"]):
        if value == "" or (flag.startswith("--") and flag.endswith("=")):
            raise UserError(f"{flag.rstrip('=')} has an empty value")
    paths = {name: value for name, value in vars(args).items() if isinstance(value, Path)}
    # the shell leaves --out=~/runs as it is
    return dataclasses.replace(args, **{name: expand(path) for name, path in paths.items()})


def expand_grid(argv: Sequence[str] | None) -> list[list[str]]:
    """A command line for each combination of those settings in `argv` that have several values.

    `--hidden 512 512` is one network, and `--hidden 512x512 1024x1024` are two. `--flag=value` is
    split, and `--ray` without an address gets "auto", which tyro could not tell from a missing one.
    """
    parts = (word.split("=", 1) if word.startswith("--") else [word] for word in _words(argv))
    words = list(itertools.chain(*parts))
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    groups = [words[i:j] for i, j in itertools.pairwise([0, *starts, len(words)])]
    several = {f.name for f in dataclasses.fields(Config)} - {"hidden", "split", *FROM_DATA}
    choices = []
    for group in filter(None, groups):
        flag, values = group[0], group[1:]
        if group == ["--ray"]:
            choices.append([[flag, "auto"]])
        elif flag == "--hidden" and any("x" in value for value in values):
            choices.append([[flag, *value.split("x")] for value in values])
        elif flag[2:].replace("-", "_") in several and len(values) > 1:
            choices.append([[flag, value] for value in values])
        else:
            choices.append([group])
    return [list(itertools.chain(*chosen)) for chosen in itertools.product(*choices)]


@contextlib.contextmanager
def _one_line_errors():
    """Reduce the box that tyro draws around an error to its first message."""
    printed = io.StringIO()
    closed = contextlib.redirect_stdout(io.StringIO()) if sys.stdout is None else None
    try:
        with contextlib.redirect_stderr(printed), closed or contextlib.nullcontext():
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        output = printed.getvalue().splitlines()
        lines = [line.strip("│ ") for line in output if line[:1] == "│"]
        lines = lines or [line.strip() for line in output[2:]]  # no box where there is no UTF-8
        message = " ".join(itertools.takewhile(lambda line: line.strip("─-"), lines))
        if "Perhaps you meant:" in lines:
            close = lines[lines.index("Perhaps you meant:") + 1].split()[0]
            message += f"; did you mean {close}?"
        raise UserError(message.removeprefix("Error parsing ")) from None


def check_training(args: Any) -> None:
    """UserError for flags of `TrainingArgs` that cannot be followed."""
    check_at_least(args, {"checkpoint_every": 0})
    teacher, out = args.teacher, args.out
    if teacher and out and (teacher / "weights").resolve() == (out / "weights").resolve():
        raise UserError(f"--teacher and --out are both {out}: name another --out")
    if args.tensorboard:
        from mlp_jax.tensorboard import check_installed

        check_installed()


def check_at_least(args, least: dict[str, int]) -> None:
    """UserError if a number in `args` is less than its bound in `least`."""
    for name, bound in least.items():
        if isinstance(value := getattr(args, name), int) and value < bound:
            raise UserError(f"--{name.replace('_', '-')} must be at least {bound}, not {value}")


JOBS = {
    # public variables of a job's processes: index, count, first index, step of the indices
    "a SLURM array": tuple(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "STEP")),
    # before srun, which starts a daemon of mpirun on each node
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "", ""),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "", ""),
}


def parse_shard(text: str | None, environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """`I/N` as (I, N); by default the shard of the job this process belongs to, else (0, 1)."""
    if text is not None:
        if not (match := re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)):
            raise UserError(f"--shard takes I/N, as in 0/4 for the first of four, not {text!r}")
        index, count = int(match[1]), int(match[2])
    else:
        index, count = _job_shard(environ)
    if index >= count:
        raise UserError(f"--shard {index}/{count}: shards are numbered from 0 to N - 1")
    return index, count


def _job_shard(environ: Mapping[str, str]) -> tuple[int, int]:
    found = []
    for names in JOBS.values():
        index, count, first, step = (environ.get(name, "") for name in names)
        if index.isdecimal() and count.isdecimal() and int(count) > 1:
            found.append(((int(index) - int(first or 0)) // int(step or 1), int(count)))
    if len(found) > 1 and "SLURM_ARRAY_TASK_ID" in environ:  # the processes of a task of an array
        (task, n_tasks), (process, n_processes) = found[:2]
        return task * n_processes + process, n_tasks * n_processes
    if found:
        return found[0]
    if "JOB_COMPLETION_INDEX" in environ:
        raise UserError(
            "an indexed Kubernetes job does not say how many completions it has:"
            " add --shard $JOB_COMPLETION_INDEX/N"
        )
    return 0, 1


class StopSignals:
    """Within the block, the first SIGINT or SIGTERM requests a stop, the second ends the process.

    `requested` is the signal's number, or 0. Python handles a signal once compiled code returns,
    that is, after the current epoch. Main thread only.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self):
        self.requested = 0
        # signals that the parent had ignored, as nohup does, stay ignored
        numbers = [n for n in self.NUMBERS if signal.getsignal(n) != signal.SIG_IGN]
        self._handlers = {number: signal.getsignal(number) for number in numbers}
        self.listen()
        return self

    def listen(self) -> None:
        """Handle the signals; call it again once a library may have replaced the handlers."""
        for number in self._handlers:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = number
        name = signal.Signals(number).name
        line = f"\n{name}: finishing this epoch; send it again to exit at once\n"
        with contextlib.suppress(OSError):  # closed; and print is unsafe in a handler
            os.write(2, line.encode())

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def exit(self, line: str) -> NoReturn:
        """Print one more line and exit with the status of the requested signal."""
        print(f"{signal.Signals(self.requested).name}: {line}", file=sys.stderr)
        sys.exit(128 + self.requested)


def command_line(prog: str, argv: Sequence[str] | None, *more: str) -> str:
    """The command line `argv` as typed, with `more` but without --overwrite."""
    if Path(sys.argv[0]).name == "mlp-jax":  # perhaps the only one on the PATH
        prog = prog.replace("python -m mlp_jax.", "mlp-jax ")
    elif shutil.which("python") != sys.executable:  # its environment is not activated
        prog = prog.replace("python", sys.orig_argv[0], 1)
    words = (word for word in _words(argv) if word != "--overwrite")
    return shlex.join([*prog.split(), *words, *more])


def _words(argv: Sequence[str] | None) -> Sequence[str]:
    return sys.argv[1:] if argv is None else argv


def run_cli(main: Callable[[], None]) -> None:
    """Run a command's `main` as a process: an error becomes one line and an exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not closed
            stream.reconfigure(errors="backslashreplace")  # as of a path on an ASCII terminal
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except OSError as error:  # a full disk or a lost mount; files written before are complete
        place = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{place}", file=sys.stderr)
        sys.exit(1)
    except UnicodeEncodeError as error:  # of pyarrow
        print(f"error: a path is not UTF-8: {error.object}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        # XLA's own error cannot be imported without jax
        words = ("RESOURCE_EXHAUSTED", "Out of memory")
        if not (isinstance(error, MemoryError) or any(word in str(error) for word in words)):
            raise
        print("error: out of memory: try fewer --lanes or a smaller network", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
