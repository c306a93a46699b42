"""Green contexts: a fixed number of SMs for the service's streams, the rest for the trainer's, in one process.

Not work-conserving: what one side leaves idle stays idle. CUDA rounds the number of SMs (to 8 on Hopper), so the
number in force is read back. The interface of torch changed with almost every release; `corun.share.in_process` asks
for features, not versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

from corun.errors import InputError
from corun.share.host import Host
from corun.share.policy import Cast, Kind, Policy, no_gpu, not_together

OLDEST_TORCH = (2, 12)
OLDEST_DRIVER = 570  # CUDA 12.8


@dataclass
class GreenContext(Policy):
    """service_sms: streaming multiprocessors for the service."""

    service_sms: int = 32

    name: ClassVar[str] = "green_context"
    kind: ClassVar[Kind] = "gpu"
    summary: ClassVar[str] = "CUDA green contexts: disjoint SMs inside one process"
    one_process: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.service_sms < 1:
            raise InputError(f"service_sms is {self.service_sms}; give a number of SMs")

    def refusals(self, host: Host, cast: Cast) -> list[str]:
        problems = no_gpu(cast, host)
        driver = host.driver_version
        if driver is not None and driver[0] < OLDEST_DRIVER:
            problems.append(f"the NVIDIA driver is {driver[0]}; green contexts need {OLDEST_DRIVER} (CUDA 12.8)")
        if torch_version() < OLDEST_TORCH:
            problems.append("this torch has no green contexts with streams of their own; they came with 2.12")
        return [*problems, *not_together(cast)]

    def lanes(self) -> dict[str, Any]:
        return {"kind": "green", "service_sms": self.service_sms}


def torch_version() -> tuple[int, ...]:
    """(major, minor) of the installed torch without importing it; (0, 0) when it is not installed."""
    try:
        parts = version("torch").split("+")[0].split(".")
    except PackageNotFoundError:
        return (0, 0)
    return tuple(int(part) for part in parts[:2])
