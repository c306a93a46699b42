"""Shares of CPU and GPU by role, made from the profiler's raw counters.

A rate is the difference of two rows over the difference of their t_ns and is valid for the time between them,
so series are drawn as steps that end at their tick.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from corun.clock import NS_PER_S
from corun.run.read import Run, Table, select

Floats = NDArray[np.float64]

MW_PER_W = 1e3
UJ_PER_J = 1e6
PACKAGE = re.compile(r"rapl_package_\d+_uj")
ROLES = ("server", "trainer", "client", "profiler")
BUSY = ("cpu_user_ns", "cpu_nice_ns", "cpu_system_ns", "cpu_irq_ns", "cpu_softirq_ns")


@dataclass(frozen=True)
class Shares:
    """Stacked series by role and lines over them; seconds[i] ends the interval that value i describes.

    The first interval begins at begin_s; each other one where the one before it ends.
    """

    unit: str
    limit: float
    begin_s: float
    seconds: Floats
    stacked: tuple[tuple[str, Floats], ...]
    lines: tuple[tuple[str, Floats], ...] = ()

    def series(self) -> Iterator[tuple[str, Floats]]:
        """All series, stacked ones first."""
        yield from self.stacked
        yield from self.lines


def cpu_shares(run: Run, origin_ns: int, end_ns: int) -> Shares | None:
    """Cores in use by role, and by everything else on the host; None without rows of the profiler."""
    ticks = _ticks(run, origin_ns, end_ns)
    if ticks is None or not len(run.process.get("t_ns", ())):
        return None
    roles = {
        role: _grouped_rate(run.process, run.process["role"] == role, "cpu_ns", ticks)
        for role in _order(run.process["role"])
    }
    stacked = [(role, values) for role, values in roles.items() if values.any()]
    busy = _host_rate(run.profile, ticks)
    if busy is not None:
        other = np.clip(busy - sum(roles.values(), np.zeros(len(busy))), 0.0, None)
        stacked.append(("other", other))
    cores = float((run.manifest.get("hardware") or {}).get("cores") or 0.0)
    total = sum((values for _, values in stacked), np.zeros(len(ticks) - 1))
    limit = max(cores, float(total.max(initial=0.1)) * 1.05)
    return Shares("cores", limit, *_times(ticks, origin_ns), tuple(stacked))


def gpu_shares(run: Run, origin_ns: int, end_ns: int) -> Shares | None:
    """SM share by role where NVML attributes it, and the utilisation of each GPU; None without a GPU."""
    ticks = _ticks(run, origin_ns, end_ns)
    if ticks is None or not len(run.gpu.get("t_ns", ())):
        return None
    stacked = []
    if "gpu_sm_pct" in run.process and np.issubdtype(run.process["gpu_sm_pct"].dtype, np.floating):
        for role in _order(run.process["role"]):
            values = _summed(run.process, run.process["role"] == role, "gpu_sm_pct", ticks)
            if np.nan_to_num(values).any():
                stacked.append((role, np.nan_to_num(values)))
    lines = []
    for number in np.unique(run.gpu["gpu"]):
        values = _summed(run.gpu, run.gpu["gpu"] == number, "util_gpu_pct", ticks)
        lines.append((f"GPU {number:g} busy", values))
    return Shares("% of a GPU", 105.0, *_times(ticks, origin_ns), tuple(stacked), tuple(lines))


def power(run: Run, origin_ns: int, end_ns: int) -> Shares | None:
    """Power of each GPU and CPU package in W; None where neither driver nor RAPL tells."""
    ticks = _ticks(run, origin_ns, end_ns)
    if ticks is None:
        return None
    lines = []
    if len(run.gpu.get("t_ns", ())) and not np.isnan(run.gpu["power_mw"]).all():
        for number in np.unique(run.gpu["gpu"]):
            values = _summed(run.gpu, run.gpu["gpu"] == number, "power_mw", ticks) / MW_PER_W
            lines.append((f"GPU {number:g}", values))
    for name in (name for name in run.profile if PACKAGE.fullmatch(name)):
        values = _rate(run.profile["t_ns"], run.profile[name], ticks) * NS_PER_S / UJ_PER_J
        lines.append((name.removesuffix("_uj").removeprefix("rapl_").replace("_", " "), values))
    lines = [(label, values) for label, values in lines if not np.isnan(values).all()]
    if not lines:
        return None
    top = max(float(np.nanmax(values)) for _, values in lines)
    return Shares("W", top * 1.15 or 1.0, *_times(ticks, origin_ns), (), tuple(lines))


def _ticks(run: Run, origin_ns: int, end_ns: int) -> NDArray[np.int64] | None:
    """The profiler's instants from the last one before the first window on; None with fewer than two."""
    instants = run.profile.get("t_ns")
    if instants is None or len(instants) < 2:
        return None
    first = max(0, int(np.searchsorted(instants, origin_ns)) - 1)
    last = int(np.searchsorted(instants, end_ns)) + 1
    kept = np.asarray(instants[first:last], dtype=np.int64)
    return kept if len(kept) >= 2 else None


