"""Stream priorities: trainer and service are threads of one process; the service's stream goes first.

Priorities mean nothing between processes (MPS has its own). A kernel that runs is not preempted, so a request waits
for the rest of one kernel. How the threads are set up: `corun.share.in_process`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from corun.errors import InputError
from corun.share.host import Host
from corun.share.policy import Cast, Kind, Policy, no_gpu

LEAST, GREATEST = 0, -5


@dataclass
class StreamPriority(Policy):
    """service_priority: of the service's stream, 0 (as the trainer's) down to -5 (CUDA's greatest)."""

    service_priority: int = GREATEST

    name: ClassVar[str] = "stream_priority"
    kind: ClassVar[Kind] = "gpu"
    summary: ClassVar[str] = "CUDA stream priorities inside one process"

    def __post_init__(self) -> None:
        if not GREATEST <= self.service_priority <= LEAST:
            raise InputError(f"service_priority is {self.service_priority}; CUDA has {LEAST} down to {GREATEST}")

    def refusals(self, host: Host, cast: Cast) -> list[str]:
        problems = no_gpu(cast, host)
        if not cast.one_process:
            problems.append("trainer and service are separate processes, and stream priorities act inside one")
        return problems

    def in_force(self) -> dict[str, Any]:
        return {"service_priority": self.service_priority, "trainer_priority": LEAST}
