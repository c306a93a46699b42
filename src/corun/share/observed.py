"""What is really in force for a process, read back from the kernel: class, nice, cores, groups, OpenMP waiting.

A policy that was asked for and a policy that holds are two things; the manifest carries both.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from corun.share.borders import autogroup_nice, group_of
from corun.share.host import Host
from corun.share.openmp import SPINS, WAIT_POLICY

_CLASSES = {
    os.SCHED_OTHER: "SCHED_OTHER",
    os.SCHED_BATCH: "SCHED_BATCH",
    os.SCHED_IDLE: "SCHED_IDLE",
    os.SCHED_FIFO: "SCHED_FIFO",
    os.SCHED_RR: "SCHED_RR",
}
_VARIABLES = (WAIT_POLICY, SPINS, "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "MALLOC_MMAP_THRESHOLD_")
_PREFIX = "CUDA_MPS_"


def observe(pid: int, host: Host) -> dict[str, Any]:
    """The state of a process and its descendants; an empty dict when it is gone.

    Values that differ between threads are counted: {"SCHED_IDLE": 3, "SCHED_OTHER": 1}.
    """
    try:
        tids = host.all_threads_of(pid)
    except ProcessLookupError:
        return {}
    states = [state for tid in tids if (state := _thread(tid, host))]
    group = group_of(pid, host)
    return {
        "threads": len(states),
        "class": _one_or_counts([state[0] for state in states]),
        "nice": _one_or_counts([str(state[1]) for state in states]),
        "cores": _one_or_counts([",".join(map(str, state[2])) for state in states]),
        "cgroup": group.cgroup,
        "autogroup": group.autogroup,
        "autogroup_nice": autogroup_nice(pid, host),
        "environment": _environment(pid, host),
    }


def _thread(tid: int, host: Host) -> tuple[str, int, tuple[int, ...]] | None:
    try:
        number = host.class_of(tid)
        return _CLASSES.get(number, str(number)), host.nice_of(tid), host.cores_of(tid)
    except OSError:
        return None


def _one_or_counts(values: list[str]) -> str | dict[str, int]:
    counts = Counter(values)
    return values[0] if len(counts) == 1 else dict(sorted(counts.items()))


def _environment(pid: int, host: Host) -> dict[str, str]:
    entries = (host.read(f"proc/{pid}/environ") or "").split("\0")
    pairs = dict(entry.split("=", 1) for entry in entries if "=" in entry)
    return {name: value for name, value in pairs.items() if name in _VARIABLES or name.startswith(_PREFIX)}
