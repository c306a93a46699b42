"""A fake NVML library under the real nvidia-ml-py: struct sizes and error mapping are the real ones.

    gpu = FakeGpu(power_mw=250_000, processes={4711: 2 << 30}, samples=[(4711, stamp_us, 61)])
    with installed(FakeNvml([gpu])):
        rows, uses = Gpus(Faults()).read()

The binding asks its library for C functions by name and passes ctypes references; the functions here fill
what the references point to. A name in `missing` is unknown to the library, as with an old driver; a code in
`failing` is returned instead of success.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from corun.profile.nvml import load_binding

SUCCESS = 0
NOT_SUPPORTED = 3
NOT_FOUND = 6
INSUFFICIENT_SIZE = 7
GPU_IS_LOST = 15

_UNSIGNED_LONG_LONG = 3
_NOT_AVAILABLE = 2**64 - 1


@dataclass
class FakeGpu:
    """The state of one device; change it between two readings.

    processes: pid -> bytes held (None = not available). samples: (pid, stamp in epoch µs, SM percent).
    fields: field id -> value; others answer "not supported". gpm: metric id -> value, None = no monitors.
    """

    name: str = "Fake GPU"
    uuid: str = "GPU-fake"
    power_mw: int = 100_000
    energy_mj: int = 1_000_000
    power_limit_mw: int = 300_000
    util_gpu_pct: int = 50
    util_mem_pct: int = 20
    mem_used: int = 1 << 30
    mem_total: int = 16 << 30
    sm_clock_mhz: int = 1500
    mem_clock_mhz: int = 5000
    temp_c: int = 60
    reasons: int = 4
    mig: int = 0
    fields: dict[int, int] = field(default_factory=dict)
    processes: dict[int, int | None] = field(default_factory=dict)
    samples: list[tuple[int, int, int]] = field(default_factory=list)
    gpm: dict[int, float] | None = None
    failing: dict[str, int] = field(default_factory=dict)


class FakeNvml:
    """Stands in for libnvidia-ml.so.1; `calls` counts what was asked."""

    def __init__(self, gpus: Sequence[FakeGpu], missing: Sequence[str] = (), driver: str = "580.65.06") -> None:
        self.gpus = list(gpus)
        self.missing = set(missing)
        self.driver = driver
        self.failing: dict[str, int] = {}
        self.calls: Counter[str] = Counter()
        self.asked_since_us: list[int] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("nvml") or name in self.missing:
            raise AttributeError(name)
        body = getattr(type(self), f"_{name}", None)
        if body is None:
            raise AttributeError(name)
        return lambda *arguments: self._run(name, body, arguments)

    def _run(self, name: str, body: Callable[..., int | None], arguments: tuple[Any, ...]) -> int:
        self.calls[name] += 1
        if name in self.failing:
            return self.failing[name]
        if name.startswith("nvmlDevice") and isinstance(arguments[0], ctypes._Pointer):
            gpu = self.gpus[_address(arguments[0]) - 1]
            arguments = (gpu, *arguments[1:])
            if name in gpu.failing:
                return gpu.failing[name]
        return body(self, *arguments) or SUCCESS

    def _nvmlInitWithFlags(self, flags: int) -> None: ...

    def _nvmlShutdown(self) -> None: ...

    def _nvmlSystemGetDriverVersion(self, out: Any, size: Any) -> None:
        out.value = self.driver.encode()

    def _nvmlErrorString(self, code: Any) -> None: ...

    def _nvmlDeviceGetCount_v2(self, out: Any) -> None:
        out._obj.value = len(self.gpus)

    def _nvmlDeviceGetHandleByIndex_v2(self, index: Any, out: Any) -> None:
        ctypes.c_void_p.from_address(ctypes.addressof(out._obj)).value = index.value + 1

    def _nvmlDeviceGetName(self, gpu: FakeGpu, out: Any, size: Any) -> None:
        out.value = gpu.name.encode()

    def _nvmlDeviceGetUUID(self, gpu: FakeGpu, out: Any, size: Any) -> None:
        out.value = gpu.uuid.encode()

    def _nvmlDeviceGetPowerUsage(self, gpu: FakeGpu, out: Any) -> None:
        out._obj.value = gpu.power_mw

    def _nvmlDeviceGetEnforcedPowerLimit(self, gpu: FakeGpu, out: Any) -> None:
        out._obj.value = gpu.power_limit_mw

    def _nvmlDeviceGetTotalEnergyConsumption(self, gpu: FakeGpu, out: Any) -> None:
        out._obj.value = gpu.energy_mj

    def _nvmlDeviceGetUtilizationRates(self, gpu: FakeGpu, out: Any) -> None:
        out._obj.gpu, out._obj.memory = gpu.util_gpu_pct, gpu.util_mem_pct

    def _nvmlDeviceGetMemoryInfo_v2(self, gpu: FakeGpu, out: Any) -> None:
        out._obj.used, out._obj.total = gpu.mem_used, gpu.mem_total

    _nvmlDeviceGetMemoryInfo = _nvmlDeviceGetMemoryInfo_v2

    def _nvmlDeviceGetClockInfo(self, gpu: FakeGpu, kind: Any, out: Any) -> None:
        out._obj.value = {1: gpu.sm_clock_mhz, 2: gpu.mem_clock_mhz}[kind.value]

    def _nvmlDeviceGetTemperatureV(self, gpu: FakeGpu, out: Any) -> None:
        out._obj.temperature = gpu.temp_c

    def _nvmlDeviceGetTemperature(self, gpu: FakeGpu, sensor: Any, out: Any) -> None:
        out._obj.value = gpu.temp_c

    def _nvmlDeviceGetCurrentClocksEventReasons(self, gpu: FakeGpu, out: Any) -> None:
        out._obj.value = gpu.reasons

    _nvmlDeviceGetCurrentClocksThrottleReasons = _nvmlDeviceGetCurrentClocksEventReasons

    def _nvmlDeviceGetMigMode(self, gpu: FakeGpu, current: Any, pending: Any) -> None:
        current._obj.value = pending._obj.value = gpu.mig

    def _nvmlDeviceGetFieldValues(self, gpu: FakeGpu, count: Any, values: Any) -> None:
        for value in values._obj:
            known = value.fieldId in gpu.fields
            value.nvmlReturn = SUCCESS if known else NOT_SUPPORTED
            value.valueType = _UNSIGNED_LONG_LONG
            value.value.ullVal = gpu.fields.get(value.fieldId, 0)

    def _nvmlDeviceGetComputeRunningProcesses_v3(self, gpu: FakeGpu, count: Any, out: Any) -> int:
        if out is None:
            count._obj.value = len(gpu.processes)
            return INSUFFICIENT_SIZE if gpu.processes else SUCCESS
        for slot, (pid, used) in zip(out, gpu.processes.items(), strict=False):
            slot.pid, slot.usedGpuMemory = pid, _NOT_AVAILABLE if used is None else used
        count._obj.value = len(gpu.processes)
        return SUCCESS

    _nvmlDeviceGetComputeRunningProcesses_v2 = _nvmlDeviceGetComputeRunningProcesses_v3

    def _nvmlDeviceGetProcessUtilization(self, gpu: FakeGpu, out: Any, count: Any, since: Any) -> int:
        fresh = [sample for sample in gpu.samples if sample[1] > since.value]
        if out is None:
            self.asked_since_us.append(since.value)
            count._obj.value = len(fresh)
            return INSUFFICIENT_SIZE if fresh else NOT_FOUND
        for slot, (pid, stamp_us, sm_pct) in zip(out, fresh, strict=True):
            slot.pid, slot.timeStamp, slot.smUtil = pid, stamp_us, sm_pct
        return SUCCESS

    def _nvmlGpmQueryDeviceSupport(self, device: Any, out: Any) -> None:
        out._obj.isSupportedDevice = self._gpu(device).gpm is not None

    def _nvmlGpmSampleAlloc(self, out: Any) -> None:
        ctypes.c_void_p.from_address(ctypes.addressof(out._obj)).value = 1

    def _nvmlGpmSampleFree(self, sample: Any) -> None: ...

    def _nvmlGpmSampleGet(self, device: Any, sample: Any) -> None:
        ctypes.c_void_p.from_address(ctypes.addressof(sample)).value = _address(device)

    def _nvmlGpmMetricsGet(self, request: Any) -> None:
        metrics = self.gpus[_address(request._obj.sample2) - 1].gpm or {}
        for slot in request._obj.metrics[: request._obj.numMetrics]:
            slot.nvmlReturn = SUCCESS if slot.metricId in metrics else NOT_SUPPORTED
            slot.value = metrics.get(slot.metricId, 0.0)

    def _gpu(self, device: Any) -> FakeGpu:
        return self.gpus[_address(device) - 1]


def _address(pointer: Any) -> int:
    """The number a handle points to; the fake counts its devices from 1 there."""
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0


@contextmanager
def installed(library: FakeNvml) -> Iterator[FakeNvml]:
    """Put the fake under nvidia-ml-py, and what was there back afterwards."""
    binding = load_binding()
    before = binding.nvmlLib
    binding.nvmlLib = library
    binding._nvmlGetFunctionPointer_cache.clear()
    try:
        yield library
    finally:
        binding.nvmlLib = before
        binding._nvmlGetFunctionPointer_cache.clear()
