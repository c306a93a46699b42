"""Brings up every registered task, watches, restarts and scales what serves them, and writes down what happened.

    store ─▶ tasks, choices ─▶ Service per task = router + replicas ─▶ rows, events, state ─▶ store, CSV, logs, reports

One thread looks at everything a few times a second and never waits for anything; starting, probing and stopping happen
in a pool. A killed replica costs its requests one retry, a killed router those that were in it; both are started
again, the router on its old port. When the supervisor itself dies its processes die with it, and containers of an
earlier life are removed by the next one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import psutil

from corun.errors import CorunError, InputError, RunFault
from corun.tasks.choice import Choice
from corun.tasks.monitor import report
from corun.tasks.replicas import Patience
from corun.tasks.routing import Limits
from corun.tasks.runtime import Runtime
from corun.tasks.runtimes import make_runtime
from corun.tasks.service import Pace, Service, Slot
from corun.tasks.store import Store
from corun.tasks.task import Task
from corun.wire import Address

__all__ = ["Supervisor", "UpOptions", "down", "running", "slots"]

NICE_STEP = 5
NICE_MOST = 15
POOL_THREADS = 16
LOOK_AGAIN_S = 2.0
LIVE_S = 1.0
SETTLE_S = 12.0
TICK_S = 0.2
SHORT_TICK_S = 0.02


class StopRequest(Protocol):
    """What asks it to finish: corun.process.StopSignal."""

    requested: bool

    def fileno(self) -> int: ...


@dataclass(frozen=True)
class UpOptions:
    """How tasks are brought up.

    tasks: ids, empty = all that are registered, later ones too. host, port: of the routers; port 0 = any free one,
    else consecutive ones in the order of priority. image, checkout: of containers, see docker_runtime. directory:
    logs, rows and reports; None = one named by date beside the store.
    """

    tasks: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 0
    image: str | None = None
    checkout: bool = False
    directory: Path | None = None
    pace: Pace = field(default_factory=Pace)
    patience: Patience = field(default_factory=Patience)
    limits: Limits = field(default_factory=Limits)


def _print(line: str) -> None:
    print(line, flush=True)


def runtimes_here(store: Store, options: UpOptions) -> Callable[[str], Runtime]:
    """Makes the runtimes of this machine by name; what they start carries the store as its owner."""
    owner = str(store.path.resolve())
    return lambda name: make_runtime(name, options.image, options.checkout, owner=owner)


class Supervisor:
    """Everything that `tasks.py up` keeps alive; `run` is its loop, in the caller's thread.

    runtimes: makes the runtime of that name, once. Raises InputError when a supervisor of this store is running.
    """

    def __init__(
        self,
        store: Store,
        options: UpOptions | None = None,
        say: Callable[[str], None] = _print,
        runtimes: Callable[[str], Runtime] | None = None,
    ) -> None:
        self.store = store
        self.options = options or UpOptions()
        self.services: dict[str, Service] = {}
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        self.directory = self.options.directory or store.path.with_suffix("") / stamp
        self._say = say
        self._make = runtimes or runtimes_here(store, self.options)
        self._runtimes: dict[str, Runtime] = {}
        self._leaving: list[Service] = []
        self._told: set[str] = set()
        self._next_port = self.options.port

    # The loop

    def run(self, stop: StopRequest) -> None:
        """Until `stop`; then everything is drained, stopped and reported. An exception kills it all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._claimed(), _sockets() as sockets:
            pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="replica")
            try:
                self._watch(stop, pool, sockets)
                self._finish()
            finally:
                self._end(kill=True)
                pool.shutdown()
                self._close_runtimes()
                self._write_live(up=False)

    def _close_runtimes(self) -> None:
        """Of those that hold something: a connection to an engine, agents on other nodes."""
        for runtime in self._runtimes.values():
            close = getattr(runtime, "close", None)
            if close:
                close()

    def _watch(self, stop: StopRequest, pool: ThreadPoolExecutor, sockets: Path) -> None:
        again_s = live_s = 0.0
        while not stop.requested:
            now_s = time.monotonic()
            if now_s >= again_s:
                self._look_again(pool, sockets, first=not again_s)
                again_s = now_s + LOOK_AGAIN_S
            for service in self.services.values():
                service.tick(now_s)
            self._bid_farewell(now_s)
            if now_s >= live_s:
                live_s = now_s + LIVE_S
                self._write_live(up=True)
            busy = any(service.figures is None for service in self.services.values())
            select.select([stop.fileno()], [], [], SHORT_TICK_S if busy else TICK_S)

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """This store's only supervisor meanwhile."""
        other = running(self.store)
        if other is not None:
            raise InputError(f"tasks of {self.store.path} are up already, by pid {other}; `tasks.py down` ends that")
        own = {"pid": os.getpid(), "began_s": psutil.Process().create_time(), "directory": str(self.directory)}
        self.store.set_state("supervisor", own)
        try:
            yield
        finally:
            self.store.set_state("supervisor", None)

    # Which tasks

    def _look_again(self, pool: ThreadPoolExecutor, sockets: Path, first: bool) -> None:
        """Follow the store; what goes wrong the first time ends it, later it is said and tried again."""
        try:
            self._refresh(pool, sockets)
        except CorunError as error:
            if first:
                raise
            if str(error) not in self._told:
                self._told.add(str(error))
                self._say(f"{error}; what is up goes on")

    def _refresh(self, pool: ThreadPoolExecutor, sockets: Path) -> None:
        """Bring up what is new, change what was changed, let go of what was removed."""
        options = self.options
        tasks = [task for task in self.store.all() if not options.tasks or task.id in options.tasks]
        places = slots(tasks)
        for task in tasks:
            choice = self._choice(task)
            service = self.services.get(task.id)
            if service is not None and service.task.runtime != task.runtime:
                self._leaving.append(self.services.pop(task.id))
                continue
            if choice is None or any(one.task.id == task.id for one in self._leaving):
                continue
            if service is None:
                self.services[task.id] = self._bring_up(task, choice, places[task.id], pool, sockets)
            elif (task, choice.model, choice.max_batch) != (
                service.task,
                service.choice.model,
                service.choice.max_batch,
            ):
                service.choose(task, choice)
        for id in self.services.keys() - {task.id for task in tasks}:
            self._leaving.append(self.services.pop(id))

    def _choice(self, task: Task) -> Choice | None:
        """What was chosen for it; the only model it allows needs no choice."""
        choice = self.store.choice(task.id)
        if choice is None and len(task.models) == 1:
            return Choice(task.models[0], why="the only model allowed", replicas=max(task.min_replicas, 1))
        if choice is not None and choice.model:
            return choice
        if task.id not in self._told:
            self._told.add(task.id)
            why = choice.why if choice is not None else "none was chosen yet"
            self.store.add_event(task.id, "no model", why)
            self._say(f"{task.id}: no model: {why}; run `tasks.py plan`")
        return None

    def _bring_up(self, task: Task, choice: Choice, slot: Slot, pool: ThreadPoolExecutor, sockets: Path) -> Service:
        port, self._next_port = self._next_port, self._next_port + bool(self._next_port)
        options = self.options
        service = Service(
            task=task,
            choice=choice,
            slot=slot,
            runtime=self._runtime(task.runtime),
            store=self.store,
            pool=pool,
            directory=self.directory,
            sockets=sockets,
            listen=Address("tcp", options.host, port),
            pace=options.pace,
            patience=options.patience,
            say=self._say,
            limits=options.limits,
        )
        service.note("up", f"{choice.model}: {choice.why}")
        return service

    def _runtime(self, name: str) -> Runtime:
        if name not in self._runtimes:
            runtime = self._make(name)
            sweep = getattr(runtime, "sweep", None)
            if sweep is not None and (left := sweep()):
                self._say(f"removed {left} containers of an earlier run")
            self._runtimes[name] = runtime
        return self._runtimes[name]

    def _bid_farewell(self, now_s: float) -> None:
        """A task that was removed ends once it has answered everything."""
        for service in list(self._leaving):
            service.finish()
            if service.settled(now_s):
                self._leaving.remove(service)
                service.close(now_s)
                self._report(service)
                service.front.terminate()
                wait(service.replicas.stop(), SETTLE_S)
                service.front.kill()

    # The end

    def _finish(self) -> None:
        """Turn new requests away, answer what is open, stop everything, write the reports."""
        services = [*self.services.values(), *self._leaving]
        self._say(f"finishing {len(services)} tasks")
        for service in services:
            service.finish()
        by_s = time.monotonic() + SETTLE_S
        while time.monotonic() < by_s and sum(not service.settled(time.monotonic()) for service in services):
            time.sleep(SHORT_TICK_S)
        for service in self.services.values():
            service.close(time.monotonic())
            self._report(service)
        self._end(kill=False)

    def _end(self, kill: bool) -> None:
        services = [*self.services.values(), *self._leaving]
        for service in services:
            service.front.kill() if kill else service.front.terminate()
        jobs = [job for service in services for job in service.replicas.stop(kill)]
        grace_s = self.options.patience.grace_s
        wait(jobs, 2 * grace_s + SETTLE_S)
        for service in services:
            service.front.kill()
            for row in self._rows_of(service.task.id):
                self.store.remove_replica(service.task.id, row)
        self.services.clear()
        self._leaving.clear()

    def _rows_of(self, task_id: str) -> Sequence[int]:
        return [replica.index for replica in self.store.replicas(task_id)]

    def _report(self, service: Service) -> None:
        summary = service.summary()
        events = [one for one in self.store.events(service.task.id, 1000) if one.t_s >= service.up_since_s]
        text = json.dumps({**summary, "events": [one.__dict__ for one in events]}, indent=1)
        (self.directory / f"{service.task.id}.json").write_text(text, encoding="utf-8")
        page = self.directory / f"{service.task.id}.md"
        page.write_text(report(summary, events), encoding="utf-8")
        self._say(f"{service.task.id}: report in {page}")

    def _write_live(self, up: bool) -> None:
        live: dict[str, Any] = {
            "t_s": time.time(),
            "up": up,
            "directory": str(self.directory),
            "pid": os.getpid(),
            "tasks": [service.live() for service in self.services.values()],
        }
        if not up and (last := self.store.state("live")):
            live["tasks"] = []
            live["t_s"] = last["t_s"]
        with contextlib.suppress(RunFault):
            self.store.set_state("live", live)


