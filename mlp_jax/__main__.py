"""`mlp-jax COMMAND ...` and `python -m mlp_jax COMMAND ...`: the commands under one name.

Imports only the chosen command's module, so `--help` answers at once.
"""

import importlib
import sys

from mlp_jax.errors import suggest

COMMANDS = {
    "train": "train one run, epoch by epoch",
    "sweep": "train many runs of one recipe, in a directory that can be resumed",
    "report": "show how much a sweep's test accuracy varies, and why",
    "compare": "test whether the runs of one sweep score higher than those of another",
    "verify": "retrain some stored runs and compare every number",
    "compact": "merge the many small files of a sweep",
    "predict": "recognize the digit in an image, and show how sure trained runs are",
    "demo": "write a page to draw digits on: one file, which needs no server",
}
USAGE = "usage: mlp-jax COMMAND [--help] ...\n       mlp-jax --version"


def main() -> None:
    """Run the command that `sys.argv` names, as `python -m mlp_jax.COMMAND` would."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE, "", *(f"  {name:<9}{text}" for name, text in COMMANDS.items()), sep="\n")
    elif name == "--version":
        from mlp_jax.records.provenance import version

        print(version("mlp_jax") or "unknown: not installed")
    elif name in COMMANDS:
        from mlp_jax import cli

        module = importlib.import_module(f"mlp_jax.{name}")
        cli.run_cli(lambda: module.main(argv))
    else:
        print(f"error: unknown command {name!r}{suggest(name, COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
