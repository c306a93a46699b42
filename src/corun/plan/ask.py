"""From a condition to a window: which services of a stage are asked at which multiple of their rate.

The stage itself (processes, sockets) is passed in: this package starts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from corun.plan.measured import Condition, Curve, Memory, Point, Sample, Window
from corun.plan.question import Candidate


class Served(Protocol):
    """One service in one window, as launch.stage gives it."""

    @property
    def name(self) -> str: ...
    @property
    def rate(self) -> float: ...
    @property
    def sojourns_ms(self) -> tuple[float, ...]: ...
    @property
    def services_ms(self) -> tuple[float, ...]: ...
    @property
    def batches(self) -> tuple[int, ...]: ...


class Observation(Protocol):
    """One window of a stage."""

    @property
    def served(self) -> Sequence[Served]: ...
    @property
    def samples_per_s(self) -> float | None: ...
    @property
    def memory(self) -> Mapping[str, Any]: ...
    @property
    def foreign_cores(self) -> float: ...


class OneSize(Protocol):
    """Batches of one size, as launch.batches gives them; footprint: the server's peak in MiB so far."""

    @property
    def size(self) -> int: ...
    @property
    def times_ms(self) -> tuple[float, ...]: ...
    @property
    def footprint(self) -> Any: ...
    @property
    def rss_mib(self) -> float | None: ...
    @property
    def pss_mib(self) -> float | None: ...


class Batches(Protocol):
    """Batches of growing size on one server."""

    @property
    def sizes(self) -> Sequence[OneSize]: ...
    @property
    def overhead_ms(self) -> float: ...
    @property
    def foreign_cores(self) -> float: ...
    @property
    def fault(self) -> str: ...


Observe = Callable[[str, Sequence[str], float, int, bool], Observation | str]
"""(policy, names, factor, repeat, trains) -> what was seen, or why these cannot run."""


def asker(
    candidates: Sequence[Candidate], default_policy: str, seconds: float, observe: Observe
) -> Callable[[Condition, int], Window]:
    """What a planner calls to measure. default_policy: the stage in which services are measured alone."""

    def measure(condition: Condition, repeat: int) -> Window:
        chosen, factor = _assign(condition, candidates)
        policy = condition.policy or default_policy
        seen = observe(policy, [one.name for one in chosen], factor, repeat, bool(condition.job))
        if isinstance(seen, str):
            return Window(condition, repeat, seconds, fault=seen)
        by_name = {one.name: one for one in chosen}
        return Window(
            condition,
            repeat,
            seconds,
            tuple(_sample(one, by_name[one.name]) for one in seen.served),
            seen.samples_per_s,
            _memory(seen.memory, {one.name: one.kind for one in chosen}),
            seen.foreign_cores,
        )

    return measure


def _assign(condition: Condition, candidates: Sequence[Candidate]) -> tuple[list[Candidate], float]:
    """A candidate for each load, and the factor on their rates that all loads have in common."""
    left, chosen, factors = list(candidates), [], set()
    for kind, rate in condition.loads:
        own = [one for one in left if one.kind == kind]
        if not own:
            raise ValueError(f"{condition.label}: more services of {kind} than there are candidates")
        one = min(own, key=lambda one: abs(one.rate - rate))
        left.remove(one)
        chosen.append(one)
        factors.add(round(rate / one.rate, 9))
    if len(factors) > 1:
        raise ValueError(f"{condition.label}: one window has one factor on all rates, not {sorted(factors)}")
    return chosen, factors.pop() if factors else 1.0


def _sample(seen: Served, of: Candidate) -> Sample:
    batches = seen.batches if of.max_batch > 1 else ()
    return Sample(of.kind, seen.rate, _rounded(seen.sojourns_ms), _rounded(seen.services_ms), batches)


def _rounded(times_ms: Sequence[float]) -> tuple[float, ...]:
    """To 0.1 µs, as it is kept on disk: an answer from the file is the answer from the run."""
    return tuple(round(value, 4) for value in times_ms)


def read_curve(asked: Sequence[int], seen: Batches) -> Curve:
    """A curve from what was seen of batches of the sizes asked."""
    points = tuple(
        Point(
            one.size,
            _rounded(one.times_ms),
            Memory(one.footprint.private_mib, one.footprint.shared_mib, one.footprint.gpu_mib),
            one.rss_mib,
            one.pss_mib,
        )
        for one in seen.sizes
    )
    return Curve(tuple(asked), points, round(seen.overhead_ms, 4), seen.foreign_cores)


def _memory(seen: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, Memory]:
    found: dict[str, Memory] = {}
    for label, part in seen.items():
        role, _, name = label.partition(" ")
        key = f"{role} {kinds.get(name, name)}"
        memory = Memory(part.private_mib, part.shared_mib, part.gpu_mib)
        found[key] = found.get(key, Memory()).at_least(memory)
    return found
