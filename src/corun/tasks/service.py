"""One task while it is up: its router, its replicas, what is counted, and how many replicas it should have."""

from __future__ import annotations

import contextlib
import time
from array import array
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from corun.clock import NS_PER_S
from corun.errors import InputError, RunFault
from corun.run.config import Slo
from corun.run.records import Column
from corun.run.table import TableWriter
from corun.stats import percentile_of
from corun.tasks.choice import Choice
from corun.tasks.commands import RouterFigures
from corun.tasks.demand import Demand
from corun.tasks.front import Front, steps
from corun.tasks.replicas import Patience, ReplicaSet
from corun.tasks.routing import Limits
from corun.tasks.runtime import ReplicaSpec, Runtime
from corun.tasks.scaling import Observation, ScalingRule, decide
from corun.tasks.statistics import Statistics
from corun.tasks.store import Store
from corun.tasks.task import RANDOM, Task
from corun.wire import Address, Status

__all__ = ["HISTORY", "Pace", "Service", "Slot"]

OK = int(Status.OK)
KEPT_LATENCIES = 1_000_000
MS_PER_S = 1000.0
GENERATES = "generation"
LEAST_WINDOW = 8
HOLD_IDLE_NS = 60 * NS_PER_S

HISTORY: tuple[Column, ...] = (
    Column("t_s", "s", "float", "Unix time of the row"),
    Column("received", "", "int", "requests in this span"),
    Column("ok", "", "int", "answered OK in this span"),
    Column("errors", "", "int", "answered otherwise in this span"),
    Column("rate", "1/s", "float", "arrivals in this span"),
    Column("forecast", "1/s", "float", "arrivals expected while a replica would start"),
    Column("p50_ms", "ms", "float", "median in the router, last request byte to reply"),
    Column("p99_ms", "ms", "float", "99th percentile, empty below 662 answers in this span"),
    Column("max_ms", "ms", "float", "longest"),
    Column("late", "", "int", "of the OK answers, later than the task's tightest bound"),
    Column("replicas", "", "int", "ready"),
    Column("wanted", "", "int", "asked for by the scaler"),
    Column("waiting", "", "int", "requests no replica had taken at the end"),
    Column("outstanding", "", "int", "requests at replicas at the end"),
    Column("cpu_s", "s", "float", "CPU time of its replicas in this span"),
    Column("rss_mib", "MiB", "float", "resident memory of its replicas"),
)


@dataclass(frozen=True)
class Pace:
    """How often is looked and how patient the scaler is, in seconds.

    record_s: one row and one record in the store. rate_s: span of the arrival rate. ahead_s: what a replica needs to
    start: how far the load is forecast. target, low: see ScalingRule.
    """

    look_s: float = 0.5
    record_s: float = 2.0
    rate_s: float = 3.0
    ahead_s: float = 6.0
    up_after_s: float = 1.5
    down_after_s: float = 30.0
    target: float = 0.7
    low: float = 0.5

    def rule(self, least: int, most: int) -> ScalingRule:
        """The scaler's rule for a task."""
        return ScalingRule(
            least, most, self.target, self.low, self.up_after_s, max(self.down_after_s, self.up_after_s)
        )


@dataclass(frozen=True)
class Slot:
    """What a task's replicas get of the machine, by its place in the order of priorities: see `Supervisor`."""

    nice: int = 0
    threads: int = 1


@dataclass
class Counted:
    """Running totals of one router's life, to take differences from."""

    pid: int = 0
    received: int = 0
    answered: dict[int, int] = field(default_factory=dict)
    next_latency: int = 0
    busy: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class Span:
    """What happened since the last record."""

    began_s: float
    received: int = 0
    answered: dict[int, int] = field(default_factory=dict)
    latencies_us: list[int] = field(default_factory=list)

    @property
    def errors(self) -> int:
        return sum(count for status, count in self.answered.items() if status != OK)


