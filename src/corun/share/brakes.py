"""What holds the trainer at a stop, as a pure function of time, duty and what is pending.

Two brakes. `preempt` holds while a request is pending. The duty makes the trainer rest dt * (1/d - 1) after dt of
work, which leaves it the share d of the time; time spent held by the other brake counts as rest::

    work ▮▮▮▮▮▮        ▮▮▮▮▮▮▮▮▮▮                 d = 0.5
    held       ░░░░▒▒▒▒          ░░░░░░░░░░       ░ resting   ▒ held by a request while it owed rest

The same code runs in the trainer and on the simulated device, where the clock is a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import Final

from corun.clock import NS_PER_MS, NS_PER_S

LOOK_AGAIN_NS: Final = 20 * NS_PER_MS
LEAST_REST_NS: Final = NS_PER_MS
LONGEST_REST_NS: Final = 10 * NS_PER_S
GO_ON: Final = 0


class Mode(IntFlag):
    """Which rules the trainer follows; the duty always counts."""

    FREE = 0
    PREEMPT = 1
    SLO = 2
    PREDICTIVE = 4
    SLACK = 8
    ELASTIC = 16


@dataclass
class Brakes:
    """State of both brakes; all times in ns of one clock, 0 = never.

    max_wait_ns: how long requests may hold one stop, 0 = until nothing is pending (or its service is dead).
    """

    max_wait_ns: int = 0
    owed_ns: float = 0.0
    _arrived_ns: int = 0
    _released_ns: int = 0

    def begin(self) -> None:
        """What lies behind was not work: time between two measured windows is never paid back as rest."""
        self.owed_ns, self._released_ns = 0.0, 0

    def arrive(self, now_ns: int, duty: float) -> None:
        """The trainer came to a stop: it owes rest for the work since it was released."""
        work_ns = now_ns - self._released_ns if self._released_ns else 0
        owed = self.owed_ns + work_ns * (1 / duty - 1)
        self.owed_ns = min(owed, LONGEST_REST_NS) if duty < 1 else 0.0
        self._arrived_ns = now_ns

    def held_until(self, now_ns: int, pending: bool) -> int:
        """GO_ON, or the latest instant to ask again."""
        if pending and (not self.max_wait_ns or now_ns - self._arrived_ns < self.max_wait_ns):
            limit = self._arrived_ns + self.max_wait_ns if self.max_wait_ns else now_ns + LOOK_AGAIN_NS
            return min(limit, now_ns + LOOK_AGAIN_NS)
        rested_at = self._arrived_ns + round(self.owed_ns)
        if self.owed_ns >= LEAST_REST_NS and now_ns < rested_at:
            return rested_at
        return GO_ON

    def leave(self, now_ns: int) -> int:
        """The trainer goes on; returns how long it was held."""
        held_ns = now_ns - self._arrived_ns
        self.owed_ns = max(0.0, self.owed_ns - held_ns)
        self._released_ns = now_ns
        return held_ns
