"""Every GPU once a tick, and whose work it was doing.

What a device cannot do is found out once, at the start, and named. Counters (energy, throttle nanoseconds,
PCIe bytes) are preferred to instants: they also hold what happened between two ticks.

Attribution, best first; the name stands in `gpu_attr`::

    fdinfo      engine nanoseconds from DRM (made in corun.profile.processes)
    nvml_sm     SM utilisation per process; listed on the GPU but without a sample = was not active = 0
    exclusive   the only process on the GPU has all of its utilisation
    (empty)     not known: MIG, an MPS server in front, a container without the host's process numbers
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from corun.profile.gpm import Gpm
from corun.profile.nvml import Handle, NotHere, NothingFound, Nvml, NvmlFault, driver_problem, succeeded
from corun.profile.source import Cell, Faults, Row, Status, Unavailable

_MIB = 1024 * 1024
_LIMIT_EVERY = 60
_FUTURE_US = 5_000_000

_CLOCK_SM, _CLOCK_MEM, _SENSOR_GPU = 1, 2, 0

Call = tuple[Any, ...]
_CALLS: dict[str, tuple[Call, ...]] = {
    "power_mw": (("nvmlDeviceGetPowerUsage",),),
    "energy_mj": (("nvmlDeviceGetTotalEnergyConsumption",),),
    "sm_clock_mhz": (("nvmlDeviceGetClockInfo", _CLOCK_SM),),
    "mem_clock_mhz": (("nvmlDeviceGetClockInfo", _CLOCK_MEM),),
    "temp_c": (("nvmlDeviceGetTemperatureV", _SENSOR_GPU), ("nvmlDeviceGetTemperature", _SENSOR_GPU)),
    "throttle_reasons": (
        ("nvmlDeviceGetCurrentClocksEventReasons",),
        ("nvmlDeviceGetCurrentClocksThrottleReasons",),
    ),
}
_FIELDS = {
    "power_instant_mw": 186,
    "power_average_mw": 185,
    "throttle_power_ns": 74,
    "throttle_sync_ns": 76,
    "throttle_sw_thermal_ns": 269,
    "throttle_hw_thermal_ns": 270,
    "throttle_brake_ns": 271,
    "pcie_tx_bytes": 197,
    "pcie_rx_bytes": 198,
}
_VALUE_OF_TYPE = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")


@dataclass(frozen=True)
class GpuUse:
    """What one process uses of one GPU, or of several after `plus`."""

    gpu: str
    mem_mib: float | None = None
    sm_pct: float | None = None
    attr: str = ""
    note: str = ""

    def plus(self, other: GpuUse) -> GpuUse:
        """The same process on one more GPU."""
        return GpuUse(
            f"{self.gpu}+{other.gpu}",
            _sum(self.mem_mib, other.mem_mib),
            _sum(self.sm_pct, other.sm_pct),
            self.attr or other.attr,
            self.note or other.note,
        )

    def cells(self) -> Row:
        """As columns of process.csv."""
        return {
            "gpu": self.gpu,
            "gpu_mem_mib": self.mem_mib,
            "gpu_sm_pct": self.sm_pct,
            "gpu_attr": self.attr,
            "gpu_note": self.note,
        }


def _sum(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else one + other


class Gpu:
    """One device: the calls that work on it, and its processes."""

    def __init__(self, nvml: Nvml, index: int, faults: Faults, wall_ns: Callable[[], int]) -> None:
        self.index = index
        self.absent: dict[str, str] = {}
        self._nvml = nvml
        self._faults = faults
        self._wall_ns = wall_ns
        self._handle: Handle = nvml.call("nvmlDeviceGetHandleByIndex", index)
        self._readers: list[tuple[str, Callable[[], Row]]] = []
        for column, alternatives in _CALLS.items():
            self._keep_first(column, [self._reader(column, call) for call in alternatives])
        self._keep_first("utilisation", [self._utilisation])
        self._keep_first("memory", [lambda: self._memory(2), lambda: self._memory(1)])
        self._fields = self._probe_fields()
        self._gpm = self._probe_gpm()
        self._limit = _PowerLimit(lambda: self._call("nvmlDeviceGetEnforcedPowerLimit"))
        self._keep_first("power_limit_mw", [self._limit.read])
        self._processes = _Processes(nvml, self._handle, wall_ns)
        for part, reason in self._processes.probe().items():
            self.absent[part] = reason

    def _call(self, function: str, *arguments: Any) -> Any:
        return self._nvml.call(function, self._handle, *arguments)

    def _reader(self, column: str, call: Call) -> Callable[[], Row]:
        return lambda: {column: self._call(*call)}

    def _keep_first(self, name: str, readers: list[Callable[[], Row]]) -> None:
        """Keep the first reader that this device knows; a fault of the moment does not rule it out."""
        for reader in readers:
            try:
                reader()
            except NotHere as error:
                self.absent.setdefault(name, str(error))
                continue
            except NvmlFault as error:
                self._fault(name, error)
            self.absent.pop(name, None)
            self._readers.append((name, reader))
            return

    def _fault(self, name: str, error: Exception | str) -> None:
        self._faults.record(f"gpu{self.index} {name}", error)

    def _utilisation(self) -> Row:
        rates = self._call("nvmlDeviceGetUtilizationRates")
        return {"util_gpu_pct": rates.gpu, "util_mem_pct": rates.memory}

    def _memory(self, version: int) -> Row:
        """Version 2 leaves the driver's own reserve out of `used`, as nvidia-smi does."""
        extra = (self._nvml.binding.nvmlMemory_v2,) if version == 2 else ()
        memory = self._call("nvmlDeviceGetMemoryInfo", *extra)
        return {"mem_used_mib": round(memory.used / _MIB, 3), "mem_total_mib": round(memory.total / _MIB, 3)}

    def _probe_fields(self) -> dict[str, int]:
        """The field values this device has; all of them cost one call."""
        known = dict(_FIELDS)
        try:
            values = self._call("nvmlDeviceGetFieldValues", list(known.values()))
        except NvmlFault as error:
            self.absent |= dict.fromkeys(known, str(error))
            return {}
        for column, value in zip(_FIELDS, values, strict=True):
            if value.nvmlReturn:
                self.absent[column] = f"field {known.pop(column)}: {self._reason(value.nvmlReturn)}"
        return known

    def _reason(self, code: int) -> str:
        return str(self._nvml.binding.NVMLError(code))

    def _read_fields(self) -> Row:
        if not self._fields:
            return {}
        row: Row = {}
        values = self._call("nvmlDeviceGetFieldValues", list(self._fields.values()))
        for column, value in zip(self._fields, values, strict=True):
            if value.nvmlReturn:
                self._fault(column, self._reason(value.nvmlReturn))
            else:
                row[column] = field_value(value)
        return row

    def _probe_gpm(self) -> Gpm | None:
        try:
            return Gpm(self._nvml, self._handle)
        except NvmlFault as error:
            self.absent["gpm"] = str(error)
            return None

    def read(self) -> tuple[Row, dict[int, GpuUse]]:
        """This tick's row of gpu.csv without the tick itself, and the use of each process on the GPU."""
        row: Row = {"gpu": self.index}
        for name, reader in [*self._readers, ("fields", self._read_fields), ("gpm", self._read_gpm)]:
            try:
                row |= reader()
            except NvmlFault as error:
                self._fault(name, error)
        try:
            uses = self._processes.read(str(self.index), row.get("util_gpu_pct"))
        except NvmlFault as error:
            self._fault("processes", error)
            return row, {}
        row["processes"] = self._processes.count
        for flaw in self._processes.flaws:
            self._fault("nvml_sm", flaw)
        return row, uses

    def _read_gpm(self) -> Row:
        return self._gpm.read() if self._gpm else {}

    def facts(self) -> dict[str, object]:
        """What does not change during a run, or only matters at its start and end."""
        wanted: dict[str, Call] = {
            "name": ("nvmlDeviceGetName",),
            "uuid": ("nvmlDeviceGetUUID",),
            "power_limit_mw": ("nvmlDeviceGetEnforcedPowerLimit",),
            "slowdown_temp_c": ("nvmlDeviceGetTemperatureThreshold", 1),
            "mig_mode": ("nvmlDeviceGetMigMode",),
            "ecc_corrected": ("nvmlDeviceGetTotalEccErrors", 0, 0),
            "ecc_uncorrected": ("nvmlDeviceGetTotalEccErrors", 1, 0),
        }
        facts: dict[str, object] = {}
        for key, call in wanted.items():
            try:
                facts[key] = self._call(*call)
            except NvmlFault:
                continue
        return facts

    def close(self) -> None:
        if self._gpm:
            self._gpm.close()


