"""Memory of a group of processes, counted so that shared pages are not counted twice.

PSS   each page divided by how many processes map it: sums of PSS add up to what the group uses
USS   pages nobody else maps: what ending the process would free
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import psutil

_MIB = 1 << 20


@dataclass(frozen=True)
class Memory:
    """Of one process, MiB; cpu_s: processor time so far."""

    pid: int
    pss_mib: float
    uss_mib: float
    rss_mib: float
    cpu_s: float


def of_process(pid: int) -> Memory | None:
    """Memory of a process now; None when it is gone or may not be read."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            info, times = process.memory_full_info(), process.cpu_times()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return None
    return Memory(pid, info.pss / _MIB, info.uss / _MIB, info.rss / _MIB, times.user + times.system)


def of_group(pids: Iterable[int]) -> list[Memory]:
    """Memory of those that live."""
    return [memory for pid in pids if (memory := of_process(pid)) is not None]


def total(memories: Iterable[Memory]) -> dict[str, float]:
    """Sums over a group."""
    rows = list(memories)
    return {
        "pss_mib": round(sum(row.pss_mib for row in rows), 1),
        "uss_mib": round(sum(row.uss_mib for row in rows), 1),
        "cpu_s": round(sum(row.cpu_s for row in rows), 3),
    }
