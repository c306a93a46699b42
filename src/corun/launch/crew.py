"""Where the processes of a run live and how the launcher holds them: on this machine, or on the nodes of a cluster.

    Place      what a command line has to name: the directory, the control address, the parent, the address to listen on
    Crew       starts processes in places, knows them, brings their rows; `LocalCrew` here, `RayCrew` in ray_crew
    Shared     the sharing policy where it is in force, on the machine of trainer and services

An experiment is written against these three and does not know which machine it measures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from corun.launch.children import Child, Family
from corun.launch.control import ControlSocket
from corun.launch.live import NEVER_NS
from corun.launch.merge import rings_to_rows
from corun.process import available_cores
from corun.run.config import Pair
from corun.run.directory import RunDirectory
from corun.share.policy import Cast, Member
from corun.share.selftest import Shares
from corun.share.sharing import Sharing
from corun.wire.sockets import Address

Fault = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """One process' surroundings. host: what a server there listens on, and its clients connect to."""

    node: str
    out: Path
    control: Address
    parent_pid: int
    host: str


class Shared(Protocol):
    """A prepared sharing policy: the part of corun.share.sharing.Sharing an experiment uses."""

    cast: Cast

    @property
    def name(self) -> str: ...

    def threads(self, member: Member) -> int: ...

    def environment(self, member: Member) -> dict[str, str]: ...

    def command(self, member: Member, argv: Sequence[str]) -> list[str]: ...

    def flags(self, member: Member) -> list[str]: ...

    @property
    def lanes(self) -> dict[str, Any]: ...

    def heard(self, lanes: Mapping[str, Any]) -> list[str]: ...

    def started(self, pids: Mapping[Member, int]) -> list[str]: ...

    def enter(self, arm: str) -> None: ...

    def self_test(self) -> Shares | None: ...

    def describe(self) -> dict[str, Any]: ...


class Crew(Protocol):
    """The processes of one run; leaving the context stops all of them and keeps what they wrote."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    @property
    def children(self) -> Sequence[Child]: ...

    def place(self, role: str, index: int = 0) -> Place:
        """Where the index-th process of a role runs."""

    def profiled(self) -> Sequence[tuple[str, Place]]:
        """Name and place of every profiler."""

    def cores(self, role: str) -> int:
        """Cores of the machine the first process of a role runs on."""

    def has_cuda(self, role: str) -> bool:
        """True when the machine of the first process of a role has a CUDA driver."""

    def share(self, spec: Any, cast: Cast) -> Shared:
        """Prepare the sharing policy where it will act; InputError with reasons when it cannot be had there."""

    def deliver(self, place: Place, path: Path) -> Path:
        """Bring a file of the run directory to a place; its path there."""

    def start(self, place: Place, role: str, name: str, argv: Sequence[str], environment: Mapping[str, str]) -> Child:
        """Start one process."""

    def start_together(
        self, place: Place, parts: Sequence[tuple[str, str]], argv: Sequence[str], environment: Mapping[str, str]
    ) -> list[Child]:
        """Start one process that plays several (role, name); a child for each."""

    def wait_for(self, children: Sequence[Child], timeout_s: float) -> None:
        """Until each said HELLO; RunFault when one dies first or time runs out."""

    def of(self, *roles: str) -> list[Child]:
        """Living children of these roles, in the order they were started."""

    def require_alive(self) -> None:
        """RunFault naming every child that ended when none should have."""

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the machines; nothing when there is only this one."""

    # Windows

    def to_child(self, child: Child, t_ns: int) -> int:
        """An instant of the launcher's clock on a child's."""

    def compare_clocks(self, when: str) -> None:
        """Compare this machine's clock with that of every other one."""

    @property
    def next_ns(self) -> int:
        """When `tick` wants to be called during a window."""

    def tick(self) -> None:
        """What is to be done during a window, as little as possible."""

    def write_requests(self, service: str, segment: int) -> None:
        """The rows of one client and window, from its record ring."""

    def collect(self) -> None:
        """Bring what was written elsewhere into the run directory."""

    @property
    def shows_live(self) -> bool:
        """True when a running window's files can be read in the run directory."""


class LocalCrew:
    """All processes on this machine, writing into the run directory themselves."""

    shows_live = True
    next_ns = NEVER_NS

    def __init__(self, pair: Pair, run: RunDirectory) -> None:
        self._host = pair.config.host
        self._run = run
        self._stack = ExitStack()
        self._control = self._stack.enter_context(ControlSocket())
        self._family = Family(run.path)

    @property
    def children(self) -> list[Child]:
        return self._family.children

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._stack:
            self._family.terminate()

    def place(self, role: str, index: int = 0) -> Place:
        return Place("", self._run.path, self._control.address, os.getpid(), self._host)

    def profiled(self) -> Sequence[tuple[str, Place]]:
        return [("profiler", self.place("profiler"))]

    def cores(self, role: str) -> int:
        return available_cores()

    def has_cuda(self, role: str) -> bool:
        return Path("/dev/nvidiactl").exists()

    def share(self, spec: Any, cast: Cast) -> Shared:
        return self._stack.enter_context(Sharing.prepare(spec, cast))

    def deliver(self, place: Place, path: Path) -> Path:
        return path

    def start(self, place: Place, role: str, name: str, argv: Sequence[str], environment: Mapping[str, str]) -> Child:
        return self._family.start(role, name, argv, environment)

    def start_together(
        self, place: Place, parts: Sequence[tuple[str, str]], argv: Sequence[str], environment: Mapping[str, str]
    ) -> list[Child]:
        return self._family.start_together(parts, argv, environment)

    def wait_for(self, children: Sequence[Child], timeout_s: float) -> None:
        self._control.wait_for(list(children), self._family, timeout_s)

    def of(self, *roles: str) -> list[Child]:
        return self._family.of(*roles)

    def require_alive(self) -> None:
        self._family.require_alive()

    def describe(self) -> dict[str, Any]:
        return {}

    def to_child(self, child: Child, t_ns: int) -> int:
        return t_ns

    def compare_clocks(self, when: str) -> None:
        """One machine has one clock."""

    def tick(self) -> None:
        """Nothing to do."""

    def write_requests(self, service: str, segment: int) -> None:
        rings_to_rows(self._run.file("infer_client"), service, segment)

    def collect(self) -> None:
        """Everything is here."""


def make_crew(pair: Pair, run: RunDirectory, fault: Fault) -> Crew:
    """The crew `launch` asks for. `fault` is told what goes wrong with a machine while the run goes on.

    Raises InputError when the cluster or the placement cannot be had.
    """
    if pair.config.launch.local:
        return LocalCrew(pair, run)
    from corun.launch.ray_crew import RayCrew

    return RayCrew(pair, run, fault)


__all__ = ["Crew", "LocalCrew", "Place", "Shared", "make_crew"]
