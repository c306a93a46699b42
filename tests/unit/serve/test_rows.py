"""The server's rows on disk."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.serve.tools import FakeServable, request

from corun.clock import Anchor
from corun.errors import RunFault
from corun.run.records import INFER_SERVER, names
from corun.serve.queue import Request
from corun.serve.rows import RowLog
from corun.serve.statistics import Segment
from corun.wire import Status

ANCHOR = Anchor(1_000_000_000, 5_000_000_000)


def answered(id: int = 0, detail: str = "", arm: str = "alone") -> Request:
    item = request(b"payload", id=id, t_done=2_000_000_000, intended=1_500_000_000)
    item.segment = Segment(arm, 1, 2)
    item.info = FakeServable().info
    item.stamps[2:] = [2_000_000_000 + step for step in range(1, 9)]
    item.reply = b"12345"
    item.batch = 3
    item.detail = detail
    return item


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_row_has_every_column(tmp_path: Path) -> None:
    """The file's columns are INFER_SERVER; times and counts are those of the request."""
    log = RowLog(tmp_path, "svc", ANCHOR)
    log.add(answered(id=7))
    log.close()
    (row,) = read(log.path)
    assert tuple(row) == names(INFER_SERVER)
    assert float(row["work_start"]) == pytest.approx(5.5)
    assert float(row["latency"]) == pytest.approx(8 / 1e6)
    expected = {"service": "svc", "arm": "alone", "repeat": "1", "segment": "2", "id": "7", "status": "OK"}
    expected |= {"payload_bytes": "7", "reply_bytes": "5", "batch": "3", "infer_model_name": "fake"}
    assert {name: row[name] for name in expected} == expected
    assert row["s_tx_ns"] == "2000000008"


def test_what_was_not_measured_is_empty(tmp_path: Path) -> None:
    """A rejected request of an unarmed server: no stages, no model, no batch, no segment, never a zero."""
    item = request(b"x")
    item.end(Status.REJECTED, "the queue is full")
    item.connection.local = False
    log = RowLog(tmp_path, "svc", ANCHOR)
    log.add(item)
    log.close()
    (row,) = read(log.path)
    for name in ("work_start", "infer_model_name", "batch", "arm", "repeat", "segment", "s_picked_ns", "latency"):
        assert row[name] == ""
    assert (row["status"], row["detail"]) == ("REJECTED", "the queue is full")


@given(st.lists(st.text(max_size=20), max_size=5))
@settings(max_examples=60)
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, details: list[str]) -> None:
    """Commas, quotes and line breaks in a reason or an arm's name come back from a CSV reader."""
    log = RowLog(tmp_path_factory.mktemp("rows"), "a,b", ANCHOR)
    for detail in details:
        log.add(answered(detail=detail, arm=f"arm{detail}"))
    log.close()
    rows = read(log.path)
    assert [row["detail"] for row in rows] == details
    assert [row["arm"] for row in rows] == [f"arm{detail}" for detail in details]
    assert all(row["service"] == "a,b" for row in rows)


def test_flushing_writes_slices_in_order(tmp_path: Path) -> None:
    """Each flush writes at most its limit; what is on disk is always whole rows, in order."""
    log = RowLog(tmp_path, "svc", ANCHOR)
    for id in range(100):
        log.add(answered(id))
    seen = [0]
    while len(log):
        log.flush()
        ids = [int(row["id"]) for row in read(log.path)]
        assert ids == list(range(len(ids)))
        assert log.path.read_bytes().endswith(b"\n")
        seen.append(len(ids))
    assert seen == [0, 32, 64, 96, 100]
    assert log.written == 100
    log.close()


def test_a_file_is_continued_behind_its_last_whole_row(tmp_path: Path) -> None:
    """A row that a crash cut in two is removed; the header is not written twice."""
    log = RowLog(tmp_path, "svc", ANCHOR)
    log.add(answered(1))
    log.close()
    with open(log.path, "ab") as file:
        file.write(b"1.5,fake,,half a ro")
    log = RowLog(tmp_path, "svc", ANCHOR)
    log.add(answered(2))
    log.close()
    assert [row["id"] for row in read(log.path)] == ["1", "2"]


def test_a_directory_that_cannot_be_written_is_a_fault_with_its_path(tmp_path: Path) -> None:
    """The path and the system's reason are named."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFault, match=r"cannot write .*file.*Not a directory|File exists"):
        RowLog(tmp_path / "file", "svc", ANCHOR)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_a_fault(tmp_path: Path) -> None:
    """ENOSPC becomes RunFault with the path."""
    (tmp_path / "svc.csv").symlink_to("/dev/full")
    with pytest.raises(RunFault, match="No space left"):
        RowLog(tmp_path, "svc", ANCHOR)
