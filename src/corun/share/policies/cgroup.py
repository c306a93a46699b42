"""A cgroup of its own for the trainer, idle or with the smallest weight: works across sessions and containers.

cgroup v2: a sibling of the services' own group, with cpu.idle or cpu.weight; needs write access to the parent and
its cpu controller switched on. v1: a child of the cpu hierarchy's group, with cpu.idle (5.15) or cpu.shares.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from dataclasses import dataclass, field
from typing import Any, ClassVar

from corun.errors import InputError, RunFault
from corun.share.borders import cgroup_directory, cpu_cgroup
from corun.share.host import Host, why_not
from corun.share.openmp import waiting
from corun.share.policy import Cast, Kind, Member, Policy, no_process_of_its_own
from corun.share.start import Setup

_LIGHTEST = {"cpu.weight": 1, "cpu.shares": 2}


@dataclass
class Cgroup(Policy):
    """weight: cpu.weight of the trainer's group (1 to 10000, the services have 100); 0 = cpu.idle where there is one."""

    weight: int = 0
    passive: bool = True

    name: ClassVar[str] = "cgroup"
    kind: ClassVar[Kind] = "priority"
    summary: ClassVar[str] = "a cgroup for the trainer: cpu.idle or the smallest weight"
    live: ClassVar[bool] = True

    _directory: str = field(default="", init=False, repr=False)
    _home: str = field(default="", init=False, repr=False)
    _done: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 10_000:
            raise InputError(f"weight is {self.weight}; it must be 1 to 10000, or 0 for an idle group")

    def refusals(self, host: Host, cast: Cast) -> list[str]:
        if problems := no_process_of_its_own(cast):
            return problems
        place = find_place(host)
        if place is None:
            return ["no cgroup hierarchy with the cpu controller is mounted"]
        controllers = (host.read(f"{place.parent}/cgroup.subtree_control") or "").split()
        if place.version == 2 and "cpu" not in controllers:
            return [f"the cpu controller is not switched on in /{place.parent}/cgroup.subtree_control"]
        if not host.writable(place.parent):
            return [f"/{place.parent} is not writable: it takes root or a delegated cgroup"]
        return []

    def prepare(self, host: Host, cast: Cast) -> None:
        place = find_place(host)
        if place is None:
            raise RunFault("no cgroup hierarchy with the cpu controller is mounted")
        self._home, self._directory = place.home, f"{place.parent}/corun-train-{os.getpid()}-{secrets.token_hex(2)}"
        try:
            host.make_directory(self._directory)
            self._done = self._lighten(host)
        except OSError as error:
            raise RunFault(f"the trainer's cgroup /{self._directory} cannot be set up: {why_not(error)}") from error

    def _lighten(self, host: Host) -> str:
        idle = f"{self._directory}/cpu.idle"
        if not self.weight and host.exists(idle):
            host.write(idle, "1")
            return "cpu.idle=1"
        for name, lightest in _LIGHTEST.items():
            if host.exists(f"{self._directory}/{name}"):
                value = lightest if not self.weight else _as(name, self.weight)
                host.write(f"{self._directory}/{name}", str(value))
                return f"{name}={value}"
        raise OSError("it has neither cpu.idle nor cpu.weight nor cpu.shares")

    def environment(self, member: Member) -> dict[str, str]:
        return waiting(self.passive) if member.trains else {}

    def setup(self, member: Member) -> Setup:
        return Setup(cgroup=f"/{self._directory}") if member.trains else Setup()

    def attach(self, member: Member, pid: int, host: Host) -> None:
        if member.trains:
            self._move(pid, self._directory, host)

    def detach(self, member: Member, pid: int, host: Host) -> None:
        if member.trains:
            self._move(pid, self._home, host)

    def _move(self, pid: int, directory: str, host: Host) -> None:
        for process in host.descendants_of(pid):
            host.write(f"{directory}/cgroup.procs", str(process))

    def expects(self, host: Host) -> str | None:
        return "priority" if self.weight in range(11) else None

    def in_force(self) -> dict[str, Any]:
        return {"cgroup": f"/{self._directory}", "set": self._done, "passive": self.passive}

    def teardown(self, host: Host) -> None:
        """Remove the group; what still runs in it goes back first."""
        if not self._directory:
            return
        for pid in (host.read(f"{self._directory}/cgroup.procs") or "").split():
            with contextlib.suppress(OSError):
                host.write(f"{self._home}/cgroup.procs", pid)
        with contextlib.suppress(OSError):
            host.remove_directory(self._directory)
        self._directory = ""


@dataclass(frozen=True)
class Place:
    """parent: directory in which the trainer's group is made. home: this process' own group, which services share."""

    parent: str
    home: str
    version: int


def find_place(host: Host) -> Place | None:
    """Where a group for the trainer belongs; None without a cpu controller.

    v2 lets only leaves hold processes, so the new group is a sibling of ours; v1 has no such rule.
    """
    path, version = cpu_cgroup(os.getpid(), host)
    home = cgroup_directory(path, version, host) if version else None
    if home is None:
        return None
    sibling = version == 2 and path not in ("", "/")
    return Place(home.rpartition("/")[0] if sibling else home, home, version)


def _as(name: str, weight: int) -> int:
    """cpu.weight 100 is cpu.shares 1024."""
    return weight if name == "cpu.weight" else max(2, weight * 1024 // 100)
