"""The replicas of one task: started, watched, started again after a pause, replaced one by one, stopped when drained.

    waiting ─▶ starting ─▶ ready ─▶ draining ─▶ gone        waiting: for its back-off
       ▲          │          │
       └──────────┴──────────┘ ended, or did not answer three times in a row: killed

`tick` never waits: whatever takes time (starting a container, asking a replica how it is, stopping it) is a job in a
pool of threads, and the next tick sees what came of it. The pool lives as long as the replicas, whose kernel ties them
to the thread that started them.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Protocol

from corun.errors import CorunError
from corun.tasks import store
from corun.tasks.runtime import Backoff, Handle, ReplicaSpec, Runtime, Usage
from corun.wire import Address

__all__ = ["Patience", "Place", "ReplicaSet", "free_port"]

WAITING, STARTING, READY, DRAINING, GONE = "waiting", "starting", "ready", "draining", "gone"
LEAVING = frozenset({DRAINING, GONE})


UNUSED = Usage(0.0, None)


@dataclass(frozen=True)
class Patience:
    """How long is waited for what. probe_s: between two looks at a replica; misses: looks it may leave unanswered."""

    start_s: float = 120.0
    probe_s: float = 0.5
    answer_s: float = 2.0
    misses: int = 3
    grace_s: float = 10.0


@dataclass(frozen=True)
class Seen:
    """What a look at a replica found."""

    alive: bool
    healthy: bool = False
    ended: str = ""
    usage: Usage | None = None


class Specify(Protocol):
    """Says what the replica at a place is to be, now."""

    def __call__(self, index: int, port: int) -> ReplicaSpec: ...


@dataclass
class Place:
    """One replica and all that came before it at its place; key: its name for the router, new for each start."""

    index: int
    state: str = WAITING
    model: str = ""
    key: str = ""
    handle: Handle | None = None
    backoff: Backoff = field(default_factory=Backoff)
    job: Future[Handle] | Future[Seen] | Future[None] | None = None
    started_s: float = 0.0
    probed_s: float = 0.0
    misses: int = 0
    starts: int = 0
    reason: str = ""
    usage: Usage = field(default_factory=lambda: UNUSED)
    cpu_before_s: float = 0.0

    @property
    def cpu_s(self) -> float:
        """CPU seconds of everything that ran at this place."""
        return self.cpu_before_s + self.usage.cpu_s


class ReplicaSet:
    """All replicas of one task. note: takes the kind of an event and a sentence."""

    def __init__(
        self,
        task_id: str,
        runtime: Runtime,
        specify: Specify,
        pool: Executor,
        note: Callable[[str, str], None],
        patience: Patience | None = None,
    ) -> None:
        self.task_id = task_id
        self.places: dict[int, Place] = {}
        self.wanted = 0
        self.model = ""
        self.retired_cpu_s = 0.0
        self._runtime = runtime
        self._specify = specify
        self._pool = pool
        self._note = note
        self._patience = patience or Patience()

    # What there is

    @property
    def count(self) -> int:
        """Replicas that are or will be there: all but those that leave."""
        return len(self._staying())

    def serving(self) -> dict[str, Address]:
        """Router names and addresses of those that are ready."""
        ready = [place for place in self.places.values() if place.state == READY and place.handle is not None]
        return {place.key: place.handle.address for place in ready if place.handle is not None}

    def draining(self) -> frozenset[str]:
        """Router names of those that may finish."""
        return frozenset(place.key for place in self.places.values() if place.state == DRAINING)

    @property
    def restarts(self) -> int:
        return sum(max(0, place.starts - 1) for place in self.places.values())

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all replicas there ever were."""
        return self.retired_cpu_s + sum(place.cpu_s for place in self.places.values())

    @property
    def rss_mib(self) -> float | None:
        known = [place.usage.rss_mib for place in self.places.values() if place.usage.rss_mib is not None]
        return sum(known) if known else None

    @property
    def gpu_mib(self) -> float | None:
        known = [place.usage.gpu_mib for place in self.places.values() if place.usage.gpu_mib is not None]
        return sum(known) if known else None

    def rows(self) -> list[store.Replica]:
        """As kept in the store."""
        return [
            store.Replica(
                index=place.index,
                model=place.model,
                state=place.state,
                address=str(place.handle.address) if place.handle is not None else "",
                id=_id(place.handle),
                log=str(place.handle.spec.log_path) if place.handle is not None else "",
                restarts=max(0, place.starts - 1),
                started_s=place.started_s,
                reason=place.reason,
                cpu_s=round(place.cpu_s, 3),
                rss_mib=place.usage.rss_mib,
                gpu_mib=place.usage.gpu_mib,
            )
            for place in sorted(self.places.values(), key=lambda place: place.index)
        ]

    # What there should be

    def resize(self, wanted: int, model: str) -> None:
        """From now on `wanted` replicas of `model`; those of another model go once as many new ones are ready."""
        self.wanted, self.model = wanted, model
        current = [place for place in self._staying() if place.model in ("", model)]
        others = [place for place in self._staying() if place not in current]
        for _ in range(wanted - len(current)):
            index = next(number for number in range(len(self.places) + 1) if number not in self.places)
            self.places[index] = Place(index, model=model)
        by_use = sorted(current, key=lambda place: (place.state == READY, -place.index))
        surplus = by_use[: max(0, len(current) - wanted)]
        if sum(place.state == READY for place in current) >= wanted:
            surplus += others
        for place in surplus:
            self._retire(place)

    def _staying(self) -> list[Place]:
        return [place for place in self.places.values() if place.state not in LEAVING]

    def _retire(self, place: Place) -> None:
        """Let it finish; one that never started is simply forgotten."""
        if place.state == WAITING and place.job is None:
            self._forget(place)
            return
        self._note("drain", f"replica {place.index} ({place.model}) takes no more requests")
        place.state = DRAINING

    def _forget(self, place: Place) -> None:
        self.retired_cpu_s += place.cpu_s
        self.places.pop(place.index, None)

    # Steps

    def tick(self, now_s: float, routed: frozenset[str]) -> None:
        """See what came of the jobs and begin the next ones. routed: names the router still has."""
        for place in list(self.places.values()):
            if place.job is not None:
                if not place.job.done():
                    continue
                self._take(place, now_s)
            self._advance(place, now_s, routed)

    def _advance(self, place: Place, now_s: float, routed: frozenset[str]) -> None:
        if place.job is not None:
            return
        if place.state == WAITING and place.backoff.due(now_s):
            self._start(place, now_s)
        elif place.state == DRAINING and place.key not in routed:
            self._stop(place)
        elif place.state in (STARTING, READY) and now_s - place.probed_s >= self._patience.probe_s:
            place.probed_s = now_s
            if place.handle is not None:
                place.job = self._pool.submit(_probe, place.handle, self._patience.answer_s)

    def _start(self, place: Place, now_s: float) -> None:
        place.starts += 1
        place.state, place.model = STARTING, self.model
        place.key = f"{self.task_id}-{place.index}.{place.starts}"
        place.started_s, place.probed_s, place.misses = now_s, now_s, 0
        place.job = self._pool.submit(self._run, place.index)

    def _run(self, index: int) -> Handle:
        return self._runtime.start(self._specify(index, free_port()))

    def _stop(self, place: Place) -> None:
        handle = place.handle
        if handle is None:
            self._forget(place)
            return
        place.state = GONE
        place.job = self._pool.submit(handle.stop, self._patience.grace_s)

    def _take(self, place: Place, now_s: float) -> None:
        """What a finished job found or failed with."""
        job, place.job = place.job, None
        assert job is not None
        error = job.exception()
        if error is not None and not isinstance(error, CorunError):
            raise error
        if place.state == GONE:
            if error is not None:
                self._note("fault", str(error))
            self._forget(place)
        elif error is not None:
            self._ended(place, now_s, str(error))
        else:
            result = job.result()
            if isinstance(result, Seen):
                self._judge(place, result, now_s)
            elif result is not None:
                place.handle = result
                limits = "".join(f"; {name}: {text}" for name, text in result.limits_in_force.items())
                where = f"{place.model} on {result.address}, {result.id}"
                self._note("start", f"replica {place.index} starts: {where}{limits}")

    def _judge(self, place: Place, seen: Seen, now_s: float) -> None:
        place.usage = seen.usage or place.usage
        if place.state == DRAINING:
            return
        if not seen.alive:
            self._ended(place, now_s, seen.ended)
        elif seen.healthy:
            if place.state != READY:
                self._note("ready", f"replica {place.index} is ready after {now_s - place.started_s:.1f} s")
            place.state, place.misses, place.reason = READY, 0, ""
        elif place.state == STARTING:
            if now_s - place.started_s > self._patience.start_s:
                self._ended(place, now_s, f"was not ready within {self._patience.start_s:g} s")
        else:
            place.misses += 1
            if place.misses >= self._patience.misses:
                self._ended(place, now_s, f"did not answer {place.misses} times in a row")

    def _ended(self, place: Place, now_s: float, reason: str) -> None:
        """Its place is taken again after the back-off; what is left of it is removed."""
        place.backoff = place.backoff.ended(now_s, now_s - place.started_s)
        wait_s = place.backoff.due_s - now_s
        self._note("end", f"replica {place.index} {reason}; it is started again in {wait_s:.1f} s")
        place.reason = reason
        place.cpu_before_s, place.usage = place.cpu_s, UNUSED
        handle, place.handle = place.handle, None
        if place.state == DRAINING:
            self._forget(place)
            return
        place.state = WAITING
        if handle is not None:
            self._pool.submit(_bury, handle)

    def stop(self, kill: bool = False) -> list[Future[None]]:
        """End them all; the jobs that do it. One whose start is under way is ended as soon as there is one."""
        jobs = []
        for place in self.places.values():
            jobs.append(self._pool.submit(_end, place, self._patience.grace_s, kill))
        return jobs


def _probe(handle: Handle, timeout_s: float) -> Seen:
    """A look at a replica; an engine that does not answer says nothing about it and counts as a miss."""
    try:
        if not handle.alive():
            return Seen(False, ended=handle.how_it_ended())
        return Seen(True, handle.healthy(timeout_s), usage=handle.usage())
    except CorunError:
        return Seen(True)


def _end(place: Place, grace_s: float, kill: bool) -> None:
    """Wait for what is being done to it, then end it."""
    if place.job is not None:
        with contextlib.suppress(CorunError):
            result = place.job.result()
            if place.handle is None and result is not None and not isinstance(result, Seen):
                place.handle = result
    if place.handle is not None:
        place.handle.kill() if kill else place.handle.stop(grace_s)


def _bury(handle: Handle) -> None:
    with contextlib.suppress(CorunError):
        handle.kill()


def _id(handle: Handle | None) -> str:
    return handle.id if handle is not None else ""


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now; whoever takes it first has it, and a replica that comes too late is started again."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
