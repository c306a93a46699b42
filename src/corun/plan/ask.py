"""From a condition to a window: which services of a stage are asked at which multiple of their rate.

The stage itself (processes, sockets) is passed in: this package starts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from corun.plan.measured import Condition, Memory, Sample, Window
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
        models = {one.name: one.model for one in chosen}
        return Window(
            condition,
            repeat,
            seconds,
            tuple(
                Sample(models[one.name], one.rate, _rounded(one.sojourns_ms), _rounded(one.services_ms))
                for one in seen.served
            ),
            seen.samples_per_s,
            _memory(seen.memory, models),
            seen.foreign_cores,
        )

    return measure


def _assign(condition: Condition, candidates: Sequence[Candidate]) -> tuple[list[Candidate], float]:
    """A candidate for each load, and the factor on their rates that all loads have in common."""
    left, chosen, factors = list(candidates), [], set()
    for model, rate in condition.loads:
        own = [one for one in left if one.model == model]
        if not own:
            raise ValueError(f"{condition.label}: more services of {model} than there are candidates")
        one = min(own, key=lambda one: abs(one.rate - rate))
        left.remove(one)
        chosen.append(one)
        factors.add(round(rate / one.rate, 9))
    if len(factors) > 1:
        raise ValueError(f"{condition.label}: one window has one factor on all rates, not {sorted(factors)}")
    return chosen, factors.pop() if factors else 1.0


def _rounded(times_ms: Sequence[float]) -> tuple[float, ...]:
    """To 0.1 µs, as it is kept on disk: an answer from the file is the answer from the run."""
    return tuple(round(value, 4) for value in times_ms)


def _memory(seen: Mapping[str, Any], models: Mapping[str, str]) -> dict[str, Memory]:
    found: dict[str, Memory] = {}
    for label, part in seen.items():
        role, _, name = label.partition(" ")
        key = f"{role} {models.get(name, name)}"
        memory = Memory(part.private_mib, part.shared_mib, part.gpu_mib)
        found[key] = found.get(key, Memory()).at_least(memory)
    return found
