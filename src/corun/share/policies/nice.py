"""The trainer is nice: it gets a small weight wherever a service wants the same core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from corun.errors import InputError
from corun.share.host import Host
from corun.share.openmp import waiting
from corun.share.policy import Cast, Kind, Member, Policy, no_process_of_its_own
from corun.share.start import Setup


@dataclass
class Nice(Policy):
    """nice: 1 to 19 for the trainer. passive: its OpenMP threads sleep between parallel regions."""

    nice: int = 19
    passive: bool = False

    name: ClassVar[str] = "nice"
    kind: ClassVar[Kind] = "priority"
    summary: ClassVar[str] = "nice value of the trainer"
    live: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.nice <= 19:
            raise InputError(f"nice is {self.nice}; it must be 1 to 19 (raising priority needs other means)")

    def environment(self, member: Member) -> dict[str, str]:
        return waiting(self.passive) if member.trains else {}

    def setup(self, member: Member) -> Setup:
        return Setup(nice=self.nice) if member.trains else Setup()

    def attach(self, member: Member, pid: int, host: Host) -> None:
        if member.trains:
            for tid in host.all_threads_of(pid):
                host.set_nice(tid, self.nice)

    def detach(self, member: Member, pid: int, host: Host) -> None:
        if member.trains:
            for tid in host.all_threads_of(pid):
                host.set_nice(tid, 0)

    def refusals(self, host: Host, cast: Cast) -> list[str]:
        return no_process_of_its_own(cast)

    def expects(self, host: Host) -> str | None:
        return "priority"

    def in_force(self) -> dict[str, Any]:
        return {"passive": self.passive}