def _times(ticks: NDArray[np.int64], origin_ns: int) -> tuple[float, Floats]:
    """Begin of the first interval and end of every one, in seconds since the origin."""
    seconds = (ticks - origin_ns) / NS_PER_S
    return float(seconds[0]), seconds[1:]


def _order(roles: NDArray[np.object_]) -> list[str]:
    found = [str(role) for role in dict.fromkeys(roles)]
    return [role for role in ROLES if role in found] + [role for role in found if role not in ROLES]


def _grouped_rate(table: Table, mask: NDArray[np.bool_], counter: str, ticks: NDArray[np.int64]) -> Floats:
    """Sum over the processes of mask of counter's increase per ns in each interval of ticks."""
    total = np.zeros(len(ticks) - 1)
    rows = select({name: table[name] for name in ("pid", "t_ns", counter)}, mask)
    for pid in np.unique(rows["pid"]):
        mine = select(rows, rows["pid"] == pid)
        total += np.nan_to_num(_rate(mine["t_ns"], mine[counter], ticks))
    return total


def _rate(instants: NDArray[np.int64], counter: Floats, ticks: NDArray[np.int64]) -> Floats:
    """Increase of a counter per ns in each interval of ticks; NaN with fewer than two readings."""
    known = ~np.isnan(counter)
    if known.sum() < 2:
        return np.full(len(ticks) - 1, np.nan)
    at = np.interp(ticks, instants[known], counter[known])
    return np.asarray(np.clip(np.diff(at), 0, None) / np.diff(ticks))


def _host_rate(profile: Table, ticks: NDArray[np.int64]) -> Floats | None:
    """Cores busy on the whole host; None where the counters could not be read."""
    counters = [profile[name] for name in BUSY if name in profile]
    if not counters or np.isnan(counters[0]).all():
        return None
    used = np.sum([np.nan_to_num(counter) for counter in counters], axis=0)
    return _rate(profile["t_ns"], used, ticks)


def _summed(table: Table, mask: NDArray[np.bool_], column: str, ticks: NDArray[np.int64]) -> Floats:
    """Sum of a gauge over the rows of mask at each tick but the first; NaN where none was read."""
    place = np.searchsorted(ticks, table["t_ns"])
    mask = mask & (place < len(ticks)) & ~np.isnan(table[column])
    mask &= np.abs(ticks[np.minimum(place, len(ticks) - 1)] - table["t_ns"]) < NS_PER_S
    total = np.bincount(place[mask], weights=table[column][mask], minlength=len(ticks))
    seen = np.bincount(place[mask], minlength=len(ticks)) > 0
    return np.asarray(np.where(seen, total, np.nan)[1 : len(ticks)])
