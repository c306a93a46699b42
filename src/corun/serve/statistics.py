"""What a server counts: per segment while it runs, and as one frozen snapshot for STATS.

Each counter has one writing thread, so none needs a lock: `received` and `refused` belong to the thread that
reads sockets, `answered` to the one that runs the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from corun.clock import NS_PER_MS
from corun.wire import Status

STATUSES = tuple(status for status in Status if status < Status.LOST)
RECENT = 1024
MIN_SAMPLES = {50: 11, 99: 662}


class Segment:
    """Which window of a run a request arrived in, with that window's counters by status.

    A server that nobody armed has arm "" and no numbers: its rows have empty cells there.
    """

    __slots__ = ("answered", "arm", "index", "received", "refused", "repeat")

    def __init__(self, arm: str = "", repeat: int | None = None, index: int | None = None) -> None:
        self.arm = arm
        self.repeat = repeat
        self.index = index
        self.received = 0
        self.refused = [0] * len(STATUSES)
        self.answered = [0] * len(STATUSES)

    def counts(self) -> Counts:
        """Its counters now."""
        return Counts(self.received, *(a + b for a, b in zip(self.answered, self.refused, strict=True)))


@dataclass(frozen=True)
class Counts:
    """Requests by how they ended; received = all others together + what is still waiting or running."""

    received: int = 0
    """requests read from sockets"""
    completed: int = 0
    """answered OK"""
    rejected: int = 0
    """answered REJECTED: the queue was full"""
    bad: int = 0
    """answered BAD_REQUEST: the payload could not be decoded"""
    failed: int = 0
    """answered FAILED: the engine raised"""
    not_loaded: int = 0
    """answered NOT_LOADED: there was no model"""
    draining: int = 0
    """answered DRAINING: they came while the server was finishing"""
    expired: int = 0
    """answered EXPIRED: their deadline had passed"""
    cancelled: int = 0
    """CANCELLED: their connection was gone or the server was stopped first"""

    def summary(self) -> str:
        """`120 received, 118 completed, 2 rejected`: every counter that is not zero."""
        parts = [f"{getattr(self, item.name)} {item.name}" for item in fields(self)[2:] if getattr(self, item.name)]
        return ", ".join([f"{self.received} received", f"{self.completed} completed", *parts])

    @classmethod
    def total(cls, segments: Iterable[Segment]) -> Counts:
        """The sum over segments."""
        rows = [segment.counts() for segment in segments]
        return cls(*(sum(getattr(row, item.name) for row in rows) for item in fields(cls)))


@dataclass(frozen=True)
class Statistics:
    """A server at one instant; None where there is nothing to report yet."""

    counts: Counts
    """since the start of the process"""
    queue_len: int
    """requests waiting"""
    in_flight: int
    """requests picked and not answered"""
    connections: int
    """open connections, control included"""
    bad_frames: int
    """connections closed because of bytes that are not protocol v1"""
    backlog_bytes: int
    """reply bytes that clients have not read yet"""
    rows: int
    """rows written to disk"""
    recent_p50_ms: float | None
    """time in the server (rx_done to tx) of the last 1,024 answers, nearest rank; from 11 answers on"""
    recent_p99_ms: float | None
    """the same; from 662 answers on"""
    model: str
    """loaded model, empty without one"""
    uptime_s: float
    """since the server was made"""

    def body(self) -> dict[str, Any]:
        """As the body of a reply: one flat object."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "counts"}
        return {**count_body(self.counts), **own}


def count_body(counts: Counts) -> dict[str, Any]:
    """Counts as the body of a reply."""
    return {item.name: getattr(counts, item.name) for item in fields(counts)}


def recent_ms(latencies_ns: Sequence[int], percent: int) -> float | None:
    """Nearest-rank percentile in ms; None below the number of samples that supports it."""
    if len(latencies_ns) < MIN_SAMPLES[percent]:
        return None
    rank = math.ceil(percent / 100 * len(latencies_ns))
    return sorted(latencies_ns)[rank - 1] / NS_PER_MS
