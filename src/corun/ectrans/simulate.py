"""The scheduler in virtual time: no model, no torch, no waiting; the very object that serves.

A package of n sentences takes `a + b n` seconds on one of `servers` that are alike. A published pipeline measured
a = 0.236 s and b = 0.0504 s on its GPU.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corun.clock import NS_PER_S
from corun.ectrans.mixes import Arrival
from corun.ectrans.scheduler import Job, Package, Rules, Scheduler
from corun.errors import InputError
from corun.serve.estimate import Estimate, KnownCost
from corun.stats import percentile_of

PUBLISHED_COST = (0.236, 0.0504)
Service = Callable[[Package], float]


@dataclass(frozen=True)
class Outcome:
    """What one way of scheduling came to; seconds. slowdown: turnaround over service time alone."""

    jobs: tuple[Job, ...]
    packages: tuple[Package, ...]
    turnarounds: tuple[float, ...]
    slowdowns: tuple[float, ...]
    makespan_s: float

    @property
    def mean_s(self) -> float:
        return sum(self.turnarounds) / len(self.turnarounds)

    def mean_of(self, size: int) -> float:
        """Mean turnaround of the requests of one size."""
        own = [turnaround for job, turnaround in zip(self.jobs, self.turnarounds, strict=True) if job.size == size]
        return sum(own) / len(own)

    def worst_of(self, size: int) -> float:
        """Largest turnaround of the requests of one size."""
        return max(
            turnaround for job, turnaround in zip(self.jobs, self.turnarounds, strict=True) if job.size == size
        )

    @property
    def order(self) -> list[int]:
        """Keys of the requests in the order of their first dispatch."""
        return [job.key for job in sorted(self.jobs, key=lambda job: (job.first_ns or 0, job.number))]

    @property
    def waste(self) -> float:
        """Share of padding among all tokens sent, 0..1."""
        padded = sum(package.padded for package in self.packages)
        return 1 - sum(package.real for package in self.packages) / padded if padded else 0.0

    def body(self) -> dict[str, Any]:
        """As one JSON object."""
        return {
            "requests": len(self.jobs),
            "mean_s": round(self.mean_s, 3),
            "p99_s": _rounded(percentile_of(self.turnarounds, 99)),
            "max_s": round(max(self.turnarounds), 3),
            "mean_slowdown": round(sum(self.slowdowns) / len(self.slowdowns), 3),
            "p99_slowdown": _rounded(percentile_of(self.slowdowns, 99)),
            "makespan_s": round(self.makespan_s, 3),
            "packages": len(self.packages),
            "padding_waste": round(self.waste, 4),
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def linear(start_s: float, token_s: float) -> Service:
    """A package takes start_s + token_s per padded token."""
    return lambda package: start_s + token_s * package.padded


def simulate(jobs: Sequence[Job], scheduler: Scheduler, service: Service, servers: int = 1) -> list[Package]:
    """Let requests arrive and be served until none is left; the packages in the order they were sent.

    Fills the jobs' times. Work-conserving: a free server takes what there is. Raises InputError for a request that
    the scheduler does not admit.
    """
    coming = sorted(jobs, key=lambda job: (job.arrival_ns, job.key))
    free, busy, packages = list(range(servers)), list[tuple[int, int, Package]](), list[Package]()
    arrived, now = 0, 0
    while arrived < len(coming) or busy or len(scheduler):
        while arrived < len(coming) and coming[arrived].arrival_ns <= now:
            reason = scheduler.offer(coming[arrived])
            if reason:
                raise InputError(f"request {coming[arrived].key} is not admitted: {reason}")
            arrived += 1
        scheduler.expire(now)
        for slot in sorted(free):
            package = scheduler.next(now, slot=slot)
            if package is not None:
                free.remove(slot)
                packages.append(package)
                heapq.heappush(busy, (now + round(service(package) * NS_PER_S), package.number, package))
        instants = [busy[0][0] for _ in busy[:1]] + [job.arrival_ns for job in coming[arrived : arrived + 1]]
        now = min(instants, default=now)
        while busy and busy[0][0] <= now:
            package = heapq.heappop(busy)[2]
            free.append(package.slot)
            scheduler.done(package, now, (now - package.sent_ns) / NS_PER_S)
    return packages


def run(
    arrivals: Sequence[Arrival],
    rules: Rules,
    cost: tuple[float, float] = PUBLISHED_COST,
    servers: int = 1,
    lengths: Callable[[int, int], Sequence[int]] | None = None,
    estimate: Estimate | None = None,
) -> Outcome:
    """One way of scheduling on one load. lengths: tokens of each sentence of request (number, size), by default 1."""
    jobs = [
        Job(number, arrival.at_ns, lengths(number, arrival.size) if lengths else [1] * arrival.size)
        for number, arrival in enumerate(arrivals)
    ]
    alone = KnownCost(*cost)
    costs = [_alone_s(job, alone, rules.limits.max_items) for job in jobs]
    packages = simulate(jobs, Scheduler(rules, estimate or alone), linear(*cost), servers)
    turnarounds = [((job.done_ns or 0) - job.arrival_ns) / NS_PER_S for job in jobs]
    return Outcome(
        jobs=tuple(jobs),
        packages=tuple(packages),
        turnarounds=tuple(turnarounds),
        slowdowns=tuple(turnaround / cost_s for turnaround, cost_s in zip(turnarounds, costs, strict=True)),
        makespan_s=max(job.done_ns or 0 for job in jobs) / NS_PER_S,
    )


def _alone_s(job: Job, cost: KnownCost, max_items: int) -> float:
    full, rest = divmod(job.size, max_items)
    tokens = max((item.length for item in job.items), default=0)
    return cost.seconds(full + bool(rest), job.size * tokens)


def table(outcomes: Mapping[str, Outcome]) -> str:
    """Ways of scheduling side by side."""
    lines = [
        f"{'':<22} {'mean s':>9} {'p99 s':>9} {'max s':>9} {'slowdown':>9} {'end s':>9} {'packages':>9} {'waste':>7}"
    ]
    for name, outcome in outcomes.items():
        body = outcome.body()
        p99 = "n/a" if body["p99_s"] is None else f"{body['p99_s']:.3f}"
        lines.append(
            f"{name:<22} {body['mean_s']:>9.3f} {p99:>9} {body['max_s']:>9.3f} {body['mean_slowdown']:>9.2f} "
            f"{body['makespan_s']:>9.3f} {body['packages']:>9} {body['padding_waste']:>7.1%}"
        )
    return "\n".join(lines)
