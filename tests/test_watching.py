"""What is seen while runs train: bars, TensorBoard's curves, and the picture at the end."""

import contextlib
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from matplotlib.text import Text
from PIL import Image

from mlp_jax import bars, tensorboard
from mlp_jax.errors import UserError
from mlp_jax.records.rows import read_runs
from mlp_jax.sweep import main as sweep_main
from mlp_jax.train import main as train_main
from mlp_jax.training import programs

TINY = [
    *("--dataset", "kmnist", "--hidden", "16", "8", "--quiet", "--tensorboard"),
    *("--batch-size", "32", "--epochs", "3", "--learning-rate", "0.1"),
]


def scalars(directory):
    """By tag, the (step, value) that TensorBoard shows: a later session purges from its start."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown = {}
    for path in sorted(Path(directory).glob("events.*"), key=lambda p: p.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            content = content[12 + size + 4 :]
            if event.session_log.status == SessionLog.START:
                shown = {tag: [p for p in ps if p[0] < event.step] for tag, ps in shown.items()}
            for value in event.summary.value:
                shown.setdefault(value.tag, []).append((event.step, value.simple_value))
    return shown


def numbers(pairs):
    assert [step for step, _ in pairs] == list(range(1, len(pairs) + 1))
    return [value for _, value in pairs]


def test_in_a_log_a_bar_is_a_line_now_and_then():
    code = "import time\nfrom mlp_jax import bars\nbars.SECONDS_PER_LINE = 0.2\n"
    code += "for _ in bars.progress_bar(range(100), quiet=False): time.sleep(0.01)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert b"\r" not in done.stderr
    assert done.stdout == b""
    first, *between, last = done.stderr.decode().splitlines()
    assert first.startswith("0%|")
    assert last.startswith("100%|")
    assert 1 <= len(between) <= 8


def test_in_a_log_there_are_none_of_tfds_bars():
    code = "import time\nfrom mlp_jax.data import sources\nwith sources.hush(False):\n"
    code += "    from tensorflow_datasets.core.utils.tqdm_utils import tqdm\n"
    code += "    for _ in tqdm(range(100)): time.sleep(0.01)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stderr == b""


def test_on_a_terminal_it_is_redrawn(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in bars.progress_bar(range(3), quiet=False):
        pass
    assert "\r" in capsys.readouterr().err
    for _ in bars.progress_bar(range(3), quiet=True):
        pass
    assert capsys.readouterr().err == ""


def test_a_resumed_run_has_each_epoch_once_in_tensorboard(small_dir, here):
    flags = [*TINY, "--data-dir", str(small_dir), "--out", "a"]
    train_main(flags)
    row = read_runs("a").to_pylist()[0]
    for again in ("--overwrite", "--resume", "--resume"):  # the last two find it finished
        shown = scalars("a/tensorboard")
        assert set(shown) == {"train/loss", "test/loss", "test/accuracy"}
        for name in ("train_loss", "test_loss"):
            assert numbers(shown[name.replace("_", "/")]) == pytest.approx(row[f"{name}_by_epoch"])
        accuracy = np.array(row["test_correct_by_epoch"]) / 130
        assert numbers(shown["test/accuracy"]) == pytest.approx(accuracy)
        train_main([*flags, again])


def test_a_sweep_has_mean_and_sd_by_epoch_of_all_its_runs(small_dir, here):
    flags = [*TINY, "--data-dir", str(small_dir), "--vary", "all", "init", "--out", "s"]
    sweep_main([*flags, "--seeds", "0:2"])
    sweep_main([*flags, "--seeds", "0:5"])
    rows = read_runs("s").to_pylist()
    assert sorted(p.name for p in Path("s/tensorboard").iterdir()) == ["all-lr0.1", "init-lr0.1"]
    for vary in ("all", "init"):
        shown = scalars(f"s/tensorboard/{vary}-lr0.1")
        correct = np.array([r["test_correct_by_epoch"] for r in rows if r["vary"] == vary]) / 130
        loss = np.array([r["train_loss_by_epoch"] for r in rows if r["vary"] == vary])
        assert len(correct) == 5
        for name, values in (("test/accuracy", correct), ("train/loss", loss)):
            assert numbers(shown[f"{name}_mean"]) == pytest.approx(values.mean(axis=0))
            assert numbers(shown[f"{name}_SD"]) == pytest.approx(values.std(axis=0, ddof=1))


def test_the_sd_of_losses_that_hardly_differ_is_right(monkeypatch, here):
    """Summed in float32 over 3,000 runs, it would be mostly rounding."""
    losses = np.float32(2.3 + 1e-5 * np.random.default_rng(0).normal(size=(3000, 2)))
    table = pa.table({"vary": ["all"] * 3000, "learning_rate": [0.1] * 3000, "seed": range(3000)})
    for name in ("test_loss", "train_loss", "test_correct"):
        values = pa.array(list(losses), pa.list_(pa.float32()))
        table = table.append_column(name, pa.array(losses[:, -1]))
        table = table.append_column(f"{name}_by_epoch", values)
    monkeypatch.setattr(tensorboard.rows, "row_files", lambda directory: [directory])
    monkeypatch.setattr(tensorboard.rows, "read_runs", lambda directory: table)
    dataset = types.SimpleNamespace(test=types.SimpleNamespace(labels=[0]))
    tensorboard.write_families(types.SimpleNamespace(directory=here, dataset=dataset))
    shown = numbers(scalars("tensorboard/all-lr0.1")["train/loss_SD"])
    assert shown == pytest.approx(losses.std(axis=0, ddof=1, dtype=np.float64))


def test_a_metric_that_is_no_number_hides_no_run(small_dir, here, monkeypatch):
    """As a fork's; report keeps such runs, too."""

    def edited(*args, **options):
        metrics, predictions = evaluate(*args, **options)
        return metrics | {"ratio": jnp.float32(np.nan)}, predictions

    evaluate = programs.evaluate
    monkeypatch.setattr(programs, "evaluate", edited)
    sweep_main([*TINY, "--data-dir", str(small_dir), "--seeds", "0:2", "--out", "s"])
    assert len(numbers(scalars("s/tensorboard/all-lr0.1")["test/accuracy_SD"])) == 3


