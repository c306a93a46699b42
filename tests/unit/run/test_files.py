"""Tables, events and the run directory survive kills and tell what was wrong."""

from __future__ import annotations

import contextlib
import csv
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from corun.errors import InputError, RunFault
from corun.run import directory, records
from corun.run.table import EventLog, TableWriter

TABLES = {name: getattr(records, name) for name in ("INFER_CLIENT", "INFER_SERVER", "TRAIN", "EVENTS", "SUMMARY")}


@pytest.mark.parametrize("name", TABLES)
def test_columns_are_unique_and_documented(name: str) -> None:
    """Every column of a table has one name, a known kind and a meaning."""
    table = TABLES[name]
    assert len(set(records.names(table))) == len(table)
    assert all(column.kind in ("int", "float", "str") and column.doc for column in table)


def test_the_originals_columns_come_first() -> None:
    """Scripts written for the original's CSVs find its columns under their names, first."""
    assert records.names(records.INFER_CLIENT)[:8] == (
        "work_start",
        "infer_model_name",
        "train_model_name",
        "image_size",
        "device",
        "file_name",
        "latency",
        "request_rate",
    )


def test_rows_are_on_disk_before_close(tmp_path: Path) -> None:
    """A killed process keeps every row it wrote; a missing value is an empty cell."""
    writer = TableWriter(tmp_path / "a.csv", ("x", "y"))
    writer.row({"x": 1})
    assert (tmp_path / "a.csv").read_text() == "x,y\n1,\n"
    writer.close()


def test_any_text_stays_in_its_cell(tmp_path: Path) -> None:
    """Commas, quotes, line breaks and carriage returns in a cell do not break the row."""
    with TableWriter(tmp_path / "a.csv", ("x", "y")) as writer:
        writer.row(('a, "b"\nc\rd', 1))
    with open(tmp_path / "a.csv", newline="") as file:
        assert list(csv.reader(file)) == [["x", "y"], ['a, "b"\nc d', "1"]]


def test_append_goes_on_below(tmp_path: Path) -> None:
    """A second writer adds rows and no second header."""
    for value in (1, 2):
        with TableWriter(tmp_path / "a.csv", ("x",), append=True) as writer:
            writer.row((value,))
    assert (tmp_path / "a.csv").read_text() == "x\n1\n2\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_one_clear_fault() -> None:
    """Writing to a full disk raises RunFault with the path, not a bare OSError, and leaves no file open."""
    with pytest.raises(RunFault, match="/dev/full"):
        TableWriter("/dev/full", ("x",))
    assert "/dev/full" not in _open_files()


def _open_files() -> set[str]:
    """Paths of this process's open files."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
    return found


def _write_events(path: Path, name: str) -> None:
    log = EventLog(path)
    for number in range(200):
        log.write("tick", "test", name, f"{number}, with a comma\nand a line break")
    log.close()


def test_events_of_many_processes_do_not_mix(tmp_path: Path) -> None:
    """Four processes append to one events.csv and every row stays whole."""
    path = tmp_path / "events.csv"
    EventLog(path).close()
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_events, args=(path, f"p{index}")) for index in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 800
    assert {row["name"] for row in rows} == {"p0", "p1", "p2", "p3"}
    assert all(row["kind"] == "tick" and row["t_ns"].isdigit() for row in rows)


def test_the_manifest_is_there_from_the_start(tmp_path: Path) -> None:
    """A run that is killed says running; one that ended says how."""
    run = directory.RunDirectory.create(tmp_path / "run", {"a": 1}, "abc")
    first = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert first["status"] == "running"
    assert {"argv", "versions", "hardware", "clock_anchor", "config"} <= set(first)
    run.finish("complete", extra=2)
    last = directory.read_manifest(tmp_path / "run")
    assert (last["status"], last["extra"]) == ("complete", 2)


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    """Reading another directory names it and says what is missing."""
    with pytest.raises(InputError, match="is not a run directory"):
        directory.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(InputError, match="is not a manifest"):
        directory.read_manifest(tmp_path)


def test_a_directory_that_cannot_be_made_is_bad_input(tmp_path: Path) -> None:
    """A result path below a file is refused with the path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the run directory"):
        directory.RunDirectory.create(tmp_path / "file" / "run", {}, "abc")
