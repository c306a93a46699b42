"""GPM, the GPU performance monitors of Hopper and later: how busy the SMs, tensor cores and memory really were.

A metric is the difference of two samples, so each tick's cells speak of the time since the tick before. The
two sample buffers are allocated once and swapped.
"""

from __future__ import annotations

import contextlib
from typing import Any

from corun.profile.nvml import Handle, NotHere, Nvml, NvmlFault
from corun.profile.source import Row

METRICS = {"gpm_sm_pct": 2, "gpm_occupancy_pct": 3, "gpm_tensor_pct": 5, "gpm_dram_pct": 10}


class Gpm:
    """The monitors of one GPU; NotHere from the constructor where it has none."""

    def __init__(self, nvml: Nvml, handle: Handle) -> None:
        self._nvml = nvml
        self._handle = handle
        if not nvml.call("nvmlGpmQueryDeviceSupport", handle).isSupportedDevice:
            raise NotHere("nvmlGpmQueryDeviceSupport: this GPU has no performance monitors (Hopper and later have)")
        self._before: Any = nvml.call("nvmlGpmSampleAlloc")
        self._now: Any = nvml.call("nvmlGpmSampleAlloc")
        nvml.call("nvmlGpmSampleGet", handle, self._before)

    def read(self) -> Row:
        """The metrics since the last call that succeeded; one the GPU does not have leaves its cell empty."""
        self._nvml.call("nvmlGpmSampleGet", self._handle, self._now)
        request = self._nvml.binding.c_nvmlGpmMetricsGet_t()
        request.version = self._nvml.binding.NVML_GPM_METRICS_GET_VERSION
        request.numMetrics = len(METRICS)
        request.sample1, request.sample2 = self._before, self._now
        for slot, metric in enumerate(METRICS.values()):
            request.metrics[slot].metricId = metric
        self._nvml.call("nvmlGpmMetricsGet", request)
        self._before, self._now = self._now, self._before
        return {
            column: round(request.metrics[slot].value, 3)
            for slot, column in enumerate(METRICS)
            if not request.metrics[slot].nvmlReturn
        }

    def close(self) -> None:
        """Free both samples."""
        for sample in (self._before, self._now):
            with contextlib.suppress(NvmlFault):
                self._nvml.call("nvmlGpmSampleFree", sample)
