"""Child processes of a run: started with a logged command line, watched by pidfd, never orphaned.

Every child gets its own process group, so the terminal's Ctrl-C reaches only the launcher, which then drains
the others in order. It does not get its own session: under autogroup a new session is a scheduling group of
its own, and `nice` or SCHED_IDLE of the trainer would mean nothing across its border.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from corun.clock import now_ns
from corun.errors import RunFault
from corun.registry import home
from corun.wire.channel import Channel

PYTHON = sys.executable
LOG_TAIL_LINES = 12
TERMINATE_WAIT_S = 5.0
TOGETHER_WAIT_S = 0.5
LONGEST_NAME = 120
LOST = 1000
"""The return code of a process whose machine does not answer any more."""


class Process(Protocol):
    """A process that was started: subprocess.Popen, or one on another machine."""

    pid: int

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; subprocess.TimeoutExpired when it still runs after `timeout` seconds."""

    def terminate(self) -> None:
        """SIGTERM."""

    def kill(self) -> None:
        """SIGKILL."""


@dataclass
class Child:
    """One process: its role, its name, and the channel that controls it once it said HELLO.

    node: the machine it runs on; empty when that is the launcher's.
    """

    role: str
    name: str
    argv: tuple[str, ...]
    log: Path
    popen: Process
    pidfd: int
    channel: Channel | None = None
    hello: dict[str, object] = field(default_factory=dict)
    node: str = ""

    @property
    def label(self) -> str:
        return f"{self.role} {self.name}" + (f" on node {self.node}" if self.node else "")

    @property
    def fd(self) -> int:
        """Readable once the process ended."""
        return self.pidfd

    def closed_fd(self) -> bool:
        """After `fd` became readable: True when the process ended, whose exit code is known from then on."""
        self.popen.wait()
        return True

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def how_it_ended(self) -> str:
        """`exited with 2: error: unknown model ...` or `was killed by SIGKILL`."""
        code = self.popen.returncode
        if code is None:
            return "is running"
        if code == LOST:
            return f"ended with its node: {self.log_tail()}"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        tail = self.log_tail()
        return f"exited with {code}" + (f": {tail}" if tail else "")

    def log_tail(self) -> str:
        """The error it printed, or its last lines."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            return ""
        errors = [index for index, line in enumerate(lines) if line.startswith("error:")]
        return "\n".join(lines[errors[-1] :] if errors else lines[-LOG_TAIL_LINES:])

    def close(self) -> None:
        """Release descriptors; the process must have ended."""
        if self.channel:
            self.channel.close()
        os.close(self.pidfd)


class Part(Child):
    """One role of a process that has several (corun.launch.together): the process, the pid and the log are shared.

    A role can end while the others go on: that shows at its control connection, and why on a line of the log.
    """

    @property
    def fd(self) -> int:
        return self.channel.fileno() if self.channel else self.pidfd

    def closed_fd(self) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(TOGETHER_WAIT_S)
        return True

    @property
    def alive(self) -> bool:
        return super().alive and not self._hung_up()

    def _hung_up(self) -> bool:
        """Whether its control connection was closed by the other end; what waits to be read is left there."""
        if self.channel is None:
            return False
        poller = select.poll()
        try:
            poller.register(self.channel.fileno(), select.POLLIN)
            return bool(poller.poll(0)) and not self.channel.sock.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def how_it_ended(self) -> str:
        """As of a process of its own; `ended: reason` where the process goes on without it."""
        self.closed_fd()
        if self.popen.returncode is None:
            reason = self._said()
            return f"ended: {reason}" if reason else "ended"
        return super().how_it_ended()

    def log_tail(self) -> str:
        """What was said of this role, else as of a process of its own."""
        return self._said() or super().log_tail()

    def _said(self) -> str:
        """The newest error of the log that names this role, with its problems."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        start = "error: trainer " if self.role == "trainer" else f"error: {self.label}: "
        mine = [index for index, line in enumerate(lines) if line.startswith(start)]
        if not mine:
            return ""
        problems = itertools.takewhile(lambda line: line.startswith("  - "), lines[mine[-1] + 1 :])
        return "\n".join([lines[mine[-1]], *problems])