class Service:
    """A task that is up; `tick` is called several times a second and never waits."""

    def __init__(
        self,
        task: Task,
        choice: Choice,
        slot: Slot,
        runtime: Runtime,
        store: Store,
        pool: Executor,
        directory: Path,
        sockets: Path,
        listen: Address,
        pace: Pace,
        patience: Patience,
        say: Callable[[str], None],
        limits: Limits | None = None,
    ) -> None:
        self.task, self.choice, self.slot = task, choice, slot
        self.directory = directory
        self.up_since_s = time.time()
        self.received = self.lost_routers = 0
        self.answered: dict[int, int] = {}
        self.latencies_us = array("Q")
        self.late = 0
        self.most_replicas = 0
        self.figures: RouterFigures | None = None
        self.demand = Demand(pace.record_s, max(1, round(pace.ahead_s / pace.record_s)))
        self._store, self._pace, self._say = store, pace, say
        self._log = directory / f"{task.id}.log"
        routed = router_limits(limits or Limits(), task, choice)
        self.front = Front(task.id, listen, sockets, directory / f"{task.id}-router.log", routed)
        self.replicas = ReplicaSet(task.id, runtime, self._specify, pool, self.note, patience)
        self.replicas.resize(max(task.min_replicas, min(choice.replicas, task.max_replicas)), self.model)
        self._rows = TableWriter(directory / f"{task.id}.csv", HISTORY)
        self._counted = Counted()
        self._span = Span(time.monotonic())
        self._arrivals: deque[tuple[float, int]] = deque()
        self._work: deque[tuple[float, int, int]] = deque()
        self._recent: deque[tuple[float, int]] = deque(maxlen=2048)
        self._looks: deque[Observation] = deque()
        self._next_look_s = 0.0
        self._cpu_before_s = 0.0
        counts = [window.statistics for window in store.windows(task.id, 720)]
        self.demand.remember(
            one.requests + one.errors for one in counts if abs(one.span_s - pace.record_s) < 0.5 * pace.record_s
        )

    @property
    def model(self) -> str:
        return self.choice.model or ""

    def choose(self, task: Task, choice: Choice) -> None:
        """Another model, or other bounds, from now on; replicas are replaced without a gap."""
        before, self.task, self.choice = self.model, task, choice
        if self.model != before:
            self.note("roll", f"from {before} to {self.model}")
        self.replicas.resize(min(max(self.replicas.wanted, task.min_replicas), task.max_replicas), self.model)

    def _specify(self, index: int, port: int) -> ReplicaSpec:
        task = self.task
        return ReplicaSpec(
            task_id=task.id,
            index=index,
            model=self.model,
            weights=None if task.weights == RANDOM else task.weights,
            port=port,
            log_path=self.directory / f"{task.id}-{index}.log",
            threads=self.slot.threads,
            nice=self.slot.nice,
            device="cuda" if task.resource == "gpu" else "cpu",
            max_batch=self.choice.max_batch,
            limits=task.limits,
        )

    def note(self, kind: str, detail: str) -> None:
        """An event: in the store, in the task's log, and for whoever watches; a full disk does not end the task."""
        with contextlib.suppress(RunFault):
            self._store.add_event(self.task.id, kind, detail)
        with contextlib.suppress(OSError), open(self._log, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {kind:8} {detail}\n")
        self._say(f"{self.task.id}: {kind}: {detail}")

    # Steps

    def tick(self, now_s: float) -> None:
        """One look at everything, and what follows from it. now_s: monotonic."""
        figures, event = self.front.look(now_s, self._counted.next_latency)
        if event:
            self.lost_routers += 1
            self.note("router", event)
        self.figures = figures
        serving = self.replicas.serving()
        self.most_replicas = max(self.most_replicas, len(serving))
        if figures is not None:
            self._count(figures, now_s)
            for step in steps(serving, self.replicas.draining(), figures):
                self.front.tell(step, serving)
        routed = frozenset(one.name for one in figures.replicas) if figures is not None else frozenset[str]()
        self.replicas.tick(now_s, routed)
        if figures is not None and now_s >= self._next_look_s:
            self._next_look_s = now_s + self._pace.look_s
            self._scale(figures, now_s)
        if now_s - self._span.began_s >= self._pace.record_s:
            self.record(now_s)

    def _count(self, figures: RouterFigures, now_s: float) -> None:
        """Add what the router counted since the last look; a new router counts from zero, from the next look on."""
        if self._counted.pid != figures.pid:
            self._counted = Counted(figures.pid)
            return
        before, span = self._counted, self._span
        received = figures.received - before.received
        span.received += received
        self.received += received
        for status, count in figures.answered.items():
            new = count - before.answered.get(status, 0)
            span.answered[status] = span.answered.get(status, 0) + new
            self.answered[status] = self.answered.get(status, 0) + new
        latencies = figures.latencies_us
        span.latencies_us += latencies
        self._recent.extend((now_s, latency) for latency in latencies)
        if len(self.latencies_us) < KEPT_LATENCIES:
            self.latencies_us.extend(latencies)
        bound_us = self.bound_us
        self.late += sum(latency > bound_us for latency in latencies) if bound_us else 0
        busy = {one.name: (one.busy_ns, one.answered) for one in figures.replicas}
        worked = [(now - old[0], n - old[1]) for name, (now, n) in busy.items() if (old := before.busy.get(name))]
        self._work.append((now_s, sum(ns for ns, _ in worked), sum(n for _, n in worked)))
        self._arrivals.append((now_s, received))
        self._counted = Counted(figures.pid, figures.received, figures.answered, figures.next_latency, busy)

    # The end

    def finish(self) -> None:
        """New requests are turned away from now on."""
        self.front.finish()

    def settled(self, now_s: float) -> bool:
        """Whether everything that was open is answered; counts what has been."""
        self.figures = self.front.figures(self._counted.next_latency)
        if self.figures is not None:
            self._count(self.figures, now_s)
        return self.figures is None or self.figures.outstanding + self.figures.waiting == 0

    def close(self, now_s: float) -> None:
        """The last row; nothing more is counted."""
        self.record(now_s)
        self._rows.close()

    def summary(self) -> dict[str, Any]:
        """The whole life of the task since it was brought up, as JSON values; latencies in ms, in the router."""
        taken_ms = [latency / MS_PER_S for latency in self.latencies_us]
        ok = self.answered.get(OK, 0)
        percentiles = {f"p{at}_ms": percentile_of(taken_ms, at) if taken_ms else None for at in (50, 90, 99)}
        return {
            "task": self.task.id,
            "description": self.task.description,
            "model": self.model,
            "why": self.choice.why,
            "runtime": self.task.runtime,
            "priority": self.task.priority,
            "slo": slo_words(self.task.slo),
            "address": str(self.front.address),
            "up_s": round(time.time() - self.up_since_s, 1),
            "received": self.received,
            "answered": {status_name(status): count for status, count in sorted(self.answered.items()) if count},
            "errors": sum(self.answered.values()) - ok,
            "unanswered": self.received - sum(self.answered.values()),
            "late": self.late if self.bound_us else None,
            "late_pct": round(100 * self.late / len(taken_ms), 3) if self.bound_us and taken_ms else None,
            **percentiles,
            "max_ms": max(taken_ms, default=None),
            "cpu_s": round(self.replicas.cpu_s, 2),
            "cpu_ms_per_request": round(1000 * self.replicas.cpu_s / ok, 3) if ok else None,
            "most_replicas": self.most_replicas,
            "replica_restarts": self.replicas.restarts,
            "router_restarts": self.front.restarts,
        }

    # Figures

    @property
    def bound_us(self) -> int | None:
        """The tightest promised bound in µs, None without one."""
        bounds = self.task.slo.bounds
        return round(1000 * min(bounds.values())) if bounds else None

    def _scale(self, figures: RouterFigures, now_s: float) -> None:
        rule = self._pace.rule(self.task.min_replicas, self.task.max_replicas)
        self._looks.append(self._observe(figures, now_s))
        while len(self._looks) > 1 and self._looks[1].now_s < now_s - rule.down_after_s:
            self._looks.popleft()
        decision = decide(rule, self._looks)
        if decision.why and decision.replicas != self.replicas.count:
            self.note("scale", f"from {self.replicas.count} to {decision.replicas} replicas: {decision.why}")
        self.replicas.resize(decision.replicas, self.model)

    def _observe(self, figures: RouterFigures, now_s: float) -> Observation:
        rate_s = self._pace.rate_s
        _forget(self._arrivals, now_s - rate_s)
        _forget(self._work, now_s - 10.0)
        _forget(self._recent, now_s - 10.0)
        busy_ns, answers = (sum(item[place] for item in self._work) for place in (1, 2))
        forecast, bound_us = self.demand.forecast(), self.bound_us
        late = sum(latency > bound_us for _, latency in self._recent) if bound_us else 0
        return Observation(
            now_s=now_s,
            rate=sum(count for _, count in self._arrivals) / rate_s,
            replicas=self.replicas.count,
            service_s=busy_ns / answers / NS_PER_S if answers else self._last_service_s(),
            forecast=forecast.rate if forecast else None,
            waiting=figures.waiting,
            late_share=late / len(self._recent) if self._recent else 0.0,
        )

    def _last_service_s(self) -> float | None:
        return self._looks[-1].service_s if self._looks else None

    def record(self, now_s: float) -> None:
        """One row, one record in the store, the state of the replicas."""
        span, self._span = self._span, Span(now_s)
        took_s = now_s - span.began_s
        cpu_s = self.replicas.cpu_s
        spent_s, self._cpu_before_s = max(0.0, cpu_s - self._cpu_before_s), cpu_s
        latencies_ms = [latency / MS_PER_S for latency in span.latencies_us]
        self.demand.observe(span.received)
        statistics = Statistics.of(
            latencies_ms,
            errors=span.errors,
            span_s=took_s,
            cpu_s=spent_s,
            rss_mib=self.replicas.rss_mib,
            gpu_mib=self.replicas.gpu_mib,
        )
        row = self._row(span, latencies_ms, took_s, spent_s)
        with contextlib.suppress(InputError, RunFault):  # it was just removed from the store, or the disk is full
            self._rows.row(row)
            self._store.record(self.task.id, statistics)
            self._keep_replicas()

    def _row(self, span: Span, latencies_ms: list[float], took_s: float, cpu_s: float) -> dict[str, Any]:
        forecast, bound_us, figures = self.demand.forecast(), self.bound_us, self.figures
        return {
            "t_s": round(time.time(), 3),
            "received": span.received,
            "ok": span.answered.get(OK, 0),
            "errors": span.errors,
            "rate": round(span.received / took_s, 3),
            "forecast": round(forecast.rate, 3) if forecast else None,
            "p50_ms": percentile_of(latencies_ms, 50) if latencies_ms else None,
            "p99_ms": percentile_of(latencies_ms, 99) if latencies_ms else None,
            "max_ms": max(latencies_ms, default=None),
            "late": sum(latency > bound_us for latency in span.latencies_us) if bound_us else None,
            "replicas": len(self.replicas.serving()),
            "wanted": self.replicas.wanted,
            "waiting": figures.waiting if figures else None,
            "outstanding": figures.outstanding if figures else None,
            "cpu_s": round(cpu_s, 3),
            "rss_mib": self.replicas.rss_mib,
        }

    def _keep_replicas(self) -> None:
        rows = self.replicas.rows()
        for row in rows:
            self._store.set_replica(self.task.id, row)
        for old in self._store.replicas(self.task.id):
            if old.index not in {row.index for row in rows}:
                self._store.remove_replica(self.task.id, old.index)

    def live(self) -> dict[str, Any]:
        """Its state for status and the web page, as JSON values."""
        look, forecast, figures = (self._looks[-1] if self._looks else None), self.demand.forecast(), self.figures
        recent_ms = [latency / MS_PER_S for _, latency in self._recent]
        return {
            "id": self.task.id,
            "description": self.task.description,
            "kind": self.task.kind,
            "priority": self.task.priority,
            "runtime": self.task.runtime,
            "address": str(self.front.address),
            "model": self.model,
            "slo": slo_words(self.task.slo),
            "bound_ms": self.bound_us / MS_PER_S if self.bound_us else None,
            "rate": look.rate if look else None,
            "forecast": {"rate": forecast.rate, "method": forecast.method} if forecast else None,
            "service_ms": look.service_s * MS_PER_S if look and look.service_s is not None else None,
            "p50_ms": percentile_of(recent_ms, 50) if recent_ms else None,
            "p99_ms": percentile_of(recent_ms, 99) if recent_ms else None,
            "max_ms": max(recent_ms, default=None),
            "late_share": look.late_share if look else None,
            "received": self.received,
            "answered": {status_name(status): count for status, count in sorted(self.answered.items()) if count},
            "waiting": figures.waiting if figures else None,
            "outstanding": figures.outstanding if figures else None,
            "router": {"pid": self.front.pid, "up": figures is not None, "restarts": self.front.restarts},
            "wanted": self.replicas.wanted,
            "least": self.task.min_replicas,
            "most": self.task.max_replicas,
            "replicas": [asdict(row) for row in self.replicas.rows()],
        }


def router_limits(limits: Limits, task: Task, choice: Choice) -> Limits:
    """What the router of a task holds.

    A replica gets as much at a time as keeps it busy, a few batches: what waits in the router can still go to a
    replica that joins, and is not lost with one that dies. Models that generate text batch by themselves and get all.
    A task that may have no replica at all holds its requests until one has started.
    """
    window = limits.window if task.kind == GENERATES else min(limits.window, max(LEAST_WINDOW, 4 * choice.max_batch))
    hold_ns = max(limits.hold_ns, HOLD_IDLE_NS) if task.min_replicas == 0 else limits.hold_ns
    return replace(limits, window=window, hold_ns=hold_ns)


def status_name(status: int) -> str:
    """`ok`, `rejected`, or the number of one that is not known."""
    known = {int(one): one.name.lower() for one in Status}
    return known.get(status, str(status))


def slo_words(slo: Slo) -> str:
    """`p99 <= 100 ms`."""
    return " and ".join(f"{name.removesuffix('_ms')} <= {bound:g} ms" for name, bound in slo.bounds.items())


def _forget(items: deque[Any], before_s: float) -> None:
    """Drop what is older; each item begins with its instant."""
    while items and items[0][0] < before_s:
        items.popleft()
