"""What disturbed a run from outside, by the profiler's rows: steal, strangers on CPU and GPU, throttling, gaps.

Every figure is the growth of a raw counter over one window, so what happened between two ticks is in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corun.report.counters import BUSY, IDLE, STEAL, covered, host_increase, increase, numbers
from corun.report.flag import Flag
from corun.run.read import Table, Window, read_any, select

STEAL_LIMIT = 0.01
FOREIGN_CPU_LIMIT = 0.10
THROTTLE_LIMIT = 0.01

_THROTTLES = (
    ("throttle_power_ns", 0x04, "the power cap", "raise the power limit, or compare only runs under the same cap"),
    ("throttle_sw_thermal_ns", 0x20, "its temperature (software)", "cool it, or let it rest between runs"),
    ("throttle_hw_thermal_ns", 0x40, "its temperature (hardware)", "cool it, or let it rest between runs"),
    ("throttle_brake_ns", 0x80, "the external power brake", "look at the power supply"),
)


def check(run: Path, manifest: dict[str, Any], windows: tuple[Window, ...]) -> Iterator[Flag]:
    """Flags from profile.csv, gpu.csv and process.csv of a run directory."""
    profile, gpu, process = (read_any(run / f"{name}.csv") for name in ("profile", "gpu", "process"))
    if not len(profile.get("t_ns", ())):
        found = "there are no rows in profile.csv: the profiler did not run"
        yield Flag("profiler", "", "profiler", None, None, found, "see logs/profiler-profiler.log")
        return
    shared_server = (manifest.get("sharing") or {}).get("policy") == "mps"
    for window in windows:
        yield from _ticks(profile, window)
        yield from _cpu(profile, process, window)
        if len(gpu.get("t_ns", ())):
            yield from _throttling(gpu, window)
            yield from _foreign_gpu(gpu, process, window, allowed=int(shared_server))


def _where(window: Window) -> str:
    return f"{window.arm} (repeat {window.repeat + 1})"


def _ticks(profile: Table, window: Window) -> Iterator[Flag]:
    """Ticks missed in a gap that overlaps the window, and a profiler that was not there."""
    t_ns = profile["t_ns"]
    inside = (t_ns >= window.start_ns) & (t_ns < window.stop_ns)
    before = np.concatenate([t_ns[:1], t_ns[:-1]])
    overlaps = (before < window.stop_ns) & (t_ns > window.start_ns)
    missed = int(np.nansum(profile["missed"][overlaps]))
    if missed:
        found = f"{_where(window)}: the profiler missed {missed} of its ticks"
        remedy = "the machine was too busy to run it every second: leave it a core, or lengthen period_s"
        yield Flag("missed_ticks", window.arm, "profiler", missed, 0, found, remedy)
    elif not inside.any() and covered(t_ns, window) is None:
        found = f"{_where(window)}: the profiler has no row in the window"
        remedy = "lengthen the window or shorten period_s; see logs/profiler-profiler.log"
        yield Flag("profiler", window.arm, "profiler", 0, 1, found, remedy)


def _cpu(profile: Table, process: Table, window: Window) -> Iterator[Flag]:
    span = covered(profile["t_ns"], window)
    if span is None:
        return
    steal, busy, idle = (host_increase(profile, names, *span) for names in ((STEAL,), BUSY, IDLE))
    if busy is None or idle is None:
        return
    whole = busy + idle + (steal or 0.0)
    if steal is not None and steal > STEAL_LIMIT * whole:
        found = f"{_where(window)}: the hypervisor took {steal / whole:.1%} of the CPU, over {STEAL_LIMIT:.0%}"
        remedy = "other guests ran instead of this one: measure on a machine of your own, or at a quieter time"
        yield Flag("steal", window.arm, "host", steal / whole, STEAL_LIMIT, found, remedy)
    ours = process_cpu(process, *span)
    if ours is None:
        return
    foreign = max(0.0, busy - ours) / max(whole, 1.0)
    if foreign > FOREIGN_CPU_LIMIT:
        found = (
            f"{_where(window)}: processes that are not of this run used {foreign:.0%} of all cores, over "
            f"{FOREIGN_CPU_LIMIT:.0%}"
        )
        yield Flag(
            "foreign_cpu", window.arm, "host", foreign, FOREIGN_CPU_LIMIT, found, "stop them and measure again"
        )


def process_cpu(process: Table, begin_ns: int, end_ns: int) -> float | None:
    """CPU time in ns of all processes of the run over a time; None without rows."""
    if not len(process.get("t_ns", ())):
        return None
    counter = numbers(process, "cpu_ns")
    total = 0.0
    for pid in np.unique(process["pid"]):
        mine = process["pid"] == pid
        total += increase(process["t_ns"][mine], counter[mine], begin_ns, end_ns) or 0.0
    return total


# GPUs


def _throttling(gpu: Table, window: Window) -> Iterator[Flag]:
    for number in np.unique(gpu["gpu"]):
        rows = select(gpu, gpu["gpu"] == number)
        for column, bit, cause, remedy in _THROTTLES:
            share = _throttled_share(rows, column, bit, window)
            if share is not None and share > THROTTLE_LIMIT:
                found = (
                    f"{_where(window)}: GPU {number:g} was held down by {cause} for {share:.0%} of the time, over "
                    f"{THROTTLE_LIMIT:.0%}"
                )
                yield Flag("throttling", window.arm, f"gpu{number:g}", share, THROTTLE_LIMIT, found, remedy)


def _throttled_share(rows: Table, column: str, bit: int, window: Window) -> float | None:
    """Share of the window by the driver's counter, else the share of ticks with the reason's bit set."""
    span = covered(rows["t_ns"], window)
    grown = increase(rows["t_ns"], numbers(rows, column), *span) if span else None
    if span and grown is not None:
        return grown / (span[1] - span[0])
    reasons = numbers(rows, "throttle_reasons")[_inside(rows, window)]
    reasons = reasons[~np.isnan(reasons)]
    return float(((reasons.astype(np.int64) & bit) != 0).mean()) if len(reasons) else None


def _foreign_gpu(gpu: Table, process: Table, window: Window, allowed: int) -> Iterator[Flag]:
    """More compute processes on a GPU than the run has there; an MPS server is one that is allowed."""
    for number in np.unique(gpu["gpu"]):
        rows = select(gpu, (gpu["gpu"] == number) & _inside(gpu, window))
        counts = numbers(rows, "processes")
        ours = np.array([_ours_on(process, float(tick), f"{number:g}") for tick in rows["tick"]], dtype=np.float64)
        extra = counts - ours - allowed
        if not len(extra) or not np.nanmax(np.append(extra, 0)) > 0:
            continue
        most = int(np.nanmax(extra))
        found = f"{_where(window)}: up to {most} processes on GPU {number:g} are not of this run"
        remedy = "stop them; in a container give it the host's process numbers (--pid host), or this cannot be told"
        yield Flag("foreign_gpu", window.arm, f"gpu{number:g}", most, 0, found, remedy)


def _ours_on(process: Table, tick: float, gpu: str) -> int:
    """Processes of the run with a context on a GPU at a tick; `gpu` cells are `0` or `0+1`."""
    if "gpu" not in process:
        return 0
    cells = process["gpu"][process["tick"] == tick]
    return sum(gpu in _indices(cell) for cell in cells)


def _indices(cell: object) -> list[str]:
    """`0+1` is GPUs 0 and 1; a column of single numbers was read as floats, NaN = none."""
    if isinstance(cell, float):
        return [] if np.isnan(cell) else [f"{cell:g}"]
    return str(cell).split("+")


def _inside(table: Table, window: Window) -> NDArray[np.bool_]:
    return np.asarray((table["t_ns"] >= window.start_ns) & (table["t_ns"] < window.stop_ns))


__all__ = ["check", "process_cpu"]
