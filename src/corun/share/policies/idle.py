"""SCHED_IDLE for every thread of the trainer: it runs where no service wants to, and leaves at once when one does.

Needs no right. Threads that a pool made before the call keep their old class, so it is set before the trainer
starts (children inherit it) and, on a running trainer, thread by thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from corun.share.host import IDLE_CLASS, NORMAL_CLASS, Host
from corun.share.openmp import waiting
from corun.share.policy import Cast, Kind, Member, Policy, no_process_of_its_own
from corun.share.start import Setup


@dataclass
class Idle(Policy):
    """passive: the trainer's OpenMP threads sleep between parallel regions instead of spinning."""

    passive: bool = True

    name: ClassVar[str] = "idle"
    kind: ClassVar[Kind] = "priority"
    summary: ClassVar[str] = "SCHED_IDLE for all threads of the trainer, passive OpenMP waiting"
    live: ClassVar[bool] = True

    def environment(self, member: Member) -> dict[str, str]:
        return waiting(self.passive) if member.trains else {}

    def setup(self, member: Member) -> Setup:
        return Setup(idle=member.trains)

    def attach(self, member: Member, pid: int, host: Host) -> None:
        if member.trains:
            for tid in host.all_threads_of(pid):
                host.set_class(tid, IDLE_CLASS)

    def detach(self, member: Member, pid: int, host: Host) -> None:
        if member.trains:
            for tid in host.all_threads_of(pid):
                host.set_class(tid, NORMAL_CLASS)

    def refusals(self, host: Host, cast: Cast) -> list[str]:
        return no_process_of_its_own(cast)

    def expects(self, host: Host) -> str | None:
        return "priority"

    def in_force(self) -> dict[str, Any]:
        return {"passive": self.passive}