def field_value(value: Any) -> Cell:
    """The number of an nvmlFieldValue_t, by its type tag."""
    number: int | float = getattr(value.value, _VALUE_OF_TYPE[value.valueType])
    return number


class _PowerLimit:
    """The enforced limit, asked for once a minute: it is a setting, not a measurement."""

    def __init__(self, ask: Callable[[], int]) -> None:
        self._ask = ask
        self._value: int | None = None
        self._age = 0

    def read(self) -> Row:
        if self._value is None or self._age >= _LIMIT_EVERY:
            self._value, self._age = None, 0
            self._value = self._ask()
        self._age += 1
        return {"power_limit_mw": self._value}


class _Processes:
    """Who is on the GPU, with memory and, where NVML knows it, SM utilisation.

    The driver wants the stamp of the newest sample seen, in microseconds since the epoch: asking from 0 would
    re-read its whole buffer every second.
    """

    def __init__(self, nvml: Nvml, handle: Handle, wall_ns: Callable[[], int]) -> None:
        self._nvml = nvml
        self._handle = handle
        self._wall_ns = wall_ns
        self._last_seen_us = wall_ns() // 1000 - 1_000_000
        self._list_function = "nvmlDeviceGetComputeRunningProcesses_v3"
        self._has_list = self._has_samples = True
        self.count: int | None = None
        self.flaws: list[str] = []

    def probe(self) -> dict[str, str]:
        """What is missing, with the reasons; nothing missing is the normal case."""
        absent = {}
        try:
            self._list()
        except NotHere as error:
            self._has_list, absent["processes"] = False, str(error)
        except NvmlFault:
            pass
        try:
            self._samples()
        except NotHere as error:
            self._has_samples, absent["nvml_sm"] = False, str(error)
        except NvmlFault:
            pass
        return absent

    def _list(self) -> list[Any]:
        try:
            return list(self._nvml.call(self._list_function, self._handle))
        except NotHere:
            if self._list_function.endswith("_v2"):
                raise
            self._list_function = "nvmlDeviceGetComputeRunningProcesses_v2"
            return list(self._nvml.call(self._list_function, self._handle))

    def _samples(self) -> list[Any]:
        try:
            return list(self._nvml.call("nvmlDeviceGetProcessUtilization", self._handle, self._last_seen_us))
        except NothingFound:
            return []
        except NvmlFault as error:
            if succeeded(error):
                return []
            raise

    def read(self, gpu: str, util_gpu_pct: Cell) -> dict[int, GpuUse]:
        """Use by process number; only processes NVML lists on this GPU or has a sample of."""
        self.flaws = []
        self.count = None
        memory: dict[int, float | None] = {}
        if self._has_list:
            memory = {process.pid: _mib(process.usedGpuMemory) for process in self._list()}
            self.count = len(memory)
        if self._has_samples:
            shares = self._newest(self._samples())
            return {pid: self._sampled(gpu, memory.get(pid), shares.get(pid, 0)) for pid in memory | shares}
        if len(memory) == 1:
            [(pid, mib)] = memory.items()
            share = util_gpu_pct if isinstance(util_gpu_pct, int | float) else None
            return {pid: GpuUse(gpu, mib, share, "exclusive")}
        return {pid: GpuUse(gpu, mib) for pid, mib in memory.items()}

    def _newest(self, samples: list[Any]) -> dict[int, int]:
        """SM utilisation of the newest sample of each process; the driver pads its answer with junk."""
        horizon = self._wall_ns() // 1000 + _FUTURE_US
        fresh = [s for s in samples if s.pid and self._last_seen_us < s.timeStamp <= horizon]
        if len(fresh) < len(samples):
            self.flaws.append("samples without a process or with a stamp out of range were dropped")
        fresh.sort(key=lambda sample: sample.timeStamp)
        if fresh:
            self._last_seen_us = fresh[-1].timeStamp
        return {sample.pid: sample.smUtil for sample in fresh}

    def _sampled(self, gpu: str, mib: float | None, sm_pct: int) -> GpuUse:
        if sm_pct > 100:
            self.flaws.append("more than 100 % was clamped")
            return GpuUse(gpu, mib, 100, "nvml_sm", "clamped")
        return GpuUse(gpu, mib, sm_pct, "nvml_sm")


