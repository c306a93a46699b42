"""A sharing policy: one small protocol, one file per policy in `corun.share.policies`, and how they compose.

    requires    refusals(host, cast)             [] or the reasons why not: a right, a driver, a feature
    start       environment, setup, threads      what a process is given before it exists
    run         attach, detach                   what is done to a running one
    page        rule()                           what the cooperative part asks of the trainer's gate
    end         teardown                         everything is put back

`idle+slo` is two policies; two of one kind (nice and idle, throttle and slo) contradict each other and are refused.
A policy that cannot be had here is refused with its reasons, never replaced by another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from corun.share.brakes import Mode
from corun.share.host import Host
from corun.share.start import Setup

Kind = Literal["base", "priority", "cores", "memory", "gpu", "stops", "duty", "forecast"]

FINEST = 8
SERVER = "server"
TRAINER = "trainer"


@dataclass(frozen=True)
class Member:
    """One process of a run; index counts the services, threads are those it was configured with."""

    role: str
    name: str = ""
    threads: int = 1
    index: int = 0

    @property
    def trains(self) -> bool:
        return self.role == TRAINER

    @property
    def serves(self) -> bool:
        return self.role == SERVER

    @property
    def label(self) -> str:
        return f"{self.role} {self.name}".strip()


@dataclass(frozen=True)
class Cast:
    """Who shares the machine. one_process: trainer and service are threads of one process.

    devices: the devices they run on, e.g. {"cpu"} or {"cuda:0"}.
    """

    services: tuple[Member, ...] = ()
    trainer: Member | None = None
    devices: frozenset[str] = frozenset({"cpu"})
    one_process: bool = False

    @property
    def members(self) -> tuple[Member, ...]:
        return (*self.services, *([self.trainer] if self.trainer else []))

    @property
    def on_gpu(self) -> bool:
        return any(device.startswith("cuda") for device in self.devices)


@dataclass(frozen=True)
class Rule:
    """What a cooperative policy asks of the gate while training beside services: mode bits, options, knobs."""

    mode: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    micro: int = 1
    duty: float = 1.0
    layers: bool = False


def finest(rule: Rule, preempts: bool) -> int:
    """Parts a step may be cut into at most; where nobody said (`micro_max` 0), as many as shorten a request's wait.

    preempts: the device takes what runs off for a request, as a CPU's kernel does. Finer steps then buy nothing,
    unless the trainer looks for requests between them (Mode.PREEMPT).
    """
    asked = int(rule.options.get("micro_max", 1))
    useful = not preempts or bool(rule.mode & Mode.PREEMPT)
    return max(rule.micro, asked or (FINEST if useful else 1))


def least_threads(cast: Cast) -> int:
    """Threads that the trainer may be cut down to for the services' sake; 0 = its threads are left alone.

    A core that is given up is a core a request finds free. Not on a GPU, where the threads of the trainer do not compute,
    and not inside one process, whose math libraries keep one number of threads for both sides.
    """
    return 0 if cast.on_gpu or cast.one_process else 1


class Policy:
    """Does nothing; each policy overrides what it is about. Its dataclass fields are its options."""

    name: ClassVar[str]
    kind: ClassVar[Kind]
    summary: ClassVar[str]
    live: ClassVar[bool] = False
    """attach and detach work on running processes"""
    one_process: ClassVar[bool] = False
    """acts only where trainer and services are threads of one process; asking for it asks for that too"""

    def refusals(self, host: Host, cast: Cast) -> list[str]:
        """Why it cannot be had here; empty when it can."""
        return []

    def prepare(self, host: Host, cast: Cast) -> None:
        """Make what the processes will need (a cgroup, a daemon); OSError or RunFault when it cannot be made."""

    def threads(self, member: Member, host: Host) -> int | None:
        """The threads a process must have under this policy; None = as configured."""
        return None

    def environment(self, member: Member) -> dict[str, str]:
        """Variables for a process that is about to start."""
        return {}

    def setup(self, member: Member) -> Setup:
        """What is set before a process starts."""
        return Setup()

    def attach(self, member: Member, pid: int, host: Host) -> None:
        """Apply it to a running process and all its threads; OSError as the kernel says."""

    def detach(self, member: Member, pid: int, host: Host) -> None:
        """Undo attach."""

    def rule(self) -> Rule | None:
        """What it asks of the trainer's gate."""
        return None

    def trainer_flags(self) -> list[str]:
        """Flags of `python -m corun.train` that it needs."""
        return []

    def lanes(self) -> dict[str, Any]:
        """The streams it asks for inside one process, as corun.share.in_process.make_lanes takes them; {} = none."""
        return {}

    def expects(self, host: Host) -> str | None:
        """What two spinners on one core must show under it: "priority", or None when it is not about the CPU."""
        return None

    def in_force(self) -> dict[str, Any]:
        """What was really set up, beyond what /proc says of the processes."""
        return {}

    def teardown(self, host: Host) -> None:
        """Put everything back; must not raise for what is gone already."""


def no_process_of_its_own(cast: Cast) -> list[str]:
    """Why a policy that acts on the trainer's process cannot be had, as refusals."""
    if cast.one_process:
        return ["the trainer is no process of its own: with one_process it is a thread beside the services"]
    return [] if cast.trainer else ["the trainer is no process of its own: nobody trains"]


def not_together(cast: Cast) -> list[str]:
    """Why a policy that acts inside one process cannot be had, as refusals."""
    if not cast.one_process:
        return ["trainer and service are separate processes, and it acts inside one"]
    if cast.trainer is None or not cast.services:
        return ["it takes a trainer and a service that share the process"]
    return []


def no_gpu(cast: Cast, host: Host) -> list[str]:
    """Why there is no GPU to share, as refusals."""
    problems = []
    if not cast.on_gpu:
        problems.append(f"the services and the trainer run on {', '.join(sorted(cast.devices))}, not on a GPU")
    if host.driver_version is None:
        problems.append("there is no NVIDIA driver on this machine (/proc/driver/nvidia/version)")
    return problems
