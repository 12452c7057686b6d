"""Sweeps that are compacted, also while others read them: each row counts once."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import write

import mlp_jax as mj
from mlp_jax.compact import main as compact_main
from mlp_jax.errors import UserError
from mlp_jax.files import write_signed_json
from mlp_jax.records import compaction, rows
from mlp_jax.results import open_target


def test_a_sweep_that_is_compacted_while_it_is_compared_is_one_line(swept, data):
    swept("--seeds", "0:4", "--chunk", "2", "--out", "s")
    target = open_target("s")
    compact_main(["s"])
    with pytest.raises(UserError, match=r"parquet is gone, as after `compact`: run this again"):
        target.read_family(Path(data[1]))
    assert len(open_target("s").read_family(Path(data[1])).seeds) == 4


def test_a_file_that_goes_while_it_is_read_is_one_line(swept, monkeypatch):
    swept("--seeds", "0:4", "--chunk", "2", "--out", "s")
    listed_before = rows.row_files(Path("s"))
    compact_main(["s"])
    monkeypatch.setattr(rows, "row_files", lambda directory: listed_before)
    with pytest.raises(UserError, match=r"parquet is gone, as after `compact`"):
        mj.read_runs("s")
    with pytest.raises(UserError, match=r"parquet is gone, as after `compact`"):
        rows.read_metadata(listed_before[0])


def test_a_reader_beside_compact_sees_each_row_once(swept, monkeypatch):
    swept("--seeds", "0:6", "--chunk", "1", "--devices", "1", "--out", "s")
    place = Path("s")
    seen, read_merge = [], rows.read_merge
    steps = iter(compaction_steps(place))

    def reading(where):  # between a look at the note and the listing, compact makes a step
        merge = read_merge(where)
        next(steps, None)
        return merge

    monkeypatch.setattr(rows, "read_merge", reading)
    while len(seen) < 8:
        seen.append(sorted(seed for *_, seed in rows.run_ids(rows.read_table(listed(place), []))))
    assert seen == [list(range(6))] * 8


def listed(place):
    """The files that are read, as they were when listed."""
    kept = Path("kept")
    shutil.rmtree(kept, ignore_errors=True)
    paths = rows.row_files(place)
    kept.mkdir()
    for path in paths:
        if path.exists():
            shutil.copy(path, kept)
    return sorted(kept.iterdir())


def compaction_steps(place):
    """What `compact` does, one change of the directory after another."""
    paths = sorted(place.glob("runs/*.parquet"))
    merged, content = rows.encode(place, pa.concat_tables(map(pq.read_table, paths)))
    note = {"into": merged.name, "merged": [path.name for path in paths]}
    write_signed_json(place / rows.MERGE, note)
    yield
    merged.write_bytes(content)
    yield


def test_compact_keeps_what_a_damaged_merge_merged(swept, caplog):
    swept("--seeds", "0:4", "--chunk", "1", "--devices", "1", "--out", "s")
    for _ in compaction_steps(Path("s")):
        pass
    merged = Path("s/runs", rows.read_merge(Path("s"))["into"])
    merged.write_bytes(merged.read_bytes()[:-1] + b"x")
    compaction.compact(Path("s"))
    assert len(mj.read_runs("s")) == 4
    assert "renamed to" in caplog.text


def test_a_sweep_keeps_what_a_damaged_merge_merged(swept, monkeypatch, caplog):
    swept("--seeds", "0:4", "--chunk", "1", "--out", "s")
    before = rows.read_runs("s")
    monkeypatch.setattr(compaction, "finish_merge", lambda directory: None)  # killed before it
    compaction.compact(Path("s"))
    (merged,) = rows.row_files(Path("s"))
    merged.write_bytes(merged.read_bytes()[:-9])
    swept("--seeds", "0:5", "--out", "s")
    assert f"renamed to _{merged.name}.corrupt" in caplog.text
    assert rows.read_runs("s").slice(0, 4).equals(before)  # with their seconds: not trained again
    assert len(rows.read_runs("s")) == 5


def test_compact_refuses_a_run_in_two_files_and_names_them(swept):
    swept("--seeds", "0:2", "--chunk", "1", "--devices", "1", "--out", "s")
    table = pq.read_table(rows.row_files(Path("s"))[0])
    write("s", table.set_column(table.column_names.index("seconds"), "seconds", [[9.0]]))
    with pytest.raises(UserError, match=r"s/runs/.* and s/runs/.* contain the same run: remove \w"):
        compact_main(["s"])
    assert len(rows.row_files(Path("s"))) == 3


def test_a_sweep_ends_an_interrupted_merge(swept, monkeypatch):
    swept("--seeds", "0:4", "--chunk", "1", "--devices", "1", "--out", "s")
    with monkeypatch.context() as patched:
        patched.setattr(compaction, "finish_merge", lambda directory: None)  # killed before it
        compaction.compact(Path("s"))

    def count():  # as other readers of Parquet do
        return sum(pq.read_metadata(path).num_rows for path in Path("s/runs").iterdir())

    assert count() == 8
    swept("--seeds", "0:4", "--out", "s")
    assert count() == 4


def test_compact_of_a_damaged_file_is_one_line(swept):
    swept("--seeds", "0:2", "--chunk", "1", "--devices", "1", "--out", "s")
    path = rows.row_files(Path("s"))[1]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=rf"{path.name} is damaged"):
        compact_main(["s"])
    assert len(rows.row_files(Path("s"))) == 2


def test_compact_passes_over_sweeps_of_a_grid_without_rows(swept, capsys):
    swept("--seeds", "0:2", "--chunk", "1", "--devices", "1", "--dropout", "0", "0.5", "--out", "g")
    for path in rows.row_files(Path("g/dropout=0.0")):
        path.unlink()
    compact_main(["g"])
    assert capsys.readouterr().out == "g/dropout=0.5: 2 files are now 1\n"


@pytest.mark.parametrize(
    ("others", "advice"),
    [
        ("1:3", "move one of them away, and train its other runs again"),
        ("0:1", "remove {theirs}, since the other has all of its runs"),
        ("0:3", "remove {ours}, since the other has all of its runs"),
    ],
)
def test_a_run_in_two_files_is_not_read_twice(swept, others, advice):
    for out, seeds in (("a", "0:2"), ("b", others)):
        swept("--seeds", seeds, "--chunk", "4", "--out", out)
    (ours, theirs) = (next(Path(out, "runs").iterdir()).name for out in "ab")
    shutil.copytree("b/runs", "a/runs", dirs_exist_ok=True)
    message = f"contain the same run: {advice.format(ours=ours, theirs=theirs)}"
    with pytest.raises(UserError, match=message):
        mj.read_runs("a")


def test_a_whole_merge_while_a_directory_is_listed(swept, monkeypatch):
    swept("--seeds", "0:6", "--chunk", "1", "--devices", "1", "--out", "s")
    listing, calls = rows._listed, []

    def listed(place):  # a directory is not read at one moment
        found = listing(place)
        if not calls:
            calls.append(1)
            compaction.compact(place)
            return [found[0], *listing(place)]
        return found

    monkeypatch.setattr(rows, "_listed", listed)
    assert len(mj.read_runs("s")) == 6
