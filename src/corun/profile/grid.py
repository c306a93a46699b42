"""The ticks of the profiler: absolute deadlines that never drift and never catch up.

Deadline k is `start + k * period`, whatever happened before. Sleeping "a period minus what the work took"
drifts by the overshoot of every sleep; squeezing late samples in leaves the grid. So::

    grid      0         1         2         3         4
              │         │         │         │         │
    sampled   ●         ●─1.5 periods─▶     ●         ●
                                  ✗         └ tick 3, on the grid, missed = 1

A tick whose deadline passed while the previous one was being read is skipped and counted in `missed`. A tick
woken late is read at once; whole periods slept through are skipped and counted as well.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """One reading to be made: number on the grid, when it was due, how late it is, ticks skipped before it."""

    number: int
    deadline_ns: int
    late_ns: int
    missed: int


class Grid:
    """Where on the grid the profiler stands; pure, the caller brings the time.

    Usage::

        grid = Grid(now_ns(), period_ns)
        while wait_until(grid.next_deadline_ns(now_ns())):
            tick = grid.take(now_ns())
    """

    def __init__(self, start_ns: int, period_ns: int) -> None:
        if period_ns <= 0:
            raise ValueError(f"the period must be positive, not {period_ns} ns")
        self.start_ns = start_ns
        self.period_ns = period_ns
        self._next = 0
        self._taken = -1

    def deadline_ns(self, number: int) -> int:
        """When tick `number` is due."""
        return self.start_ns + number * self.period_ns

    def next_deadline_ns(self, now_ns: int) -> int:
        """The next deadline that is still ahead; those already past are given up, but never the first tick."""
        if self._taken < 0:
            return self.deadline_ns(0)
        behind = now_ns - self.deadline_ns(self._next)
        if behind > 0:
            self._next += -(-behind // self.period_ns)
        return self.deadline_ns(self._next)

    def take(self, now_ns: int) -> Tick:
        """The tick to read now, after waiting for its deadline."""
        late = max(0, now_ns - self.deadline_ns(self._next))
        number = self._next + late // self.period_ns
        tick = Tick(number, self.deadline_ns(number), late % self.period_ns, number - self._taken - 1)
        self._taken = number
        self._next = number + 1
        return tick
