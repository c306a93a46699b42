"""Scheduling-group borders: where `nice` and SCHED_IDLE of the trainer silently mean nothing to the service.

The kernel divides the CPU between groups first and between the tasks of a group second. Two processes in different
groups therefore share half and half, whatever their nice values or scheduling classes are::

    same autogroup            service ████████████████████ trainer     (SCHED_IDLE: 1.00 / 0.00)
    trainer in a new session  service ██████████│██████████ trainer    (each group its half: 0.50 / 0.50)

A group is a cgroup of the cpu controller or, for tasks of its root, the autogroup of the session. An autogroup border
is crossed by making the trainer's whole autogroup nice; a cgroup border by making its cgroup idle or light.
Source: sched(7), section "The autogroup feature"; Documentation/scheduler/sched-design-CFS.rst.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Literal

from corun.share.host import Host, why_not

AUTOGROUP_ENABLED = "proc/sys/kernel/sched_autogroup_enabled"
LIGHTEST_NICE = 19
_TRIES = 3
_BETWEEN_TRIES_S = 0.15


@dataclass(frozen=True)
class Group:
    """Where a process stands: its cgroup of the cpu controller, and its autogroup if that counts."""

    cgroup: str
    autogroup: str | None


@dataclass(frozen=True)
class Border:
    """A border between a service and the trainer. crossed: what was done about it, or None."""

    kind: Literal["autogroup", "cgroup"]
    detail: str
    crossed: str | None = None
    why_not: str | None = None

    def sentence(self) -> str:
        """For the console and the manifest."""
        end = f"crossed: {self.crossed}" if self.crossed else f"NOT crossed: {self.why_not}"
        return f"{self.kind} border, {self.detail}; {end}"


def cpu_cgroup(pid: int, host: Host) -> tuple[str, int]:
    """(path of the process' cgroup in the hierarchy of the cpu controller, 1 or 2 for the version).

    ("", 0) where the kernel says nothing.
    """
    lines = (host.read(f"proc/{pid}/cgroup") or "").splitlines()
    entries = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    for _, controllers, path in entries:
        if "cpu" in controllers.split(","):
            return path, 1
    for number, _, path in entries:
        if number == "0":
            return path, 2
    return "", 0


def group_of(pid: int, host: Host) -> Group:
    """The scheduling group of a process; an autogroup counts only in the root cgroup."""
    cgroup, _ = cpu_cgroup(pid, host)
    autogroup = None
    if cgroup in ("", "/") and host.read(AUTOGROUP_ENABLED) == "1":
        text = host.read(f"proc/{pid}/autogroup")
        autogroup = text.split()[0] if text else None
    return Group(cgroup, autogroup)


def border_between(service: int, trainer: int, host: Host) -> Border | None:
    """The border between two processes, if there is one."""
    ours, theirs = group_of(service, host), group_of(trainer, host)
    if ours.cgroup != theirs.cgroup:
        return Border("cgroup", f"service in {ours.cgroup}, trainer in {theirs.cgroup}")
    if ours.autogroup != theirs.autogroup:
        return Border("autogroup", f"service in {ours.autogroup}, trainer in {theirs.autogroup}")
    return None


def cross(border: Border, trainer: int, host: Host) -> Border:
    """Make the trainer's side of the border the light one, where this process may."""
    if border.kind == "autogroup":
        return _cross_autogroup(border, trainer, host)
    return _cross_cgroup(border, trainer, host)


def autogroup_nice(pid: int, host: Host) -> int | None:
    """The nice value of a process' autogroup, None where it has none."""
    found = re.search(r"nice (-?\d+)", host.read(f"proc/{pid}/autogroup") or "")
    return int(found[1]) if found else None


def set_autogroup_nice(pid: int, nice: int, host: Host) -> None:
    """Write an autogroup's nice value; the kernel allows an unprivileged user ten writes a second."""
    for attempt in range(_TRIES):
        try:
            host.write(f"proc/{pid}/autogroup", str(nice))
        except BlockingIOError:
            if attempt == _TRIES - 1:
                raise
            time.sleep(_BETWEEN_TRIES_S)
        else:
            return


def _cross_autogroup(border: Border, trainer: int, host: Host) -> Border:
    try:
        set_autogroup_nice(trainer, LIGHTEST_NICE, host)
    except OSError as error:
        return Border(border.kind, border.detail, None, f"its autogroup cannot be made nice: {why_not(error)}")
    return Border(border.kind, border.detail, f"nice {LIGHTEST_NICE} for the trainer's autogroup")


def cgroup_directory(path: str, version: int, host: Host) -> str | None:
    """Where a cgroup of the cpu controller is mounted, e.g. /sys/fs/cgroup/cpu/name; None if nowhere."""
    mounts = ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct") if version == 1 else ("sys/fs/cgroup",)
    for mount in mounts:
        if host.exists(mount):
            return f"{mount}{path}".rstrip("/")
    return None


def lighten_cgroup(directory: str, host: Host) -> str:
    """Give a cgroup what is left over: cpu.idle where the kernel has it, else the smallest weight.

    Returns what was done; OSError when nothing could be.
    """
    problem: OSError | None = None
    for name, value in (("cpu.idle", "1"), ("cpu.weight", "1"), ("cpu.shares", "2")):
        if host.exists(f"{directory}/{name}"):
            try:
                host.write(f"{directory}/{name}", value)
            except OSError as error:
                problem = error
            else:
                return f"{name}={value}"
    raise problem or OSError(f"{directory} has no cpu.idle, cpu.weight or cpu.shares")


def _cross_cgroup(border: Border, trainer: int, host: Host) -> Border:
    path, version = cpu_cgroup(trainer, host)
    directory = cgroup_directory(path, version, host)
    members = set((host.read(f"{directory}/cgroup.procs") or "").split()) if directory else set()
    others = members - {str(pid) for pid in host.descendants_of(trainer)}
    if directory is None or not members:
        return Border(border.kind, border.detail, None, f"the trainer's cgroup {path} is not visible from here")
    if others:
        return Border(border.kind, border.detail, None, f"{len(others)} other processes share the trainer's cgroup")
    try:
        done = lighten_cgroup(directory, host)
    except OSError as error:
        return Border(border.kind, border.detail, None, f"{path} cannot be made light: {why_not(error)}")
    return Border(border.kind, border.detail, f"{done} on {path}")
