"""What runs on each node for the launcher: it starts the same processes with the same command lines, in a directory
of the node, tells how they ended, and hands their files over.

It is a plain class; `corun.launch.ray_cluster` makes an actor of it, so nothing here knows Ray. It does nothing while
a window is measured: the launcher sees a process die by its control connection, and compares clocks over that too.

Three things a Ray worker is given must not reach the processes that are measured, and are put back as the node had
them: its niceness (15), an empty CUDA_VISIBLE_DEVICES, and its share of the out-of-memory killer's attention.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from corun.errors import RunFault
from corun.launch.children import Child, Family
from corun.launch.merge import rings_to_rows
from corun.process import available_cores, clock_id
from corun.registry import home
from corun.run.directory import git_state, hardware, versions
from corun.share.policy import Cast
from corun.share.sharing import Sharing
from corun.tasks.process_runtime import ProcessHandle, ProcessRuntime
from corun.tasks.runtime import ReplicaSpec

ACCELERATORS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
NICENESS = "RAY_worker_niceness"


class NodeAgent:
    """The launcher's hand on one node. Its processes die with the process it lives in."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="corun-node-"))
        self._family = Family(self._directory)
        self._sharing: Sharing | None = None
        self._replicas: dict[str, ProcessHandle] = {}
        self._moved: dict[str, str] = {}

    def facts(self) -> dict[str, Any]:
        """What the launcher has to know of this node before it starts anything here."""
        return {
            "pid": os.getpid(),
            "directory": str(self._directory),
            "python": sys.executable,
            "home": str(home()),
            "cores": available_cores(),
            "cuda": Path("/dev/nvidiactl").exists(),
            "clock": clock_id(),
            "hardware": hardware(),
            "versions": versions(),
            "git": git_state(home()),
        }

    def release(self, python: str, launcher_home: str) -> None:
        """Undo what Ray did to this process; `python` and `launcher_home` are the launcher's, for command lines.

        RunFault when the niceness cannot be had back: everything here would be measured as background work.
        """
        self._moved = {launcher_home: str(home()), python: sys.executable}
        parent = _environment_of(os.getppid())
        for name in ACCELERATORS:
            os.environ.pop(name, None)
            if name in parent:
                os.environ[name] = parent[name]
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(Path(f"/proc/{os.getppid()}/oom_score_adj").read_text())
        _be_as_nice_as(os.getppid())

    def put(self, name: str, data: bytes) -> None:
        """Write a file below this node's directory."""
        path = self._directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    # Processes

    def start(self, role: str, name: str, argv: Sequence[str], environment: Mapping[str, str]) -> int:
        """Start one process; its pid. Paths of the launcher's interpreter and checkout become this node's."""
        return self._family.start(role, name, relocate(argv, self._moved), environment).popen.pid

    def wait(self, pid: int, timeout_s: float) -> int | None:
        """The exit code (negative = signal), or None when it still runs after timeout_s."""
        try:
            return self._child(pid).popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, pid: int, number: int) -> None:
        """A signal to one process; none to one that ended."""
        child = self._child(pid)
        if child.alive:
            os.kill(pid, signal.Signals(number))

    def log_tail(self, pid: int) -> str:
        """The error a process printed, or its last lines."""
        return self._child(pid).log_tail()

    def _child(self, pid: int) -> Child:
        for child in self._family.children:
            if child.popen.pid == pid:
                return child
        raise RunFault(f"no process {pid} was started here")

    # Files

    def write_requests(self, service: str, segment: int) -> None:
        """A client's record ring becomes rows; a killed client's ring does too."""
        rings_to_rows(self._directory / "infer_client", service, segment)

    def listing(self) -> list[tuple[str, int, int]]:
        """(name below the directory, size in bytes, time of change in ns) of every file."""
        found = []
        for path in sorted(self._directory.rglob("*")):
            with suppress(FileNotFoundError):
                if path.is_file():
                    state = path.stat()
                    found.append((str(path.relative_to(self._directory)), state.st_size, state.st_mtime_ns))
        return found

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Up to `size` bytes of a file from `offset` on."""
        with open(self._directory / name, "rb") as file:
            file.seek(offset)
            return file.read(size)

    # Replicas of the control plane

    def start_replica(self, spec: ReplicaSpec) -> tuple[str, dict[str, str]]:
        """Start one on this node, its log in this node's directory; its key, and the limits that are in force."""
        own = replace(spec, log_path=self._directory / "logs" / f"{spec.name}.log")
        handle = ProcessRuntime().start(own)
        self._replicas[handle.id] = handle
        return handle.id, handle.limits_in_force

    def replica(self, key: str, method: str, *arguments: Any) -> Any:
        """Ask a replica's handle: one of the methods of ProcessHandle."""
        return getattr(self._replicas[key], method)(*arguments)

    def end_replica(self, key: str) -> None:
        """Ask a replica to finish, without waiting for it."""
        if self._replicas[key].alive():
            os.kill(int(key), signal.SIGTERM)

    # Sharing

    def share(self, spec: Any, cast: Cast) -> tuple[str, bool]:
        """Prepare the sharing policy on this node; its name. InputError with the reasons when it cannot be had."""
        self._sharing = Sharing.prepare(spec, cast)
        return self._sharing.name, self._sharing.page is not None

    def sharing(self, method: str, *arguments: Any) -> Any:
        """Ask the prepared policy: one of the methods of Sharing."""
        if self._sharing is None:
            raise RunFault("no sharing policy was prepared on this node")
        return getattr(self._sharing, method)(*arguments)

    # The end

    def terminate(self) -> None:
        """SIGTERM to every process, SIGKILL to what is left; policies are taken back. Files stay."""
        self._family.terminate()
        for handle in self._replicas.values():
            handle.kill()
        if self._sharing is not None:
            self._sharing.close()
            self._sharing = None

    def remove(self) -> None:
        """Delete the node's directory: its files are with the launcher."""
        shutil.rmtree(self._directory, ignore_errors=True)


def relocate(argv: Sequence[str], moved: Mapping[str, str]) -> list[str]:
    """A command line with the first matching prefix of each word replaced; longer prefixes are looked at first."""
    prefixes = sorted(moved, key=len, reverse=True)
    return [_relocated(word, prefixes, moved) for word in argv]


def _relocated(word: str, prefixes: Sequence[str], moved: Mapping[str, str]) -> str:
    for prefix in prefixes:
        if word == prefix or word.startswith(prefix.rstrip("/") + "/"):
            return moved[prefix] + word[len(prefix) :]
    return word


def _environment_of(pid: int) -> dict[str, str]:
    """The environment a process was started with; empty where it cannot be read."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _be_as_nice_as(pid: int) -> None:
    wanted, own = os.getpriority(os.PRIO_PROCESS, pid), os.getpriority(os.PRIO_PROCESS, 0)
    if wanted >= own:
        return
    try:
        os.setpriority(os.PRIO_PROCESS, 0, wanted)
    except PermissionError:
        raise RunFault(
            f"Ray gave this node's workers niceness {own}, and what they start would be measured as background work; "
            f"start the node with {NICENESS}=0 in the environment of `ray start`"
        ) from None


__all__ = ["NodeAgent", "relocate"]
