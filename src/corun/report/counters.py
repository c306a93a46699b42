"""Growth of raw counters over a window, from readings that do not fall on its edges.

A counter is read once a tick; between two readings it is taken to have grown evenly. A window is clipped to the
time between the first and the last reading, never extrapolated.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from corun.run.read import Table, Window

BUSY = ("cpu_user_ns", "cpu_nice_ns", "cpu_system_ns", "cpu_irq_ns", "cpu_softirq_ns")
IDLE = ("cpu_idle_ns", "cpu_iowait_ns")
STEAL = "cpu_steal_ns"


def covered(instants: ArrayLike, window: Window) -> tuple[int, int] | None:
    """The part [begin, end) of a window that lies between readings at `instants` (n,) ns; None when there is none."""
    at = np.asarray(instants, dtype=np.int64)
    if len(at) < 2:
        return None
    begin, end = max(window.start_ns, int(at.min())), min(window.stop_ns, int(at.max()))
    return (begin, end) if end > begin else None


def increase(instants: ArrayLike, counter: ArrayLike, begin_ns: int, end_ns: int) -> float | None:
    """How much a counter grew over [begin_ns, end_ns); a time without readings counts as no growth.

    instants, counter: (n,) in ns and the counter's unit, NaN where it could not be read. None with fewer than
    two readings.
    """
    at, values = np.asarray(instants, dtype=np.int64), np.asarray(counter, dtype=np.float64)
    known = ~np.isnan(values)
    if known.sum() < 2:
        return None
    at, values = at[known] - begin_ns, values[known]
    low, high = np.interp([0, end_ns - begin_ns], at.astype(np.float64), values - values[0])
    return max(0.0, float(high - low))


def host_increase(profile: Table, columns: tuple[str, ...], begin_ns: int, end_ns: int) -> float | None:
    """Growth of the sum of columns of profile.csv; None where one of them is missing."""
    if any(name not in profile for name in columns):
        return None
    grown = [increase(profile["t_ns"], profile[name], begin_ns, end_ns) for name in columns]
    return None if any(value is None for value in grown) else float(sum(value or 0.0 for value in grown))


def numbers(table: Table, column: str) -> NDArray[np.float64]:
    """A column that is numeric wherever it has cells at all; NaN for every row where it is absent or empty."""
    values = table.get(column)
    rows = len(next(iter(table.values()), ()))
    if values is None or not np.issubdtype(values.dtype, np.number):
        return np.full(rows, np.nan)
    return np.asarray(values, dtype=np.float64)


__all__ = ["BUSY", "IDLE", "STEAL", "covered", "host_increase", "increase", "numbers"]
