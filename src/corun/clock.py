"""One clock for every stamp: CLOCK_MONOTONIC nanoseconds, with one wall-clock anchor per host and run.

Two hosts have two clocks. The four-stamp handshake (NTP, RFC 5905 section 8) bounds the difference::

    client  t0 ─────────▶ t1  server        offset = ((t1 - t0) + (t2 - t3)) / 2
    client  t3 ◀───────── t2  server        rtt    = (t3 - t0) - (t2 - t1);  |error| <= rtt / 2

A single probe can be wrong by a scheduler delay, so the probe with the smallest round trip is kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000

now_ns = time.monotonic_ns


class Clock(Protocol):
    """Time as a parameter, so that tests of waiting code run at once."""

    def now_ns(self) -> int: ...

    def sleep_until_ns(self, deadline_ns: int) -> None: ...


class MonotonicClock:
    """The real clock."""

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def sleep_until_ns(self, deadline_ns: int) -> None:
        remaining = deadline_ns - time.monotonic_ns()
        if remaining > 0:
            time.sleep(remaining / NS_PER_S)


@dataclass(frozen=True)
class Anchor:
    """The same instant on both clocks: wall = wall_ns + (mono - mono_ns)."""

    mono_ns: int
    wall_ns: int

    def wall_at(self, mono_ns: int) -> int:
        """Wall-clock nanoseconds since the epoch of a monotonic stamp."""
        return self.wall_ns + (mono_ns - self.mono_ns)


def anchor() -> Anchor:
    """Read both clocks back to back; of five readings the tightest one is kept."""
    readings = []
    for _ in range(5):
        before = time.monotonic_ns()
        wall = time.time_ns()
        after = time.monotonic_ns()
        readings.append((after - before, Anchor((before + after) // 2, wall)))
    return min(readings, key=lambda reading: reading[0])[1]


@dataclass(frozen=True)
class Probe:
    """One four-stamp exchange: t0 sent, t1 received there, t2 answered there, t3 received here (ns)."""

    t0: int
    t1: int
    t2: int
    t3: int

    @property
    def rtt_ns(self) -> int:
        return (self.t3 - self.t0) - (self.t2 - self.t1)

    @property
    def offset_ns(self) -> int:
        return ((self.t1 - self.t0) + (self.t2 - self.t3)) // 2


@dataclass(frozen=True)
class Offset:
    """Peer clock minus own clock, with the bound |error| <= bound_ns."""

    offset_ns: int
    bound_ns: int
    rtt_ns: int


def estimate_offset(probes: Sequence[Probe]) -> Offset:
    """Offset from the probe with the smallest round trip; raises ValueError without probes."""
    best = min(probes, key=lambda probe: probe.rtt_ns)
    return Offset(best.offset_ns, max(0, (best.rtt_ns + 1) // 2), best.rtt_ns)
