"""Energy counters of a run and whose energy they counted, in whole millijoules that add up to the counter."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from corun.clock import NS_PER_S
from corun.profile.energy import share_energy
from corun.report.counters import increase, numbers
from corun.report.uses import Span, Use, Who
from corun.run.read import Table

IDLE, UNATTRIBUTED, TOTAL = "idle", "unattributed", "total"
UJ_PER_MJ = 1e3
_RAPL = re.compile(r"rapl_package_\d+(_dram)?_uj")


@dataclass(frozen=True)
class Meter:
    """One energy counter in mJ, read at t_ns; `kind` is gpu or cpu, `gpu` the index of a GPU."""

    name: str
    kind: str
    t_ns: NDArray[np.int64]
    energy_mj: NDArray[np.float64]
    gpu: str = ""


def meters_of(profile: Table, gpu: Table) -> list[Meter]:
    """NVML's counter of each GPU, RAPL's of each CPU package and its memory."""
    return [*_gpu_meters(gpu), *_cpu_meters(profile)]


def _gpu_meters(gpu: Table) -> Iterator[Meter]:
    """NVML's counter of each GPU that has one."""
    energy = numbers(gpu, "energy_mj")
    for number in np.unique(gpu.get("gpu", np.array([]))):
        mine = (gpu["gpu"] == number) & ~np.isnan(energy)
        if mine.sum() >= 2:
            yield Meter(f"gpu{number:g}", "gpu", gpu["t_ns"][mine], energy[mine], f"{number:g}")


def _cpu_meters(profile: Table) -> Iterator[Meter]:
    """RAPL's packages and their memory; core and uncore are parts of a package."""
    for column in filter(_RAPL.fullmatch, profile):
        energy = numbers(profile, column) / UJ_PER_MJ
        known = ~np.isnan(energy)
        if known.sum() >= 2:
            yield Meter(column.removesuffix("_uj"), "cpu", profile["t_ns"][known], energy[known])


def idle_power_mw(meter: Meter, profile: Table) -> float | None:
    """Power in the least second between two readings outside all windows; None when there is no such second."""
    idle_at = set(profile["t_ns"][profile["arm"] == "idle"].tolist())
    idle = np.array([t_ns in idle_at for t_ns in meter.t_ns.tolist()], dtype=bool)
    between = idle[1:] & idle[:-1]
    if not between.any():
        return None
    power = np.diff(meter.energy_mj)[between] / (np.diff(meter.t_ns)[between] / NS_PER_S)
    return max(0.0, float(power.min()))


def split(
    meter: Meter, idle_mw: float | None, span: Span, uses: Mapping[Who, Use], other_ns: float | None
) -> dict[Hashable, int] | None:
    """mJ by (role, name), IDLE, UNATTRIBUTED and TOTAL of one meter; None when it did not run in the window."""
    grown = increase(meter.t_ns, meter.energy_mj, span.begin_ns, span.end_ns)
    if grown is None:
        return None
    shares: dict[Hashable, float]
    if meter.kind == "gpu":
        shares = {who: use.sm_on[meter.gpu] for who, use in uses.items() if meter.gpu in use.sm_on}
    else:
        shares = {who: use.cpu_ns for who, use in uses.items()} if other_ns is not None else {}
        shares[UNATTRIBUTED] = other_ns or 0.0
    known = share_energy(grown, span.nanoseconds, idle_mw or 0.0, shares)
    parts: dict[Hashable, float] = dict(known.processes_mj)
    parts[UNATTRIBUTED] = parts.get(UNATTRIBUTED, 0.0) + known.unattributed_mj
    if idle_mw is not None:
        parts[IDLE] = known.idle_mj
    total = round(grown)
    return {**dict(zip(parts, apportion(list(parts.values()), total), strict=True)), TOTAL: total}


def apportion(parts: Sequence[float], total: int) -> list[int]:
    """Round parts to integers whose sum is exactly `total`, the rounded sum of parts (largest remainder).

    parts must not be negative; none moves by more than one.
    """
    whole = [int(part) for part in parts]
    order = sorted(range(len(parts)), key=lambda index: whole[index] - parts[index])
    for index in order[: max(0, total - sum(whole))]:
        whole[index] += 1
    return whole
