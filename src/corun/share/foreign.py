"""Foreign load: what the machine did in a window that was not ours, by which a measurement is judged dirty.

    foreign = (busy of /proc/stat, stolen time included) - (user + system time of our own processes)

A p99 taken while a neighbour used half a core says nothing about a policy. Own processes are those of a family of
pids with all their descendants; time of a child that ended in the window counts through its parent (cutime).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from corun.clock import NS_PER_S
from corun.share.host import Host

DIRTY_CORES = 0.15
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_IDLE, _IOWAIT, _GUEST = 3, 4, 8


@dataclass(frozen=True)
class Reading:
    """CPU seconds since boot: of the machine, and of own processes by pid."""

    t_ns: int
    busy_s: float
    own_s: dict[int, float]


def machine_busy_s(host: Host) -> float:
    """CPU seconds that were neither idle nor waiting for disks, all cores together."""
    line = (host.read("proc/stat") or "").split("\n", 1)[0].split()[1:]
    ticks = [int(text) for text in line[:_GUEST]]
    return sum(value for index, value in enumerate(ticks) if index not in (_IDLE, _IOWAIT)) / _TICKS_PER_S


def process_cpu_s(pid: int, host: Host) -> float:
    """User and system seconds of a process and of its children that ended; 0 when it is gone."""
    text = host.read(f"proc/{pid}/stat")
    if not text:
        return 0.0
    fields = text.rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) / _TICKS_PER_S


def read_cpu(pids: Iterable[int], host: Host, t_ns: int) -> Reading:
    """Now: the machine, and every process of `pids` with its descendants."""
    family = {member for pid in pids for member in _family(pid, host)}
    return Reading(t_ns, machine_busy_s(host), {pid: process_cpu_s(pid, host) for pid in family})


def _family(pid: int, host: Host) -> list[int]:
    try:
        return host.descendants_of(pid)
    except ProcessLookupError:
        return []


def own_cores(before: Reading, after: Reading, pids: Iterable[int] | None = None) -> float:
    """Cores that own processes (or only `pids`) used between two readings."""
    chosen = set(after.own_s) if pids is None else set(pids)
    used = sum(after.own_s.get(pid, 0.0) - before.own_s.get(pid, 0.0) for pid in chosen)
    return max(0.0, used) / _seconds(before, after)


def foreign_cores(before: Reading, after: Reading) -> float:
    """Cores that others used between two readings; ticks make it uncertain by 0.01 s per process."""
    busy = (after.busy_s - before.busy_s) / _seconds(before, after)
    return max(0.0, busy - own_cores(before, after))


def _seconds(before: Reading, after: Reading) -> float:
    return max(1, after.t_ns - before.t_ns) / NS_PER_S
