"""How much memory a process takes, so that it can be added up for processes that never ran together.

Private = peak resident size less mapped files (VmHWM - RssFile), which nobody shares: heap, weights, activations.
Mapped files are libraries, one copy for all. On a GPU NVML says what a process holds, its context included.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from corun.profile.gpu import Gpus
from corun.profile.source import Faults, Unavailable

KIB_PER_MIB: Final = 1024
BYTES_PER_MIB: Final = 2**20
_UNLIMITED_MIB: Final = 2**40
_CGROUPS: Final = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Footprint:
    """Peak memory in MiB: private, shared (mapped files), on GPUs."""

    private_mib: float = 0.0
    shared_mib: float = 0.0
    gpu_mib: float = 0.0


@dataclass(frozen=True)
class GpuMemory:
    """The GPUs of this machine by name, and what is free on the first one in MiB."""

    names: tuple[str, ...] = ()
    free_mib: float | None = None


def footprint(pid: int, on_gpu: bool = False, root: Path = Path("/")) -> Footprint:
    """Memory of a process with its descendants (loader workers); zero when it is gone."""
    family = _family(pid, root)
    parts = [_kib(_read(root / f"proc/{member}/status")) for member in family]
    private = sum(max(part.get("RssAnon", 0), part.get("VmHWM", 0) - part.get("RssFile", 0)) for part in parts)
    shared = max((part.get("RssFile", 0) for part in parts), default=0)
    return Footprint(private / KIB_PER_MIB, shared / KIB_PER_MIB, _gpu_mib(family) if on_gpu else 0.0)


def resident_mib(pid: int, root: Path = Path("/")) -> tuple[float | None, float | None]:
    """What a process with its descendants holds in memory now: (RSS, PSS), None where the kernel does not say.

    PSS (smaps_rollup) divides shared pages among those who map them, so that it adds up over processes.
    """
    family = _family(pid, root)
    whole = [_kib(_read(root / f"proc/{member}/status")).get("VmRSS") for member in family]
    shared_out = [_kib(_read(root / f"proc/{member}/smaps_rollup")).get("Pss") for member in family]
    return _total_mib(whole), _total_mib(shared_out)


def _total_mib(parts_kib: list[int | None]) -> float | None:
    known = [part for part in parts_kib if part is not None]
    return sum(known) / KIB_PER_MIB if known else None


def available_mib(root: Path = Path("/")) -> float:
    """What new processes can have: MemAvailable, or what the cgroup's limit leaves if that is less."""
    memory = _kib(_read(root / "proc/meminfo"))
    found = [memory.get("MemAvailable", memory.get("MemTotal", 0)) / KIB_PER_MIB]
    for limit_file, used_file in _CGROUPS:
        limit, used = _read(root / limit_file).strip(), _read(root / used_file).strip()
        if limit.isdecimal() and used.isdecimal() and int(limit) / BYTES_PER_MIB < _UNLIMITED_MIB:
            found.append((int(limit) - int(used)) / BYTES_PER_MIB)
    return min(found)


def gpu_memory() -> GpuMemory:
    """Names and free memory by NVML; empty without a GPU."""
    try:
        gpus = Gpus(Faults())
    except Unavailable:
        return GpuMemory()
    try:
        rows, _ = gpus.read()
        details = gpus.status().details
        facts = [value for name, value in sorted(details.items()) if name.startswith("gpu")]
        names = tuple(str(one.get("name")) for one in facts if isinstance(one, dict))
        used, total = (rows[0].get(f"mem_{part}_mib") for part in ("used", "total"))
    finally:
        gpus.close()
    return GpuMemory(names, float(total) - float(used) if total and used is not None else None)


def _gpu_mib(pids: list[int]) -> float:
    try:
        gpus = Gpus(Faults())
    except Unavailable:
        return 0.0
    try:
        _, uses = gpus.read()
    finally:
        gpus.close()
    return float(sum(uses[pid].mem_mib or 0.0 for pid in pids if pid in uses))


def _family(pid: int, root: Path) -> list[int]:
    family = [pid]
    for parent in family:
        for children in sorted((root / f"proc/{parent}/task").glob("*/children")):
            family += [int(child) for child in _read(children).split()]
    return family


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _kib(text: str) -> dict[str, int]:
    """`VmHWM:  123 kB` lines as KiB."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if value.strip().endswith("kB"):
            found[name] = int(value.split()[0])
    return found
