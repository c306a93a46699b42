"""Rows made on other machines, on the launcher's clock: what a node writes is read on, shifted and appended here.

A node's stamps are CLOCK_MONOTONIC of that node. The offset (node minus launcher) is measured before, during and
after each window; between two measurements it is taken as linear, outside of them as constant::

    offset     o───────o───────────o          t_launcher = t_node - offset(t_node)
    node time  before  during      after      |error| <= the larger bound of the two neighbours, and half the bend

Rows arrive after the window they belong to, so both neighbours of every stamp are known by then. What is shifted
are instants; counters in ns, durations and wall-clock stamps stay as they are.
"""

from __future__ import annotations

import csv
import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corun.clock import Offset
from corun.load.ring import ring_to_csv

WALL_CLOCK = "t_wall_ns"
PROFILER_FILES = ("profile.csv", "gpu.csv", "process.csv", "profiler.json")
OWN_FILES = ("processes.jsonl", "schedule.npy", "drift.json")


@dataclass(frozen=True)
class Comparison:
    """One comparison of two clocks: offset_ns is the node's minus the launcher's, at t_ns of the launcher."""

    when: str
    t_ns: int
    offset_ns: int
    bound_ns: int
    rtt_ns: int

    @classmethod
    def of(cls, when: str, t_ns: int, offset: Offset) -> Comparison:
        """What a handshake found at t_ns of the launcher."""
        return cls(when, t_ns, offset.offset_ns, offset.bound_ns, offset.rtt_ns)


@dataclass
class ClockMap:
    """From a node's clock to the launcher's; without any comparison they are the same clock."""

    comparisons: list[Comparison] = field(default_factory=list)

    def add(self, comparison: Comparison) -> None:
        """One more comparison; they come in the order of time."""
        self.comparisons.append(comparison)

    def to_node(self, t_ns: int) -> int:
        """An instant of the launcher that is still to come, on the node's clock."""
        return t_ns + (self.comparisons[-1].offset_ns if self.comparisons else 0)

    def to_launcher(self, t_ns: int) -> int:
        """An instant of the node on the launcher's clock, in whole ns."""
        return t_ns - self._offset_at(t_ns)

    def _offset_at(self, node_ns: int) -> int:
        known = self.comparisons
        if not known:
            return 0
        right = bisect_right(known, node_ns, key=lambda one: one.t_ns + one.offset_ns)
        if right in (0, len(known)):
            return known[max(0, right - 1)].offset_ns
        before, after = known[right - 1], known[right]
        begin, end = before.t_ns + before.offset_ns, after.t_ns + after.offset_ns
        bend = after.offset_ns - before.offset_ns
        return before.offset_ns + bend * (node_ns - begin) // (end - begin)


def is_instant(column: str) -> bool:
    """True for a column that holds an instant of CLOCK_MONOTONIC: t_ns, t_..._ns and the stamps s_..._ns."""
    return column != WALL_CLOCK and column.endswith("_ns") and column.startswith(("t_", "s_"))


class Shifter:
    """Rows of one CSV file in the order they were written, their instants moved to the launcher's clock."""

    def __init__(self, clock: ClockMap) -> None:
        self._clock = clock
        self._places: list[int] | None = None
        self.header: list[str] = []

    def lines(self, whole: bytes) -> bytes:
        """Whole lines in, whole lines out; the first line of a file is its header and is not given back."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        for row in csv.reader(io.StringIO(whole.decode("utf-8", "replace"), newline="")):
            if self._places is None:
                self.header = row
                self._places = [place for place, name in enumerate(row) if is_instant(name)]
            else:
                writer.writerow(self._moved(row))
        return out.getvalue().encode()

    def _moved(self, row: list[str]) -> list[str]:
        for place in self._places or ():
            if place < len(row) and row[place].lstrip("-").isdigit() and row[place] != "0":
                row[place] = str(self._clock.to_launcher(int(row[place])))
        return row


def complete_rows(data: bytes) -> int:
    """How many bytes of `data`, which begins at a row, are whole rows: a quoted line break does not end one."""
    end = data.rfind(b"\n") + 1
    while end and data.count(b'"', 0, end) % 2:
        end = data.rfind(b"\n", 0, end - 1) + 1
    return end


def destination(name: str, node: str, measured: bool) -> str | None:
    """Where a node's file lies in the run directory; None for what is not brought.

    The profile of the measured node is the run's own; that of any other node is nodes/<node>/profile.csv and so on.
    """
    if name in OWN_FILES or name.endswith((".ring", ".part", ".tmp")):
        return None
    return f"nodes/{node}/{name}" if name in PROFILER_FILES and not measured else name


class Merged:
    """One CSV file of the run directory that grows by what a node wrote; several nodes may share it."""

    def __init__(self, path: Path, clock: ClockMap) -> None:
        self.path = path
        self.taken = 0
        self._shifter = Shifter(clock)

    def append(self, data: bytes) -> int:
        """Add the whole rows of `data`, which begins where the last call ended; returns how many bytes were used."""
        used = complete_rows(data)
        rows = self._shifter.lines(data[:used])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            if file.tell() == 0 and self._shifter.header:
                file.write((",".join(self._shifter.header) + "\n").encode())
            file.write(rows)
        self.taken += used
        return used


def rings_to_rows(directory: Path, service: str, segment: int) -> None:
    """The ring of one client and window, if there is one, becomes rows of its table and is removed."""
    ring = directory / f"{service}.{segment}.ring"
    if ring.exists():
        ring_to_csv(ring, directory / f"{service}.csv")
        ring.unlink()


def summary(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Comparisons for the manifest: all of them, and the largest bound in ns."""
    found: Iterator[dict[str, Any]] = (vars(one) for one in comparisons)
    return {"bound_ns": max((one.bound_ns for one in comparisons), default=0), "comparisons": list(found)}


__all__ = [
    "ClockMap",
    "Comparison",
    "Merged",
    "Shifter",
    "complete_rows",
    "destination",
    "is_instant",
    "rings_to_rows",
    "summary",
]
