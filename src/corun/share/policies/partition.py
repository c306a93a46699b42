"""Disjoint cores: services and trainer never meet on a core, at the price of what the other side leaves unused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from corun.errors import InputError
from corun.share.host import Host
from corun.share.openmp import waiting
from corun.share.policy import Cast, Kind, Member, Policy
from corun.share.start import Setup


@dataclass
class Partition(Policy):
    """service_cores: cores for all services together; 0 = as many as they have threads, at most all but one.

    Affinity is set before a process starts, so that its thread pool is made for the cores it has; on a running
    process thread by thread.
    """

    service_cores: int = 0
    passive: bool = True

    name: ClassVar[str] = "partition"
    kind: ClassVar[Kind] = "cores"
    summary: ClassVar[str] = "disjoint cores for services and trainer"
    live: ClassVar[bool] = True

    _services: tuple[int, ...] = field(default=(), init=False, repr=False)
    _trainer: tuple[int, ...] = field(default=(), init=False, repr=False)
    _all: tuple[int, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.service_cores < 0:
            raise InputError(f"service_cores is {self.service_cores}; give a number of cores, or 0 to have it chosen")

    def refusals(self, host: Host, cast: Cast) -> list[str]:
        cores = len(host.cores)
        if cast.one_process:
            return ["trainer and services are threads of one process, and cores are given to processes"]
        if cores < 2:
            return ["this process may use one core only; two sides need two"]
        if self.service_cores >= cores:
            return [f"service_cores is {self.service_cores} of {cores}; the trainer needs at least one core"]
        return []

    def prepare(self, host: Host, cast: Cast) -> None:
        self._all = host.cores
        wanted = self.service_cores or sum(member.threads for member in cast.services)
        count = max(1, min(wanted, len(self._all) - 1))
        self._services, self._trainer = self._all[:count], self._all[count:]

    def _cores(self, member: Member) -> tuple[int, ...]:
        if member.trains:
            return self._trainer
        return self._services if member.serves else ()

    def threads(self, member: Member, host: Host) -> int | None:
        cores = self._cores(member)
        return len(cores) if member.trains else min(member.threads, len(cores)) if cores else None

    def environment(self, member: Member) -> dict[str, str]:
        return waiting(self.passive) if member.trains else {}

    def setup(self, member: Member) -> Setup:
        return Setup(cores=self._cores(member))

    def attach(self, member: Member, pid: int, host: Host) -> None:
        cores = self._cores(member)
        for tid in host.all_threads_of(pid) if cores else ():
            host.set_cores(tid, cores)

    def detach(self, member: Member, pid: int, host: Host) -> None:
        for tid in host.all_threads_of(pid):
            host.set_cores(tid, self._all)

    def in_force(self) -> dict[str, Any]:
        return {"service_cores": list(self._services), "trainer_cores": list(self._trainer), "passive": self.passive}
