"""A run directory read back as arrays or frames."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import InputError
from corun.run.read import read, read_any, read_table
from corun.run.records import EVENTS, TRAIN, Column
from corun.run.table import EventLog, TableWriter

COLUMNS = (Column("t_ns", "ns", "int", ""), Column("value", "ms", "float", ""), Column("name", "", "str", ""))


def _manifest(path: Path, **fields: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "manifest.json").write_text(json.dumps({"status": "complete", **fields}))
    return path


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 2**62),
            st.one_of(st.none(), st.floats(-1e9, 1e9)),
            st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=8),
        ),
        max_size=8,
    )
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, float | None, str]]) -> None:
    """What TableWriter wrote is read back exactly: ns as int64, an empty cell as NaN, any text of a line as it was."""
    path = tmp_path_factory.mktemp("table") / "t.csv"
    with TableWriter(path, COLUMNS) as table:
        table.rows(rows)
    back = read_table(path, COLUMNS)
    assert back["t_ns"].tolist() == [row[0] for row in rows]
    assert back["name"].tolist() == [row[2] for row in rows]
    for value, (_, wrote, _) in zip(back["value"], rows, strict=True):
        assert np.isnan(value) if wrote is None else value == wrote


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 60))
def test_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, keep: int) -> None:
    """A file cut at any byte has exactly its whole rows: a number cut in the middle never counts."""
    path = tmp_path_factory.mktemp("cut") / "t.csv"
    path.write_text("t_ns,value,name\n1000,1.25,a\n2000,2.25,b\n3000,3.25,c\n"[:keep])
    whole = path.read_text().count("\n") - 1
    if whole < 0:
        assert len(read_any(path)) == 0
        return
    assert read_table(path, COLUMNS)["t_ns"].tolist() == [1000, 2000, 3000][:whole]


def test_missing_files_are_empty_tables(tmp_path: Path) -> None:
    """A run that wrote nothing but its manifest reads as empty tables, not as an error."""
    run = read(_manifest(tmp_path / "run"))
    assert run.infer_client == {}
    assert len(run.train["t_start_ns"]) == 0
    assert run.profile == {}
    assert run.windows == ()
    assert run.arms == ()


def test_windows_by_arm_and_repeat(tmp_path: Path) -> None:
    """Windows come from the manifest, arms in the order alone, train, corun however they were interleaved."""
    segments = [
        {"index": index, "arm": arm, "repeat": repeat, "start_ns": index * 10, "stop_ns": index * 10 + 5}
        for index, (arm, repeat) in enumerate([("corun", 0), ("alone", 0), ("alone", 1), ("corun", 1)])
    ]
    run = read(_manifest(tmp_path / "run", segments=segments))
    assert run.arms == ("alone", "corun")
    assert [window.segment for window in run.select("corun")] == [0, 3]
    assert [window.segment for window in run.select("alone", 1)] == [2]


def test_not_a_run(tmp_path: Path) -> None:
    """A directory without a manifest is refused with its path."""
    with pytest.raises(InputError, match="not a run directory"):
        read(tmp_path)


def test_damaged_number_is_named(tmp_path: Path) -> None:
    """A cell that is no number names the file and the column."""
    path = tmp_path / "t.csv"
    path.write_text("t_ns,value,name\n12,abc,x\n")
    with pytest.raises(InputError, match=r"t\.csv, column value"):
        read_table(path, COLUMNS)


def test_other_version(tmp_path: Path) -> None:
    """A table without a column that is needed says which."""
    path = tmp_path / "t.csv"
    path.write_text("t_ns,name\n")
    with pytest.raises(InputError, match="lacks the columns value"):
        read_table(path, COLUMNS)


def test_unknown_columns_keep_their_kind(tmp_path: Path) -> None:
    """The profiler's columns depend on the machine: instants are exact, numbers NaN where empty, the rest text."""
    path = tmp_path / "profile.csv"
    path.write_text("arm,t_ns,fan_rpm,label\nalone,9007199254740993,12.5,a\nalone,9007199254740994,,b\n")
    table = read_any(path)
    assert table["t_ns"].tolist() == [9007199254740993, 9007199254740994]
    assert table["fan_rpm"][0] == 12.5
    assert np.isnan(table["fan_rpm"][1])
    assert table["label"].tolist() == ["a", "b"]


def test_frames(tmp_path: Path) -> None:
    """With frames every table is a DataFrame, and an instant that never was is <NA>, not 0."""
    path = _manifest(tmp_path / "run")
    EventLog(path / "events.csv").write("stop", "launcher", t_ns=7)
    with TableWriter(path / "train.csv", TRAIN) as table:
        table.row({"arm": "train", "t_start_ns": 5})
    run = read(path, frames=True)
    assert run.events["t_ns"].tolist() == [7]
    assert list(run.events.columns) == [column.name for column in EVENTS]
    assert run.train["t_end_ns"].isna().all()