def slots(tasks: Sequence[Task]) -> dict[str, Slot]:
    """What each task's replicas get: the tasks of the highest priority the normal niceness, each lower one 5 more.

    Processes only; containers share the processor by the engine's own weights.
    """
    ranks = sorted({task.priority for task in tasks}, reverse=True)
    return {task.id: Slot(nice=min(NICE_STEP * ranks.index(task.priority), NICE_MOST)) for task in tasks}


@contextmanager
def _sockets() -> Iterator[Path]:
    """A short path for control sockets that only this user may use."""
    path = Path(tempfile.mkdtemp(prefix="corun-tasks-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def running(store: Store) -> int | None:
    """Pid of the supervisor of this store, None when none runs."""
    state = store.state("supervisor")
    if not state:
        return None
    try:
        process = psutil.Process(int(state["pid"]))
        same = abs(process.create_time() - float(state["began_s"])) < 1.0
        return process.pid if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def down(store: Store, timeout_s: float = 60.0) -> bool:
    """Ask the supervisor of this store to finish and wait for it; False when none runs.

    Raises RunFault when it takes longer than timeout_s.
    """
    pid = running(store)
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    by_s = time.monotonic() + timeout_s
    while running(store) is not None:
        if time.monotonic() > by_s:
            raise RunFault(f"the supervisor (pid {pid}) is still finishing after {timeout_s:g} s")
        time.sleep(0.1)
    return True
