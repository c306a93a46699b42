"""A cgroup for one replica: its share of the cores and its memory, enforced by the kernel where this user may ask.

v1: a child of the own group in each of the cpu and memory hierarchies. v2: a sibling of the own group (a group with
processes cannot have children with controllers), when its parent hands the controllers down. Where none of it may be
written the fall-backs are what a process can do to itself: fewer cores (affinity) and RLIMIT_DATA.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from dataclasses import dataclass, field
from typing import Final

from corun.share.host import Host, why_not
from corun.share.start import Setup
from corun.tasks.runtime import Limits

PERIOD_US: Final = 100_000
PREFIX: Final = "corun-replica"
MOUNT: Final = "sys/fs/cgroup"
REMOVE_TRIES: Final = 20
REMOVE_EVERY_S: Final = 0.05


@dataclass
class Box:
    """The limits of one replica. setups: what its process does to itself, in order. in_force: as sentences."""

    host: Host
    setups: list[Setup] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)
    in_force: dict[str, str] = field(default_factory=dict)
    _memory: str = ""

    def out_of_memory(self) -> bool:
        """Whether the kernel killed something in here for want of memory."""
        for name in ("memory.events", "memory.oom_control"):
            for line in (self.host.read(f"{self._memory}/{name}") or "").splitlines() if self._memory else ():
                key, _, value = line.partition(" ")
                if key == "oom_kill" and value.strip() not in ("", "0"):
                    return True
        return False

    def remove(self) -> None:
        """Remove the groups once their processes have ended; the kernel may need a moment."""
        for directory in self.directories:
            for _ in range(REMOVE_TRIES):
                try:
                    self.host.remove_directory(directory)
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(REMOVE_EVERY_S)
                else:
                    break
        self.directories = []


def box(name: str, limits: Limits, host: Host, owner: int) -> Box:
    """Make the groups for a replica called `name`; what cannot be had is said in `in_force`, never raised.

    owner: pid of the supervisor; groups that a dead one left behind are removed.
    """
    made = Box(host)
    if limits.cpu is not None:
        _limit_cpu(made, name, limits.cpu, owner)
    if limits.memory_mib is not None:
        _limit_memory(made, name, limits, owner)
    return made


def _limit_cpu(made: Box, name: str, cores: float, owner: int) -> None:
    quota = max(round(cores * PERIOD_US), 1000)
    place = _place(made.host, "cpu", owner)
    reason = "no cgroup hierarchy with the cpu controller may be written"
    if place:
        directory, version = place
        files = {"cpu.max": f"{quota} {PERIOD_US}"}
        if version == 1:
            files = {"cpu.cfs_period_us": str(PERIOD_US), "cpu.cfs_quota_us": str(quota)}
        reason = _enter(made, f"{directory}/{_group(name, owner)}", files)
        if not reason:
            made.in_force["cpu"] = f"{cores:g} cores (cgroup v{version})"
            return
    kept = made.host.cores[: max(1, math.ceil(cores))]
    made.setups.append(Setup(cores=kept))
    made.in_force["cpu"] = f"core {', '.join(map(str, kept))} by affinity, not {cores:g} cores: {reason}"


def _limit_memory(made: Box, name: str, limits: Limits, owner: int) -> None:
    mib = limits.memory_mib or 0.0
    place = _place(made.host, "memory", owner)
    reason = "no cgroup hierarchy with the memory controller may be written"
    if place:
        directory, version = place
        file = "memory.max" if version == 2 else "memory.limit_in_bytes"
        directory = f"{directory}/{_group(name, owner)}"
        reason = _enter(made, directory, {file: str(round(mib * (1 << 20)))})
        if not reason:
            made._memory = directory
            made.in_force["memory"] = f"{mib:g} MiB (cgroup v{version})"
            return
    if limits.gpu is not None:
        made.in_force["memory"] = f"none: {reason}, and CUDA does not run under RLIMIT_DATA"
        return
    made.setups.append(Setup(data_limit_mib=round(mib)))
    made.in_force["memory"] = f"{mib:g} MiB of data by RLIMIT_DATA: {reason}"


def _group(name: str, owner: int) -> str:
    return f"{PREFIX}-{owner}-{name}"


def _enter(made: Box, directory: str, files: dict[str, str]) -> str:
    """Make a group with these settings and let the replica enter it; the reason when that is refused."""
    host = made.host
    try:
        with contextlib.suppress(FileExistsError):
            host.make_directory(directory)
        if directory not in made.directories:
            made.directories.append(directory)
            made.setups.append(Setup(cgroup=f"/{directory}"))
        for file, text in files.items():
            host.write(f"{directory}/{file}", text)
    except OSError as error:
        if directory in made.directories:
            made.directories.remove(directory)
            made.setups.remove(Setup(cgroup=f"/{directory}"))
        with contextlib.suppress(OSError):
            host.remove_directory(directory)
        return f"/{directory}: {why_not(error)}"
    return ""


def _place(host: Host, controller: str, owner: int) -> tuple[str, int] | None:
    """The directory in which groups with this controller can be made, and the version of its hierarchy."""
    entries = [line.split(":", 2) for line in (host.read("proc/self/cgroup") or "").splitlines()]
    for _, controllers, path in (entry for entry in entries if len(entry) == 3):
        if controller in controllers.split(","):
            for mount in (f"{MOUNT}/{controller}", f"{MOUNT}/{controllers}"):
                if host.exists(mount):
                    return _swept(host, _own(host, mount, path), owner, 1)
            return None
    for number, _, path in (entry for entry in entries if len(entry) == 3):
        if number == "0":
            parent = _own(host, MOUNT, path.rpartition("/")[0])
            if controller in (host.read(f"{parent}/cgroup.subtree_control") or "").split():
                return _swept(host, parent, owner, 2)
    return None


def _own(host: Host, mount: str, path: str) -> str:
    """A group's directory below a mount; the mount itself where the path is another namespace's."""
    directory = f"{mount}{path}".rstrip("/")
    return directory if host.exists(directory) else mount


def _swept(host: Host, directory: str, owner: int, version: int) -> tuple[str, int] | None:
    if not host.writable(directory):
        return None
    for entry in sorted((host.root / directory).glob(f"{PREFIX}-*-*")):
        maker = entry.name.removeprefix(f"{PREFIX}-").split("-", 1)[0]
        if maker != str(owner) and maker.isdigit() and not os.path.exists(f"/proc/{maker}"):
            with contextlib.suppress(OSError):
                host.remove_directory(f"{directory}/{entry.name}")
    return directory, version
