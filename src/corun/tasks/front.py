"""The router of one task as a child process: started, asked, and started again on the same port when it dies."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from corun.clock import NS_PER_S
from corun.errors import PeerClosed, RunFault
from corun.registry import home
from corun.tasks.commands import RouterControl, RouterFigures
from corun.tasks.process_runtime import read_tail
from corun.tasks.routing import Limits
from corun.tasks.runtime import Backoff, last_words
from corun.wire import Address

__all__ = ["Front", "steps"]


@dataclass(frozen=True)
class Step:
    """One command that brings a router's table closer to what it should be: add, drain or remove."""

    do: str
    name: str


def steps(serving: Mapping[str, Address], draining: frozenset[str], figures: RouterFigures) -> list[Step]:
    """What to tell a router. Pure; told again after a restart, it says everything anew.

    serving: replicas that are to get requests. draining: those that may finish; any other one is gone.
    """
    there = {one.name: one.state for one in figures.replicas}
    wanted = [Step("add", name) for name in serving if name not in there]
    for name, state in there.items():
        if name in draining and state != "draining":
            wanted.append(Step("drain", name))
        elif name not in draining and name not in serving:
            wanted.append(Step("remove", name))
    return wanted


class Front:
    """One router process; `look` is called again and again by its supervisor.

    address: where clients connect; a port of 0 becomes the one that the kernel chose, and stays.
    """

    def __init__(self, task_id: str, listen: Address, directory: Path, log: Path, limits: Limits) -> None:
        self.task_id = task_id
        self.address = listen
        self.log = log
        self.restarts = 0
        self._limits = limits
        self._control_address = Address("unix", str(directory / f"{task_id}.sock"))
        self._control = RouterControl(self._control_address)
        self._popen: subprocess.Popen[bytes] | None = None
        self._backoff = Backoff(first_s=0.1, most_s=5.0)
        self._started_s = 0.0
        self._offset = 0

    @property
    def pid(self) -> int | None:
        return self._popen.pid if self._popen is not None else None

    def start(self, now_s: float) -> None:
        """Start it; RunFault when the kernel refuses."""
        argv = [sys.executable, "-m", "corun.tasks.router", "--listen", str(self.address), "--name", self.task_id]
        argv += ["--control", str(self._control_address), "--parent", str(os.getpid())]
        argv += ["--limit", str(self._limits.requests), "--window", str(self._limits.window)]
        argv += [
            "--answer-s",
            f"{self._limits.answer_ns / NS_PER_S:g}",
            "--hold-s",
            f"{self._limits.hold_ns / NS_PER_S:g}",
        ]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as output:
            self._offset = output.tell()
            output.write(f"$ {shlex.join(argv)}\n".encode())
            output.flush()
            try:
                self._popen = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "PYTHONPATH": str(home() / "src"), "PYTHONUNBUFFERED": "1"},
                    process_group=0,
                )
            except OSError as error:
                raise RunFault(f"cannot start the router of {self.task_id}: {error.strerror or error}") from error
        self._started_s = now_s

    def look(self, now_s: float, since: int) -> tuple[RouterFigures | None, str]:
        """Its figures, None while it does not answer; and what happened, "" = nothing. A dead router is started again."""
        event = ""
        if self._popen is None or self._popen.poll() is not None:
            if self._popen is not None:
                event = f"the router {self._how_it_ended()}; it is started again on {self.address}"
                self._backoff = self._backoff.ended(now_s, now_s - self._started_s)
                self._popen = None
                self._control.close()
                self.restarts += 1
            if self._backoff.due(now_s):
                self.start(now_s)
            return None, event
        return self.figures(since), event

    def figures(self, since: int) -> RouterFigures | None:
        """Its figures, None when it does not answer."""
        if self._popen is None or not Path(self._control_address.host).is_socket():
            return None
        try:
            figures = self._control.stats(since)
        except (PeerClosed, RunFault):
            return None
        if figures.pid != self._popen.pid:
            return None
        self.address = Address.parse(figures.address)
        return figures

    def tell(self, step: Step, serving: Mapping[str, Address]) -> None:
        """Pass one command on; a router that refuses or is gone is looked at again next time."""
        with contextlib.suppress(PeerClosed, RunFault):
            match step.do:
                case "add":
                    self._control.add(step.name, serving[step.name])
                case "drain":
                    self._control.drain(step.name)
                case _:
                    self._control.remove(step.name)

    def finish(self) -> None:
        """Have it turn new requests away; what is open it still answers."""
        with contextlib.suppress(PeerClosed, RunFault):
            self._control.finish()

    def terminate(self) -> None:
        """Ask it to end once everything is answered."""
        if self._popen is not None and self._popen.poll() is None:
            self._popen.terminate()

    def ended(self) -> bool:
        return self._popen is None or self._popen.poll() is not None

    def kill(self) -> None:
        """End it now and wait until it is gone."""
        self._control.close()
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait()

    def _how_it_ended(self) -> str:
        code = self._popen.returncode if self._popen is not None else 0
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"exited with {code}: {last_words(read_tail(self.log, self._offset))}"
