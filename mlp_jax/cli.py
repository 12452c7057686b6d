"""What the command lines share: flags into a dataclass, errors in one line, and signals.

Imports no jax, so that `--help` and every bad flag are answered at once.
"""

import argparse
import contextlib
import io
import os
import re
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import tyro

from mlp_jax.training.config import DEFAULT_RECIPE, RECIPES, UserError, nearest

Args = TypeVar("Args")


def recipe_in(argv: Sequence[str] | None) -> str:
    """The recipe that a command line names, whose values are the defaults of its other flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", nargs="?", default=DEFAULT_RECIPE)
    # a flag without its value is for `parse_args` to tell
    recipe = first.parse_known_args(argv)[0].recipe or DEFAULT_RECIPE
    if recipe not in RECIPES:
        names = ", ".join(RECIPES)
        raise UserError(f"unknown recipe {recipe}{nearest(recipe, RECIPES)} (there are {names})")
    return recipe


def parse_args(default: Args, argv: Sequence[str] | None, **texts: str) -> Args:
    """A command line over the dataclass `default`, of whose fields tyro.MISSING are required.

    `texts` are tyro's prog and description. UserError, in one line, for what cannot be read.
    """
    said = io.StringIO()
    off = (tyro.conf.FlagCreatePairsOff,)  # --quiet, but no --no-quiet
    try:
        # tyro draws its errors as a box of many lines; a user, or a log, wants one
        with contextlib.redirect_stderr(said):
            return tyro.cli(type(default), args=argv, default=default, config=off, **texts)
    except SystemExit as stop:
        if not stop.code:
            raise
        untitled = re.sub("╭.*╮", "", said.getvalue())
        text = " ".join(re.sub("[╰╯│─]+|-{3,}", " ", untitled).split())
        text = re.sub(
            r"^Error parsing | (Argument helptext|For full helptext|Got errors).*", "", text
        )
        text = re.sub(r" Perhaps you meant: (--\S+).*", r"; did you mean \1?", text)
        raise UserError(text) from None


def check_at_least(args, least: dict[str, int]) -> None:
    """UserError for a field of `args` that is a number less than it must be."""
    for name, bound in least.items():
        if isinstance(value := getattr(args, name), int) and value < bound:
            raise UserError(f"--{name.replace('_', '-')} must be at least {bound}, not {value}")


class StopSignals:
    """Within the block, the first SIGINT or SIGTERM is a request, the second ends the process.

    `requested` is the signal's number, or 0. Python runs its handlers between two bytecodes of the
    main thread, which may wait for minutes inside a compiled program; the wakeup socket is written
    at once, and a thread of its own listens. To be used in the main thread.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self):
        self.requested = 0
        self._listener, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # as set_wakeup_fd demands
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        # Python's own handlers would raise KeyboardInterrupt, or end the process; what the parent
        # lets its children ignore, as nohup does, stays ignored
        numbers = [n for n in self.NUMBERS if signal.getsignal(n) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def _listen(self) -> None:
        while heard := self._listener.recv(1):
            if heard[0] not in self.NUMBERS:
                continue
            if self.requested:
                os._exit(128 + heard[0])
            self.requested = heard[0]
            name = signal.Signals(self.requested).name
            print(f"\n{name}: stopping after this epoch; once more to leave now", file=sys.stderr)

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()  # which ends the thread
        self._thread.join()
        self._listener.close()

    def leave(self, line: str) -> NoReturn:
        """End the process by the requested signal's exit status, with a line that says more."""
        print(f"{signal.Signals(self.requested).name}: {line}", file=sys.stderr)
        sys.exit(128 + self.requested)


def command(prog: str, argv: Sequence[str] | None, *more: str) -> str:
    """The command line `argv` as it would be typed, with `more`, and overwriting nothing."""
    words = sys.argv[1:] if argv is None else argv
    return shlex.join([*prog.split(), *(word for word in words if word != "--overwrite"), *more])


def run_front(main: Callable[[], None]) -> None:
    """Run a front's `main` as a process: what goes wrong ends in one line and its status."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except OSError as error:  # a full disk, a lost mount; what was written before is whole
        place = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{place}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:  # XLA's own, which cannot be imported without jax
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        print("error: the devices have too little memory: try fewer --lanes", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
