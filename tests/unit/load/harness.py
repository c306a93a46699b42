"""What the tests of clients share: a segment of work against an echo server, run and read back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corun.arrivals import ROW
from corun.clock import NS_PER_S, anchor, now_ns
from corun.load.closed import ClosedLoop
from corun.load.ring import Context, Metadata, Records, RingWriter, read_ring
from corun.load.sender import Sender
from corun.load.timing import Timing, make_waiter
from corun.load.work import Counts, Watch, Work
from corun.testing.echo import EchoServer
from corun.wire import connect

TIMING = Timing(rung="timerfd", policy="other")
PAYLOAD = bytes(1024)


@dataclass(frozen=True)
class Result:
    """Counts and records of a segment that ran."""

    counts: Counts
    records: Records


def rows(offsets_s: Sequence[float], stream: int = 0, first_id: int = 0) -> np.ndarray:
    """Schedule rows due at these offsets (s)."""
    made = np.zeros(len(offsets_s), ROW)
    made["intended_ns"] = np.rint(np.asarray(offsets_s) * NS_PER_S)
    made["stream"] = stream
    made["id"] = np.arange(first_id, first_id + len(offsets_s))
    return made


def send(
    server: EchoServer,
    offsets_s: Sequence[float],
    path: Path,
    payload: bytes = PAYLOAD,
    patience_s: float = 60.0,
    watches: Sequence[Watch] = (),
    timing: Timing = TIMING,
) -> Result:
    """Run the open-loop sender over offsets from now; patience counts from the last of them."""
    start = now_ns() + 20_000_000
    work = Work.of_rows(rows(offsets_s), start, 0, [payload])
    finish_by = start + round((max(offsets_s, default=0.0) + patience_s) * NS_PER_S)
    ring = RingWriter(path, len(work), Metadata(Context(), ("one.jpg",), anchor()))
    waiter = make_waiter(timing)
    with connect(server.address) as sock:
        counts = Sender(sock, work, ring, waiter, finish_by).run(watches)
    waiter.close()
    ring.close()
    return Result(counts, read_ring(path))


def one_at_a_time(
    server: EchoServer,
    offsets_s: Sequence[float],
    path: Path,
    rests_ns: Sequence[int] | None = None,
    stop_s: float | None = None,
    patience_s: float = 60.0,
) -> Result:
    """Run the closed loop; rests_ns None = paced by the offsets, else free with so many slots as offsets."""
    start = now_ns() + 20_000_000
    work = Work.of_rows(rows(offsets_s), start, 0, [PAYLOAD])
    stop_at = start + round((max(offsets_s) if stop_s is None else stop_s) * NS_PER_S)
    ring = RingWriter(path, len(work), Metadata(Context(), ("one.jpg",), anchor()))
    with connect(server.address) as sock:
        finish_by = stop_at + round(patience_s * NS_PER_S)
        counts = ClosedLoop(sock, work, ring, TIMING, start, stop_at, finish_by, rests_ns).run()
    ring.close(counts.scheduled)
    return Result(counts, read_ring(path))


def milliseconds(records: Records, end: str, start: str) -> np.ndarray:
    """A difference of two columns in ms."""
    return (records[end] - records[start]) / 1e6


def over(stall: tuple[int, int], begin: np.ndarray, end: np.ndarray) -> int:
    """How many of the intervals from `begin` to `end` (ns) have a common instant with a stall."""
    return int(((begin < stall[1]) & (end > stall[0])).sum())
