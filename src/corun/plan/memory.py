"""Does a set fit into memory: what its processes need together, against what the machine or the GPU has.

    need(S) = trainer + sum over S of private memory  +  the largest shared part once  +  what others hold already
    fits    = need * (1 + margin) <= limit

Private memory (heap, weights, activations: peak resident size less mapped files) adds up; mapped files (libraries)
are one copy for all. On a GPU what NVML reports per process adds up, contexts included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from corun.plan.measured import Memory, Window


@dataclass(frozen=True)
class Limits:
    """What there is, in MiB: of the machine or its cgroup and, None without one, of the GPU; less what others hold."""

    host_mib: float
    gpu_mib: float | None = None


@dataclass(frozen=True)
class Need:
    """What a set needs in MiB, margin included, and whether that is there."""

    host_mib: float
    gpu_mib: float
    fits: bool


def need(parts: Iterable[Memory], limits: Limits, margin: float) -> Need:
    """The need of processes that run together. margin: share added to what was measured, 0.1 = 10 %."""
    found = list(parts)
    host = sum(part.private_mib for part in found) + max((part.shared_mib for part in found), default=0.0)
    host, gpu = host * (1 + margin), sum(part.gpu_mib for part in found) * (1 + margin)
    fits = host <= limits.host_mib and (limits.gpu_mib is None or gpu <= limits.gpu_mib)
    return Need(host, gpu, fits)


def peaks(windows: Iterable[Window]) -> dict[str, Memory]:
    """The largest memory seen of every process, by `server <model>` and `trainer <job>`."""
    found: dict[str, Memory] = {}
    for window in windows:
        for name, memory in window.memory.items():
            found[name] = found.get(name, Memory()).at_least(memory)
    return found
