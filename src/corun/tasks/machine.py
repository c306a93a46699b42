"""What the machine has, and what its processes use: cores, memory, GPUs; read through psutil and corun.profile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Final

import psutil

from corun.process import available_cores
from corun.profile.source import Faults, Unavailable
from corun.tasks.choice import Capacity

MIB: Final = 1 << 20


@cache
def _gpus() -> object | None:
    if not Path("/dev/nvidiactl").exists():
        return None
    from corun.profile.gpu import Gpus

    try:
        return Gpus(Faults())
    except Unavailable:
        return None


def gpu_mib_of(pids: Iterable[int]) -> float | None:
    """GPU memory of processes in MiB by the driver's own count; None without a GPU."""
    from corun.profile.gpu import Gpus

    gpus = _gpus()
    if not isinstance(gpus, Gpus):
        return None
    _, uses = gpus.read()
    return sum(uses[pid].mem_mib or 0.0 for pid in pids if pid in uses)


def capacity(training: bool = False, cores: float | None = None, memory_mib: float | None = None) -> Capacity:
    """What this machine offers to services now; `cores` and `memory_mib` replace what it shows.

    Memory is what the kernel calls available; a GPU's is what no process has taken.
    """
    return Capacity(
        cores=available_cores() if cores is None else cores,
        memory_mib=psutil.virtual_memory().available / MIB if memory_mib is None else memory_mib,
        gpu_mib=_free_gpu_mib(),
        training=training,
    )


def _free_gpu_mib() -> tuple[float, ...]:
    from corun.profile.gpu import Gpus

    gpus = _gpus()
    if not isinstance(gpus, Gpus):
        return ()
    rows, _ = gpus.read()
    free = [(row.get("mem_total_mib"), row.get("mem_used_mib")) for row in rows]
    return tuple(float(total) - float(used) for total, used in free if total is not None and used is not None)


def family_of(pid: int) -> list[psutil.Process]:
    """A process and its living descendants; [] when it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def cpu_and_memory(pid: int) -> tuple[float, float]:
    """CPU seconds since their start and resident MiB of a process and its living descendants; zeros when it is gone."""
    cpu_s = rss_mib = 0.0
    for process in family_of(pid):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            cpu_s += times.user + times.system
            rss_mib += process.memory_info().rss / MIB
    return cpu_s, rss_mib