class Family:
    """All children of one run; leaving the context stops whatever still runs."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._watch = directory / "processes.jsonl"
        self.children: list[Child] = []
        self._log(os.getpid(), "launcher", "launcher", sys.argv)

    @property
    def watch_file(self) -> Path:
        """JSON lines {"pid", "role", "name", "t_ns", "argv"}: what the profiler watches."""
        return self._watch

    def start(self, role: str, name: str, argv: Sequence[str], environment: Mapping[str, str]) -> Child:
        """Start one child; its output goes to logs/<role>-<name>.log."""
        popen, log = self._spawn(role, name, argv, environment)
        child = Child(role, name, tuple(argv), log, popen, os.pidfd_open(popen.pid))
        self.children.append(child)
        return child

    def start_together(
        self, parts: Sequence[tuple[str, str]], argv: Sequence[str], environment: Mapping[str, str]
    ) -> list[Child]:
        """Start one process that plays several (role, name); a child for each of them.

        The profiler sees one process: its role is `server+trainer`, its name that of all.
        """
        role = "+".join(dict.fromkeys(role for role, _ in parts))
        name = "+".join(name for _, name in parts)[:LONGEST_NAME]
        popen, log = self._spawn(role, name, argv, environment)
        children: list[Child] = [
            Part(role, name, tuple(argv), log, popen, os.pidfd_open(popen.pid)) for role, name in parts
        ]
        self.children += children
        return children

    def _spawn(
        self, role: str, name: str, argv: Sequence[str], environment: Mapping[str, str]
    ) -> tuple[subprocess.Popen[bytes], Path]:
        log = self._directory / "logs" / f"{role}-{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as output:
            output.write(f"$ {shlex.join(argv)}\n".encode())
            output.flush()
            popen = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=home(),
                env={**os.environ, "PYTHONPATH": str(home() / "src"), "PYTHONUNBUFFERED": "1", **environment},
                process_group=0,
            )
        self._log(popen.pid, role, name, argv)
        return popen, log

    def _log(self, pid: int, role: str, name: str, argv: Sequence[str]) -> None:
        row = {"pid": pid, "role": role, "name": name, "t_ns": now_ns(), "argv": list(argv)}
        self._directory.mkdir(parents=True, exist_ok=True)
        with open(self._watch, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def of(self, *roles: str) -> list[Child]:
        """Living children of these roles, in the order they were started."""
        return [child for child in self.children if child.role in roles and child.alive]

    def dead(self) -> list[Child]:
        """Children that ended."""
        return [child for child in self.children if not child.alive]

    def require_alive(self) -> None:
        """RunFault naming every child that ended when none should have."""
        for child in self.dead():
            child.closed_fd()
        ended: dict[str, list[str]] = {}
        for child in self.dead():
            ended.setdefault(f"{child.popen.pid} {child.how_it_ended()}", []).append(child.label)
        if ended:
            raise RunFault(
                "; ".join(f"{' and '.join(labels)} {how.partition(' ')[2]}" for how, labels in ended.items())
            )

    def __enter__(self) -> Family:
        return self

    def __exit__(self, *exc: object) -> None:
        self.terminate()

    def terminate(self) -> None:
        """SIGTERM to all, then SIGKILL to what is left; waits for every one."""
        for child in self.children:
            if child.popen.poll() is None:
                child.popen.terminate()
        deadline = time.monotonic() + TERMINATE_WAIT_S
        for child in self.children:
            try:
                child.popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.popen.kill()
                child.popen.wait()
            child.close()
        self.children = []


def lanes_of(children: Sequence[Child]) -> dict[str, object]:
    """What a process that has lanes said of them in its HELLO; {} when none has."""
    for child in children:
        info = child.hello.get("info")
        lanes = info.get("lanes") if isinstance(info, dict) else child.hello.get("lanes")
        if isinstance(lanes, dict) and lanes:
            return dict(lanes)
    return {}