def test_without_tensorboardx_it_is_one_line_before_training(small_dir, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"pip install 'mlp_jax\[tensorboard\]'"):
        train_main([*TINY, "--data-dir", str(small_dir), "--out", "a"])
    assert not Path("a").exists()


def test_a_run_ends_with_the_path_of_its_curve(small_dir, here, capsys):
    loud = [flag for flag in TINY if flag not in ("--quiet", "--tensorboard")]
    train_main([*loud, "--data-dir", str(small_dir), "--out", "a"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "a/curve.png"
    with Image.open(last) as image:
        assert image.width == 1080
        assert len(image.convert("L").getcolors()) > 20


def test_a_curve_that_was_lost_is_drawn_again(small_dir, here):
    flags = [*TINY, "--data-dir", str(small_dir), "--out", "a"]
    train_main(flags)
    Path("a/curve.png").unlink()  # as if killed just before it
    train_main([*flags, "--resume"])
    assert Path("a/curve.png").exists()


@pytest.mark.parametrize("left", [2, 0, None, "torn"])
def test_epochs_that_metrics_lack_are_added(left, small_dir, here):
    """As if the disk had been full when they were written."""
    flags = [*TINY, "--data-dir", str(small_dir), "--out", "a"]
    train_main(flags)
    path = Path("a/metrics.jsonl")

    def read():
        return [json.loads(line) for line in path.read_text().splitlines()]

    before = read()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(path.read_text()[:-9] if left == "torn" else "".join(lines[:left]))
    if left is None:
        path.unlink()
    train_main([*flags, "--resume"])
    found, mean = read(), json.loads(Path("a/summary.json").read_text())["train_seconds"] / 3
    wanted = [metrics.pop("seconds") for metrics in before][: left if left == 2 else 0]
    seconds = [metrics.pop("seconds") for metrics in found]
    assert seconds == pytest.approx(wanted + [mean] * (3 - len(wanted)))
    assert found == before


def test_one_epoch_has_no_curve_and_needs_no_matplotlib(small_dir, here):
    code = "import sys; from mlp_jax.train import main; main(sys.argv[1:])\n"
    code += "assert 'matplotlib' not in sys.modules"
    flags = [*TINY, "--data-dir", str(small_dir), "--epochs", "1", "--out", "a"]
    subprocess.run([sys.executable, "-c", code, *flags], check=True)
    assert not Path("a/curve.png").exists()


def test_figures_say_how_many_runs_of_what_and_on_what(small_dir, here, monkeypatch):
    from mlp_jax.analysis import figures
    from mlp_jax.compare import main as compare_main
    from mlp_jax.report import main as report_main

    drawn, new_figure = [], figures.new_figure

    def remembering(*args):
        drawn.append(new_figure(*args))
        return drawn[-1]

    for module in ("figures", "ranking"):
        monkeypatch.setattr(f"mlp_jax.analysis.{module}.new_figure", remembering)
    quiet = [flag for flag in TINY if flag != "--tensorboard"]
    flags = [*quiet, "--data-dir", str(small_dir), "--seeds", "0:4"]
    sweep_main([*flags, "--vary", "all", "init", "--out", "s"])
    sweep_main([*flags, "--dropout", "0", "0.5", "--out", "grid"])
    report_main(["s", "--data-dir", str(small_dir)])
    report_main(["grid", "--data-dir", str(small_dir)])
    compare_main(["s", "grid/dropout=0.0", "--data-dir", str(small_dir), "--out", "c"])
    assert len(drawn) >= 5
    for figure, *_ in drawn:
        words = " ".join(" ".join(text.get_text() for text in figure.findobj(Text)).split())
        assert re.search(r"keras-sgd \(.*dataset kmnist.*\)(, 4 runs)? on cpu", words), words
        assert re.search(r"\b(4\sruns|4 shared seeds|n = 4)\b", words), words


def test_what_readme_logs_elsewhere(small, monkeypatch):
    """README's lines for Weights & Biases, into a stand-in that has their two functions."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = readme.partition("<!-- wandb -->\n```python\n")[2].partition("```")[0]
    assert code.count('mj.load_dataset("mnist")') == code.count("range(8)") == 1
    code = code.replace('mj.load_dataset("mnist")', "small").replace("range(8)", "range(3)")
    logged, asked = {}, {}

    @contextlib.contextmanager
    def init(project, config):
        asked.update(config)
        log = types.SimpleNamespace(
            log=lambda values, step: logged.setdefault(step, {}).update(values)
        )
        yield log

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    scope = {"small": small}
    exec(code, scope)
    assert asked["optimizer"] == "momentum"
    history = scope["epoch"].history
    assert set(logged) == {1}
    for name, by_run in history.items():
        assert logged[1][name] == pytest.approx(np.mean(by_run))
        assert logged[1][f"{name}_sd"] == pytest.approx(np.std(by_run, ddof=1))
