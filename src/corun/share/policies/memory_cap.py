"""A memory limit for the trainer, so that running out of memory is its own error and not the services'.

On a GPU the limit is a fraction of the device for torch's caching allocator; the CUDA context (0.3 to 0.6 GB) and
library workspaces are outside it. On a CPU it is RLIMIT_DATA. In both cases the trainer that hits it cuts its
micro-batches in half and makes the step again.

RLIMIT_DATA counts address space, and glibc keeps what was freed: after one failed attempt nothing smaller would fit
either. The capped trainer therefore gets its tensors from mmap and gives them back at once, which costs page faults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from corun.errors import InputError
from corun.share.host import Host
from corun.share.policy import Cast, Kind, Member, Policy, no_process_of_its_own
from corun.share.start import Setup

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}


@dataclass
class MemoryCap(Policy):
    """memory_fraction: of the GPU, for the trainer. memory_mib: of the machine's memory, where it trains on the CPU."""

    memory_fraction: float = 0.5
    memory_mib: int = 0

    name: ClassVar[str] = "memory_cap"
    kind: ClassVar[Kind] = "memory"
    summary: ClassVar[str] = "a memory limit for the trainer"

    _on_gpu: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.memory_fraction <= 1 or self.memory_mib < 0:
            raise InputError(
                f"memory_fraction is {self.memory_fraction} and memory_mib {self.memory_mib}",
                ["memory_fraction must be above 0 and at most 1", "memory_mib must be 1 or more; 0 = not set"],
            )

    def refusals(self, host: Host, cast: Cast) -> list[str]:
        if problems := no_process_of_its_own(cast):
            return problems
        if not cast.on_gpu and not self.memory_mib:
            return ["the trainer runs on the CPU: memory_mib must say how much memory it may have"]
        return []

    def prepare(self, host: Host, cast: Cast) -> None:
        self._on_gpu = cast.on_gpu

    def environment(self, member: Member) -> dict[str, str]:
        limited = member.trains and not self._on_gpu and self.memory_mib
        return dict(GIVE_BACK) if limited else {}

    def setup(self, member: Member) -> Setup:
        limited = member.trains and not self._on_gpu and self.memory_mib
        return Setup(data_limit_mib=self.memory_mib) if limited else Setup()

    def trainer_flags(self) -> list[str]:
        return ["--memory-fraction", str(self.memory_fraction)] if self._on_gpu else []

    def in_force(self) -> dict[str, Any]:
        if self._on_gpu:
            return {"memory_fraction": self.memory_fraction}
        return {"RLIMIT_DATA_mib": self.memory_mib}
