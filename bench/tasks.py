"""What the control plane costs and keeps: router overhead, requests lost, tails while things change, regret of the choice.

    overhead   round trip through a router minus the same to its replica directly: hot, all on one core, interleaved
    steady     two replicas (null, 10 ms) under Poisson load
    kill       the same while one of the two is killed
    scaling    one replica, a load for three, then the old load again: 1 -> 3 -> 1 replicas
    regret     the model chosen from short profiles against every candidate measured for longer at the task's rate

lost counts requests of steady, kill and scaling that got no reply at all; refusals and errors are in the details. p99 is
of the sojourn: from the intended send instant, whole phase, its upheaval included.

    value(m) = quality(m) x share of requests answered within the bound      regret = 1 - value(chosen) / best value

The best is sought among the candidates that keep the promise in the long measurement; a chosen one that breaks it
counts by its share in time, one that keeps it counts in full. Networks have random weights, which are as fast as any;
their quality is the documented one of the released weights.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from bench.common import last_line, store
from bench.wire import RING_SLOTS, FarEnd, _environment, far_end, our_exchange, pinned, round_trips_us
from corun.clock import NS_PER_S
from corun.load.ring import Metadata, RingWriter
from corun.process import StopSignal
from corun.stats import percentile_of
from corun.tasks import task as tasks
from corun.tasks.choice import Candidate, choose
from corun.tasks.machine import capacity
from corun.tasks.profile import Point
from corun.tasks.profiles import Settings, measure
from corun.tasks.quality import QualityTable
from corun.tasks.service import Pace
from corun.tasks.store import Store
from corun.tasks.supervisor import Supervisor, UpOptions
from corun.testing.drive import Drive, Outcomes, poisson_dues_ns
from corun.wire import Address, connect

SIZES = {"1k": 1024, "150k": 153_600}
TASK = "bench"
MODEL = "null:service_ms=10"
PACE = Pace(look_s=0.25, record_s=1.0, rate_s=1.0, ahead_s=2.0, up_after_s=0.5, down_after_s=6.0)
CANDIDATES = ("mobilenet_v3_small", "resnet18", "regnet_y_400mf", "resnet50")
SLO = "p90<=200"
RATE = 10.0
SEED = 7


@dataclass(frozen=True)
class Plan:
    """Seconds of everything. models: candidates of the choice. rates: of their profiles.

    profile_s, truth_s: windows of profile and measurement, long enough for a p90 (64 requests).
    """

    rounds: int = 9
    round_s: float = 0.3
    steady_s: float = 20.0
    kill_s: float = 15.0
    low_s: float = 5.0
    high_s: float = 15.0
    after_s: float = 16.0
    models: tuple[str, ...] = CANDIDATES
    rates: tuple[float, ...] = (RATE, 2 * RATE)
    profile_s: float = 8.0
    truth_s: float = 12.0


QUICK = Plan(5, 0.15, 11.0, 11.0, 3.0, 8.0, 12.0, CANDIDATES[1:3], (RATE,), 8.0, 9.0)


# Overhead


@contextmanager
def routed(end: FarEnd) -> Iterator[FarEnd]:
    """A router in front of one server."""
    argv = [sys.executable, "-m", "corun.tasks.router", "--listen", "127.0.0.1:0", "--replica", str(end.address)]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=_environment())
    assert child.stdout is not None
    try:
        line = child.stdout.readline()
        yield FarEnd(Address.parse(line.split(" routes on ")[1].split(",")[0]), child.pid)
    finally:
        child.terminate()
        child.wait()


def overhead_us(plan: Plan, size: int) -> tuple[float, list[tuple[float, float]]]:
    """Median over rounds of routed minus direct p50 in µs, and both of every round."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="corun-bench-")))
        ring = RingWriter(folder / "record.ring", RING_SLOTS, Metadata())
        server = stack.enter_context(far_end("handoff", size, False, folder))
        router = stack.enter_context(routed(server))
        direct, through = (our_exchange(connect(end.address), size, ring) for end in (server, router))
        stack.enter_context(pinned(os.getpid(), server.pid, router.pid))
        rounds = [
            (
                statistics.median(round_trips_us(direct, plan.round_s)),
                statistics.median(round_trips_us(through, plan.round_s)),
            )
            for _ in range(plan.rounds)
        ]
    return statistics.median(there - alone for alone, there in rounds), rounds


