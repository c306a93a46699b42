"""Replicas as child processes: each in its own process group, limited by cgroups where this user may set them.

A replica ends with the process that started it (PR_SET_PDEATHSIG), so a supervisor that is killed leaves none behind.
The kernel ties that to the *thread* that forked: start replicas from one that lives as long as they shall.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from corun.errors import RunFault
from corun.registry import home
from corun.share.host import Host
from corun.share.start import Setup
from corun.tasks.cgroups import Box, box
from corun.tasks.machine import cpu_and_memory, family_of, gpu_mib_of
from corun.tasks.runtime import ReplicaSpec, Usage, answers, last_words, server_command, tail_of
from corun.wire.sockets import Address

KILL_WAIT_S: Final = 10.0
LOG_TAIL_BYTES: Final = 256 << 10


class ProcessRuntime:
    """Starts replicas on this host. host: the machine, a fake one in tests."""

    name = "process"

    def __init__(self, host: Host | None = None) -> None:
        self._host = host or Host()

    def start(self, spec: ReplicaSpec) -> ProcessHandle:
        """Start one and return at once; RunFault when the kernel or the log's disk refuses."""
        argv, environment = server_command(spec, parent_pid=os.getpid())
        limits = box(spec.name, spec.limits, self._host, os.getpid())
        if spec.nice:
            limits.setups.append(Setup(nice=spec.nice))
        for setup in reversed(limits.setups):
            argv = setup.command(argv)
        offset = 0
        try:
            spec.log_path.parent.mkdir(parents=True, exist_ok=True)
            with open(spec.log_path, "ab") as output:
                offset = output.tell()
                output.write(f"$ {shlex.join(argv)}\n".encode())
                output.flush()
                popen = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=home(),
                    env={**os.environ, "PYTHONPATH": str(home() / "src"), **environment},
                    process_group=0,
                )
        except OSError as error:
            limits.remove()
            raise RunFault(f"cannot start {spec.name}: {error.strerror or error} ({error.filename})") from error
        return ProcessHandle(spec, popen, limits, offset)


class ProcessHandle:
    """A replica that is, or was, a child process."""

    def __init__(self, spec: ReplicaSpec, popen: subprocess.Popen[bytes], limits: Box, log_offset: int) -> None:
        self.spec = spec
        self._popen = popen
        self._limits = limits
        self._log_offset = log_offset
        self._last = Usage(0.0, 0.0)

    @property
    def address(self) -> Address:
        return self.spec.address

    @property
    def id(self) -> str:
        return str(self._popen.pid)

    @property
    def pid(self) -> int | None:
        return self._popen.pid

    @property
    def limits_in_force(self) -> dict[str, str]:
        return self._limits.in_force

    def alive(self) -> bool:
        return self._popen.poll() is None

    def healthy(self, timeout_s: float = 2.0) -> bool:
        if not self.alive():
            return False
        body = answers(self.address, timeout_s)
        return body is not None and body.get("pid") == self._popen.pid and bool(body.get("model"))

    def logs(self, tail: int = 50) -> str:
        return tail_of(read_tail(self.spec.log_path), tail)

    def how_it_ended(self) -> str:
        code = self._popen.poll()
        if code is None:
            return "is running"
        if code < 0:
            memory = self._limits.in_force.get("memory", "")
            why = f": it needed more than its {memory}" if self._limits.out_of_memory() else ""
            return f"was killed by {signal.Signals(-code).name}{why}"
        words = last_words(read_tail(self.spec.log_path, self._log_offset))
        return f"exited with {code}" + (f": {words}" if words else "")

    def stop(self, grace_s: float = 10.0) -> None:
        if self.alive():
            self._signal(signal.SIGTERM, only_parent=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(grace_s)
        self.kill()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        try:
            self._popen.wait(KILL_WAIT_S)
        except subprocess.TimeoutExpired:
            raise RunFault(f"{self.spec.name} (pid {self._popen.pid}) does not end, even by SIGKILL") from None
        self._limits.remove()

    def usage(self) -> Usage:
        if not self.alive():
            return Usage(self._last.cpu_s, 0.0)
        cpu_s, rss_mib = cpu_and_memory(self._popen.pid)
        pids: Sequence[int] = [process.pid for process in family_of(self._popen.pid)]
        self._last = Usage(cpu_s, rss_mib, gpu_mib_of(pids))
        return self._last

    def _signal(self, number: signal.Signals, only_parent: bool = False) -> None:
        """To the replica's process group, as long as one of its processes may be there."""
        with contextlib.suppress(ProcessLookupError):
            if only_parent:
                self._popen.send_signal(number)
            else:
                os.killpg(self._popen.pid, number)


def read_tail(path: Path, offset: int = 0) -> str:
    """The end of a log, at most LOG_TAIL_BYTES and nothing before `offset`; "" when there is none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(offset, size - LOG_TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
