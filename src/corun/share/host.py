"""What a policy may ask of the machine, and do to it: /proc, /sys, scheduler calls, short commands.

Everything goes through one object, so that policies are tested against a fake machine (`corun.testing.host`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

IDLE_CLASS = os.SCHED_IDLE
NORMAL_CLASS = os.SCHED_OTHER
COMMAND_TIMEOUT_S = 10.0


class Host:
    """This machine. Methods raise OSError as the kernel does; a process that is gone raises ProcessLookupError."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    # Files

    def read(self, path: str) -> str | None:
        """A small file's text, stripped; None when it cannot be read."""
        try:
            return (self.root / path.lstrip("/")).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None

    def write(self, path: str, text: str) -> None:
        """One write to a file that exists (a /proc or cgroup file)."""
        fd = os.open(self.root / path.lstrip("/"), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def exists(self, path: str) -> bool:
        return (self.root / path.lstrip("/")).exists()

    def writable(self, path: str) -> bool:
        return os.access(self.root / path.lstrip("/"), os.W_OK)

    def make_directory(self, path: str) -> None:
        (self.root / path.lstrip("/")).mkdir()

    def remove_directory(self, path: str) -> None:
        (self.root / path.lstrip("/")).rmdir()

    # Processes

    def threads_of(self, pid: int) -> list[int]:
        """Ids of a process' threads; ProcessLookupError when it is gone."""
        try:
            return sorted(int(name) for name in os.listdir(self.root / "proc" / str(pid) / "task"))
        except FileNotFoundError:
            raise ProcessLookupError(f"process {pid} is gone") from None

    def descendants_of(self, pid: int) -> list[int]:
        """The process and all its living children (loader workers too), parents first."""
        family = [pid]
        for parent in family:
            for tid in self.threads_of(parent) if parent == pid else self._threads_if_there(parent):
                children = self.read(f"proc/{parent}/task/{tid}/children")
                family += [int(child) for child in (children or "").split()]
        return family

    def _threads_if_there(self, pid: int) -> list[int]:
        try:
            return self.threads_of(pid)
        except ProcessLookupError:
            return []

    def all_threads_of(self, pid: int) -> list[int]:
        """Ids of all threads of a process and its descendants."""
        self.threads_of(pid)
        return [tid for member in self.descendants_of(pid) for tid in self._threads_if_there(member)]

    def set_class(self, tid: int, scheduling_class: int) -> None:
        os.sched_setscheduler(tid, scheduling_class, os.sched_param(0))

    def class_of(self, tid: int) -> int:
        return os.sched_getscheduler(tid)

    def set_nice(self, tid: int, nice: int) -> None:
        os.setpriority(os.PRIO_PROCESS, tid, nice)

    def nice_of(self, tid: int) -> int:
        return os.getpriority(os.PRIO_PROCESS, tid)

    def set_cores(self, tid: int, cores: Sequence[int]) -> None:
        os.sched_setaffinity(tid, cores)

    def cores_of(self, tid: int) -> tuple[int, ...]:
        return tuple(sorted(os.sched_getaffinity(tid)))

    @property
    def cores(self) -> tuple[int, ...]:
        """Cores this process may use."""
        return self.cores_of(0)

    @property
    def uid(self) -> int:
        return os.getuid()

    # Commands

    def which(self, program: str) -> str | None:
        return shutil.which(program)

    def command(self, argv: Sequence[str], environment: Mapping[str, str] | None = None, stdin: str = "") -> str:
        """Output of a short command; OSError with its error text when it fails or is missing."""
        try:
            done = subprocess.run(
                list(argv),
                env={**os.environ, **(environment or {})},
                input=stdin,
                capture_output=True,
                text=True,
                timeout=COMMAND_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise OSError(f"{argv[0]} did not end within {COMMAND_TIMEOUT_S:.0f} s") from None
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise OSError(f"{argv[0]} ended with {done.returncode}" + (f": {said[-1]}" if said else ""))
        return done.stdout

    # The GPU

    @property
    def driver_version(self) -> tuple[int, ...] | None:
        """Version of the NVIDIA kernel driver, e.g. (580, 95, 5); None without one."""
        text = self.read("proc/driver/nvidia/version")
        found = re.search(r"\b(\d{3,}(?:\.\d+)+)\b", text or "")
        return tuple(int(part) for part in found[1].split(".")) if found else None

    def gpu_list(self) -> str:
        """What `nvidia-smi -L` prints; OSError where there is none."""
        return self.command(["nvidia-smi", "-L"])


def why_not(error: OSError) -> str:
    """The kernel's reason as the end of a sentence."""
    return error.strerror or str(error)
