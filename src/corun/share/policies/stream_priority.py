"""Stream priorities: trainer and service are threads of one process; the service's stream goes first.

Priorities mean nothing between processes (MPS has its own). A kernel that runs is not preempted, so a request waits
for the rest of one kernel. What CUDA made of the priorities is read back and told in HELLO: `corun.share.in_process`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from corun.errors import InputError
from corun.share.host import Host
from corun.share.policy import Cast, Kind, Policy, no_gpu, not_together

LEAST, GREATEST = 0, -5


@dataclass
class StreamPriority(Policy):
    """service_priority: of the service's stream, 0 (as the trainer's) down to -5 (CUDA's greatest)."""

    service_priority: int = GREATEST

    name: ClassVar[str] = "stream_priority"
    kind: ClassVar[Kind] = "gpu"
    summary: ClassVar[str] = "CUDA stream priorities inside one process"
    one_process: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not GREATEST <= self.service_priority <= LEAST:
            raise InputError(f"service_priority is {self.service_priority}; CUDA has {LEAST} down to {GREATEST}")

    def refusals(self, host: Host, cast: Cast) -> list[str]:
        return [*no_gpu(cast, host), *not_together(cast)]

    def lanes(self) -> dict[str, Any]:
        return {"kind": "priority", "service_priority": self.service_priority}
