"""What a killed run had measured is found again, and a living run is left alone."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from corun.clock import NS_PER_S, Anchor
from corun.load.ring import Context, Metadata, RingWriter
from corun.report.recover import QUIET_S, recover
from corun.run.read import read
from corun.run.table import EventLog
from corun.testing.runs import T0_NS, FakeRun, write_run

TIMES = {"alone": 4.0, "train": 2.0, "corun": 4.0}
LATER_S = time.time() + 86_400.0  # long after any file this suite writes


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """Killed in its second window: one request answered, one sent, one not yet."""
    path = write_run(tmp_path / "run", FakeRun(duration_s=TIMES, stop_after=1))
    start_ns = T0_NS + 60 * NS_PER_S
    EventLog(path / "events.csv").write("window_start", "launcher", "corun", "segment 1", start_ns)
    context = Context("resnet18", "resnet18", arm="corun", segment=1)
    ring = RingWriter(path / "infer_client" / "resnet18.1.ring", 3, Metadata(context, anchor=Anchor(T0_NS, 0)))
    due = [start_ns + number * NS_PER_S for number in range(3)]
    ring.fill([100, 101, 102], due, [0, 0, 0], [0, 0, 0])
    for index in (0, 1):
        ring.tx(index, due[index], due[index], due[index] + 1000)
    ring.rx(0, 0, 1, due[0] + 20_000_000, 40, [due[0] + 1_000_000 * n for n in range(1, 11)])
    ring.close()
    return path


def test_killed_window_is_recovered(killed: Path) -> None:
    """Answered requests become OK rows, sent ones LOST rows, unsent ones none; the window ends where records end."""
    said = recover(killed, LATER_S)
    assert "recovered 2 requests of resnet18 in segment 1" in said
    run = read(killed)
    table = run.infer_client["resnet18"]
    mine = table["segment"] == 1
    assert table["status"][mine].tolist() == ["OK", "LOST"]
    assert table["sojourn_ms"][mine][0] == pytest.approx(20.0)
    (window,) = run.select("corun")
    assert window.stop_ns - window.start_ns == NS_PER_S
    assert json.loads((killed / "manifest.json").read_text())["segments"][-1]["recovered"] is True
    assert not list(killed.rglob("*.ring"))


def test_recovering_twice_changes_nothing(killed: Path) -> None:
    """A second time there is nothing to do."""
    recover(killed, LATER_S)
    before = (killed / "infer_client" / "resnet18.csv").read_bytes()
    assert recover(killed, LATER_S) == []
    assert (killed / "infer_client" / "resnet18.csv").read_bytes() == before


def test_half_written_rows_are_replaced(killed: Path) -> None:
    """Rows of the window that a launcher had begun to write when it was killed are not counted twice."""
    ring = next(killed.rglob("*.ring"))
    content = ring.read_bytes()
    recover(killed, LATER_S)
    table = killed / "infer_client" / "resnet18.csv"
    rows = table.read_bytes()
    ring.write_bytes(content)
    table.write_bytes(rows[:-30])
    recover(killed, LATER_S)
    assert table.read_bytes() == rows


def test_living_run_is_left_alone(killed: Path) -> None:
    """A run whose files changed a moment ago may be alive: nothing is touched."""
    changed_s = max(file.stat().st_mtime for file in killed.rglob("*"))
    assert recover(killed, changed_s + QUIET_S / 2) == []
    assert list(killed.rglob("*.ring"))


def test_complete_run_is_left_alone(tmp_path: Path) -> None:
    """A run that ended has nothing to recover."""
    path = write_run(tmp_path / "run", FakeRun(duration_s=TIMES))
    manifest = (path / "manifest.json").read_bytes()
    assert recover(path, LATER_S) == []
    assert (path / "manifest.json").read_bytes() == manifest


def test_damaged_ring_is_named(killed: Path) -> None:
    """A ring that cannot be read stays where it is, and is named."""
    ring = next(killed.rglob("*.ring"))
    ring.write_bytes(np.zeros(10).tobytes())
    said = recover(killed, LATER_S)
    assert any("not recovered" in sentence and ring.name in sentence for sentence in said)
    assert ring.exists()
