"""The console script: every command under one name, and an answer before anything is imported."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import mlp_jax
from mlp_jax import __main__ as console
from mlp_jax.records.rows import read_runs

PACKAGE = Path(mlp_jax.__file__).parent


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["mlp-jax", *argv])
    console.main()


def test_every_command_is_there_and_listed(monkeypatch, capsys):
    ends = "cli.run_cli(main)\n"
    modules = {path.stem for path in PACKAGE.glob("*.py") if path.read_text().endswith(ends)}
    assert set(console.COMMANDS) == modules
    run(monkeypatch, "--help")
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in modules)
    run(monkeypatch)
    assert capsys.readouterr().out == listed


def test_it_says_its_version(monkeypatch, capsys):
    run(monkeypatch, "--version")
    assert capsys.readouterr().out == f"{importlib.metadata.version('mlp_jax')}\n"


def test_help_imports_no_library():
    code = "import sys; sys.argv[1:] = ['--help']; from mlp_jax.__main__ import main; main()\n"
    code += "assert not {'jax', 'numpy', 'tyro'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_command_gets_the_flags_that_follow_it(small_dir, here, monkeypatch):
    flags = ["--dataset", "kmnist", "--hidden", "8", "--batch-size", "32", "--epochs", "1"]
    flags += ["--data-dir", str(small_dir), "--seeds", "0:2", "--quiet", "--out", "s"]
    run(monkeypatch, "sweep", *flags)
    assert read_runs("s")["seed"].to_pylist() == [0, 1]


def test_an_error_is_one_line_and_status_2(monkeypatch, capsys):
    for argv, line in (
        (["swep"], "error: unknown command 'swep'; did you mean sweep?\n"),
        (["train", "--epochs", "0"], "error: epochs must be positive and finite, not 0\n"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *argv)
        assert stop.value.code == 2
        assert capsys.readouterr().err == line


def test_files_and_functions_fit_a_screen_or_a_few():
    for path in Path(mlp_jax.__file__).parent.rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, (path, node.name)
