"""A machine in a formula: windows of services beside a trainer, for planners under test. No process, no clock.

Service times are log-normal around a mean that grows with the others' load in a way the planner has to find out; the
queue is real (Lindley), the arrivals Poisson, and memory is a table. A set that needs more than there is dies.

A kind in batches, `a[8]`, takes 1 + growth (n - 1) times as long for n requests as for one.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from corun.plan.bulk import serve
from corun.plan.interference import Interference, Running
from corun.plan.measured import Condition, Curve, Memory, Point, Sample, Window
from corun.plan.question import Kind
from corun.stats.queues import sojourn_times

SHARED_MIB = 300.0
BATCHES = 12


@dataclass
class Zoo:
    """Models by name with their service time alone (ms). noise: sigma of the log of a service time.

    truth: by policy. asked: every window measured, in order.
    """

    service_ms: Mapping[str, float]
    truth: Mapping[str, Interference]
    job: str = "resnet18_16"
    seconds: float = 20.0
    noise: float = 0.1
    speed: float = 100.0
    private_mib: Mapping[str, float] = field(default_factory=dict)
    limit_mib: float = float("inf")
    seed: int = 0
    growth: float = 1.0
    asked: list[tuple[Condition, int]] = field(default_factory=list)
    _made: dict[tuple[Condition, int], Window] = field(default_factory=dict, init=False, repr=False)

    def measure(self, condition: Condition, repeat: int) -> Window:
        """One window; the same one for the same condition and repeat."""
        self.asked.append((condition, repeat))
        return self.window(condition, repeat)

    def window(self, condition: Condition, repeat: int = 0) -> Window:
        """What measuring would show."""
        if (condition, repeat) not in self._made:
            self._made[condition, repeat] = self._make(condition, repeat)
        return self._made[condition, repeat]

    def _make(self, condition: Condition, repeat: int) -> Window:
        memory = self._memory(condition)
        if sum(part.private_mib for part in memory.values()) + SHARED_MIB > self.limit_mib:
            return Window(condition, repeat, self.seconds, fault="server was killed by SIGKILL")
        running = [Running(kind, rate, self._full_ms(Kind.parse(kind))) for kind, rate in condition.loads]
        slow = self._slowdowns(condition, running)
        samples = tuple(
            self._sample(one, factor, condition, repeat, index)
            for index, (one, factor) in enumerate(zip(running, slow, strict=True))
        )
        ratio = self.truth[condition.policy].training_ratio(running) if condition.job else 1.0
        return Window(condition, repeat, self.seconds, samples, self.speed * ratio if condition.job else None, memory)

    def curve(self, model: str, sizes: Sequence[int]) -> Curve:
        """What measuring batches of these sizes would show."""
        rng = np.random.default_rng([self.seed, zlib.crc32(model.encode())])
        memory = Memory(self.private_mib.get(model, 100.0), SHARED_MIB)
        points = []
        for size in sorted(sizes):
            noise = rng.lognormal(-(self.noise**2) / 2, self.noise, BATCHES)
            points.append(Point(size, tuple((self._ms(model, size) * noise).tolist()), memory, 400.0, 200.0))
        return Curve(tuple(sizes), tuple(points), 0.3)

    def _ms(self, model: str, size: int) -> float:
        return self.service_ms[model] * (1 + self.growth * (size - 1))

    def _full_ms(self, kind: Kind) -> float:
        """A request's part of a full batch."""
        return self._ms(kind.model, kind.max_batch) / kind.max_batch

    def _slowdowns(self, condition: Condition, running: Sequence[Running]) -> list[float]:
        if condition.job:
            return self.truth[condition.policy].slowdowns(running)
        anyone = next(iter(self.truth.values()))
        return Interference(anyone.cores, 0, anyone.sharing, anyone.training, anyone.pressure).slowdowns(running)

    def _sample(self, one: Running, factor: float, condition: Condition, repeat: int, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, repeat, index, zlib.crc32(condition.label.encode())])
        arrivals = np.cumsum(rng.exponential(1000 / one.rate, 2 * int(one.rate * self.seconds) + 10))
        arrivals = arrivals[arrivals < 1000 * self.seconds]
        kind, noise = Kind.parse(one.model), rng.lognormal(-(self.noise**2) / 2, self.noise, arrivals.size)
        if kind.max_batch > 1:
            return self._batched(one, kind, factor, arrivals, noise)
        service = one.service_ms * factor * noise
        sojourn = sojourn_times(arrivals, service) + 0.3
        return Sample(one.model, one.rate, tuple(sojourn.tolist()), tuple(service.tolist()))

    def _batched(
        self, one: Running, kind: Kind, factor: float, arrivals: NDArray[np.float64], noise: NDArray[np.float64]
    ) -> Sample:
        times = [factor * self._ms(kind.model, size) for size in range(1, kind.max_batch + 1)]
        found = serve(arrivals, times, noise, kind.max_delay_ms)
        firsts = np.cumsum([0, *found.sizes])[:-1].astype(int)
        sizes = np.asarray(found.sizes, dtype=int)
        service = np.repeat(np.asarray(times)[sizes - 1] * noise[firsts], sizes)
        batches = tuple(np.repeat(sizes, sizes).tolist())
        return Sample(one.model, one.rate, tuple((found.sojourns + 0.3).tolist()), tuple(service.tolist()), batches)

    def _memory(self, condition: Condition) -> dict[str, Memory]:
        found = {
            f"server {kind}": Memory(self.private_mib.get(Kind.parse(kind).model, 100.0), SHARED_MIB)
            for kind, _ in condition.loads
        }
        if condition.job:
            found[f"trainer {condition.job}"] = Memory(self.private_mib.get("trainer", 100.0), SHARED_MIB)
        return found

    def largest(self, models: Sequence[str], rate: float, policy: str, percentile: float, bound_ms: float) -> int:
        """By brute force: the size of the largest set of which every service keeps the bound in its first window."""
        for size in range(len(models), 0, -1):
            for chosen in itertools.combinations(models, size):
                window = self.window(Condition(tuple((model, rate) for model in chosen), self.job, policy))
                tails = [np.quantile(one.sojourns_ms, percentile / 100, method="higher") for one in window.samples]
                if not window.fault and max(tails) <= bound_ms:
                    return size
        return 0