# Steady, kill, scaling


@dataclass
class Up:
    """One task, up; `course` is how many replicas were ready over time."""

    supervisor: Supervisor
    course: list[tuple[float, int]] = field(default_factory=list)

    @property
    def address(self) -> Address:
        return self.supervisor.services[TASK].front.address

    def ready(self) -> int:
        service = self.supervisor.services.get(TASK)
        if service is None or service.figures is None:
            return 0
        return sum(one.state == "ready" for one in service.figures.replicas)

    def wait(self, replicas: int, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.ready() != replicas:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.ready()} replicas are ready, not {replicas}")
            time.sleep(0.02)

    def kill_one(self) -> None:
        """SIGKILL to the newest replica."""
        rows = [row for row in self.supervisor.services[TASK].replicas.rows() if row.state == "ready"]
        os.kill(int(rows[-1].id), signal.SIGKILL)

    def visited(self) -> list[int]:
        """Numbers of ready replicas in the order they were seen, repetitions left out."""
        numbers = [number for _, number in self.course]
        return [a for place, a in enumerate(numbers) if place == 0 or numbers[place - 1] != a]

    def note(self, done: threading.Event) -> None:
        while not done.wait(0.1):
            self.course.append((time.monotonic(), self.ready()))


@contextmanager
def brought_up(least: int, most: int) -> Iterator[Up]:
    """The task with `least` to `most` replicas, in a supervisor of its own."""
    with tempfile.TemporaryDirectory(prefix="corun-bench-") as folder, ExitStack() as stack:
        registry = stack.enter_context(Store(Path(folder) / "tasks.sqlite"))
        registry.add(
            tasks.make(id=TASK, kind="null", models=[MODEL], slo="p99<=200", min_replicas=least, max_replicas=most)
        )
        supervisor = Supervisor(registry, UpOptions(pace=PACE), say=lambda line: print(f"  {line}", flush=True))
        stop, done = StopSignal(), threading.Event()
        up = Up(supervisor)
        threads = [
            threading.Thread(target=supervisor.run, args=(stop,)),
            threading.Thread(target=up.note, args=(done,), daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            up.wait(least)
            yield up
        finally:
            done.set()
            stop.request()
            threads[0].join()


def driven(up: Up, dues_ns: NDArray[np.int64], meanwhile: Callable[[], None] = lambda: None) -> Outcomes:
    """The load, with something happening during it."""
    with Drive(up.address, dues_ns, (bytes(1024),)) as drive:
        meanwhile()
    return drive.outcomes()


def steady_and_kill(plan: Plan, rate: float = 65.0) -> dict[str, Outcomes]:
    """Two replicas, undisturbed and disturbed."""

    def meanwhile() -> None:
        time.sleep(plan.kill_s / 3)
        up.kill_one()

    with brought_up(2, 2) as up:
        steady = driven(up, poisson_dues_ns(rate, plan.steady_s, SEED))
        killed = driven(up, poisson_dues_ns(rate, plan.kill_s, SEED + 1), meanwhile)
        up.wait(2)
    return {"steady": steady, "kill": killed}


def scaling(plan: Plan, low: float = 10.0, high: float = 180.0) -> tuple[Outcomes, list[int]]:
    """A load that jumps and comes back, and the numbers of replicas that were ready."""
    parts, begin = [], 0.0
    for place, (rate, seconds) in enumerate(((low, plan.low_s), (high, plan.high_s), (low, plan.after_s))):
        parts.append(poisson_dues_ns(rate, seconds, SEED + 10 + place) + round(begin * NS_PER_S))
        begin += seconds
    with brought_up(1, 3) as up:
        up.course.clear()
        outcomes = driven(up, np.concatenate(parts))
        up.wait(1, 30.0)
        time.sleep(0.3)
        return outcomes, up.visited()


# The choice


def regret_pct(plan: Plan) -> tuple[float | None, dict[str, Any]]:
    """Regret of the choice in percent, and everything it came from; None when nothing kept the promise or was chosen."""
    task = tasks.make(id=TASK, models=list(plan.models), slo=SLO, rate=RATE)
    say = lambda line: print(f"  {line}", flush=True)  # noqa: E731
    table = QualityTable()
    short = Settings(rates=plan.rates, seconds=plan.profile_s, seed=SEED)
    profiles = {model: measure(model, short, say) for model in plan.models}
    candidates = [
        Candidate(model, table.of(model).value, table.of(model).metric, profiles[model]) for model in plan.models
    ]
    choice = choose(task, candidates, capacity())
    say(f"chosen: {choice.model}: {choice.why}")
    long = Settings(rates=(RATE,), seconds=plan.truth_s, seed=SEED + 1000)
    truth = {model: measure(model, long, say).points[0] for model in plan.models}
    kept = {model: _kept(point) for model, point in truth.items()}
    quality = {one.model: one.quality or 0.0 for one in candidates}
    best = max((quality[model] for model in plan.models if kept[model]), default=0.0)
    value = 0.0
    if choice.model:
        value = quality[choice.model] * (1.0 if kept[choice.model] else _in_time(truth[choice.model]))
    regret = 100 * max(0.0, 1 - value / best) if best else None if choice.model is None else 100.0
    details = {
        "chosen": choice.model,
        "why": choice.why,
        "reasons": dict(choice.reasons),
        "best": [model for model in plan.models if kept[model] and quality[model] == best],
        "truth": {model: asdict(point) for model, point in truth.items()},
        "kept": kept,
        "slo": SLO,
        "rate": RATE,
    }
    return regret, details


def _kept(point: Point) -> bool:
    bounds = tasks.parse_slo(SLO).bounds
    return not point.lost and all(point.bound_ms(name) <= bound for name, bound in bounds.items())


def _in_time(point: Point) -> float:
    """The share answered within the tightest bound, read off the percentiles that are known, linearly between them."""
    bound = min(tasks.parse_slo(SLO).bounds.values())
    known = [
        (value, share / 100) for share in (50, 90, 95, 99) if (value := getattr(point, f"p{share}_ms")) is not None
    ]
    values, shares = zip((0.0, 0.0), *known, (point.max_ms, 1.0), strict=True)
    return float(np.interp(bound, values, shares)) * point.n / max(point.n + point.lost, 1)


# Putting it together


def p99(outcomes: Outcomes) -> float | None:
    """In ms over requests answered OK, None below 662 of them."""
    value = percentile_of(outcomes.ok_ms(), 99)
    return None if value is None else round(value, 2)


def run(plan: Plan, choice: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of the last line, and details."""
    overheads = {label: overhead_us(plan, size) for label, size in SIZES.items()}
    phases = steady_and_kill(plan)
    phases["scaling"], course = scaling(plan)
    regret, why = regret_pct(plan) if choice else (None, {})
    figures = {
        "lost": sum(outcomes.lost for outcomes in phases.values()),
        "p99_ms": {name: p99(outcomes) for name, outcomes in phases.items()},
        "router_overhead_us": round(overheads["1k"][0], 1),
        "choice_regret_pct": None if regret is None else round(regret, 2),
    }
    details = {
        "overhead_us": {label: round(value, 1) for label, (value, _) in overheads.items()},
        "overhead_rounds_us": {label: rounds for label, (_, rounds) in overheads.items()},
        "counts": {name: outcomes.counts for name, outcomes in phases.items()},
        "quantiles_ms": {name: _quantiles(outcomes) for name, outcomes in phases.items()},
        "replicas_seen": course,
        "choice": why,
    }
    return figures, details


def _quantiles(outcomes: Outcomes) -> dict[str, float | None]:
    values = outcomes.ok_ms()
    return {f"p{at}": percentile_of(values, at) for at in (50, 90, 99)} | {"max": float(values.max())}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    quick: Annotated[bool, typer.Option("--quick", help="shorter phases, two candidates; about 90 s")] = False,
    skip_choice: Annotated[bool, typer.Option("--skip-choice", help="without the models")] = False,
) -> None:
    """Measure and store; the last line is one JSON object."""
    figures, details = run(QUICK if quick else Plan(), not skip_choice)
    for name in ("overhead_us", "counts", "quantiles_ms", "replicas_seen"):
        print(f"{name:16} {details[name]}")
    store("tasks_quick" if quick else "tasks", figures, details)
    last_line(figures)


__all__: Sequence[str] = ("Plan", "main", "run")

if __name__ == "__main__":
    app()