def _mib(used_bytes: int | None) -> float | None:
    return None if used_bytes is None else round(used_bytes / _MIB, 3)


class Gpus:
    """All GPUs NVML shows. Unavailable without NVML or without a GPU."""

    name = "nvml"

    def __init__(self, faults: Faults, wall_ns: Callable[[], int] = time.time_ns) -> None:
        self._nvml = Nvml()
        self._faults = faults
        self._gpus: list[Gpu] = []
        self._lost: dict[str, str] = {}
        for index in range(self._count()):
            try:
                self._gpus.append(Gpu(self._nvml, index, faults, wall_ns))
            except NvmlFault as error:
                self._lost[f"gpu{index}"] = str(error)
        if not self._gpus:
            self._nvml.close()
            raise Unavailable(next(iter(self._lost.values()), "NVML shows no GPU"))

    def _count(self) -> int:
        try:
            return int(self._nvml.call("nvmlDeviceGetCount"))
        except NvmlFault as error:
            raise Unavailable(str(error)) from error

    def read(self) -> tuple[list[Row], dict[int, GpuUse]]:
        """One row per GPU, and per process what it uses of all of them."""
        rows: list[Row] = []
        uses: dict[int, GpuUse] = {}
        for gpu in self._gpus:
            row, here = gpu.read()
            rows.append(row)
            for pid, use in here.items():
                uses[pid] = uses[pid].plus(use) if pid in uses else use
        return rows, uses

    def status(self) -> Status:
        driver = self._nvml.driver()
        details: dict[str, object] = {"driver": driver, "power_mw": "1 s average from Ampere on, except GA100"}
        absent = dict(self._lost)
        problem = driver_problem(driver)
        if problem:
            details["warning"] = problem
        for gpu in self._gpus:
            details[f"gpu{gpu.index}"] = gpu.facts()
            absent |= {f"gpu{gpu.index} {part}": reason for part, reason in gpu.absent.items()}
        return Status(self.name, details=details, absent=absent)

    def close(self) -> None:
        for gpu in self._gpus:
            gpu.close()
        self._nvml.close()
