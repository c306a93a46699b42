"""How many replicas a task should have: a pure function of what was seen lately.

With s seconds of a replica's time per request, a load of r requests/s keeps r s replicas busy. To keep each of them
below `target` busy, and to work off w waiting requests within drain_s,

    needed = ceil(max(r, forecast) s / target  +  w s / drain_s)

    replicas  up     when `needed` was above them in every look of the last up_after_s: to the least of those looks
              down   when, reckoned with `low` instead of `target`, it was below them in every look of the last
                     down_after_s, and their number has not changed for as long: to the most of those looks

The gap between low and target is the hysteresis, down_after_s the cool-down: a load that swings around one number of
replicas does not start and stop them. A replica that is still starting counts, so none is started twice.

r s / n alone cannot promise a tail latency: while more answers than late_share break the task's bound although every
replica is busier than `low`, one more is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from corun.errors import InputError

__all__ = ["Decision", "Observation", "ScalingRule", "decide"]


@dataclass(frozen=True)
class Observation:
    """A task at one instant.

    rate: arrivals/s lately. forecast: arrivals/s expected while a replica would be starting, None = no opinion.
    service_s: a replica's time per request, None before any was answered. waiting: requests no replica has taken.
    replicas: ready or starting. late_share: of the last answers, those that broke the task's bound.
    """

    now_s: float
    rate: float
    replicas: int
    service_s: float | None = None
    forecast: float | None = None
    waiting: int = 0
    late_share: float = 0.0

    @property
    def load(self) -> float:
        """Requests/s to be ready for."""
        return max(self.rate, self.forecast or 0.0)


@dataclass(frozen=True)
class ScalingRule:
    """Bounds and patience of the formula in this module's head."""

    least: int = 1
    most: int = 1
    target: float = 0.7
    low: float = 0.5
    up_after_s: float = 1.0
    down_after_s: float = 30.0
    drain_s: float = 2.0
    late_share: float = 0.05

    def __post_init__(self) -> None:
        if not (0 <= self.least <= self.most and self.most >= 1):
            raise InputError(f"replicas {self.least} to {self.most} is no range")
        if not (0 < self.low < self.target <= 1 and self.up_after_s >= 0 and self.drain_s > 0):
            raise InputError(f"{self}: 0 < low < target <= 1, up_after_s 0 or more, drain_s above 0")
        if not self.down_after_s >= self.up_after_s:
            raise InputError(f"{self}: down_after_s is the longer patience, up_after_s the shorter one")


@dataclass(frozen=True)
class Decision:
    """How many replicas there should be, and the sentence about it ("" = as it is)."""

    replicas: int
    why: str = ""


def decide(rule: ScalingRule, observations: Sequence[Observation]) -> Decision:
    """What to do after the last of these looks, given oldest first; down_after_s of them are enough.

    Raises ValueError without any.
    """
    if not observations:
        raise ValueError("there is nothing to decide from")
    now = observations[-1]
    bounded = min(max(now.replicas, rule.least), rule.most)
    if bounded != now.replicas:
        return Decision(bounded, f"{rule.least} to {rule.most} replicas are allowed")
    up = _over(observations, rule.up_after_s, lambda look: _needed(rule, look, rule.target), min)
    if up is not None and min(up, rule.most) > now.replicas:
        return Decision(min(up, rule.most), _why(now))
    down = _over(observations, rule.down_after_s, lambda look: _needed(rule, look, rule.low), max)
    if down is not None and max(down, rule.least) < now.replicas and _unchanged(observations, rule.down_after_s):
        return Decision(max(down, rule.least), _why(now))
    return Decision(now.replicas)


def _needed(rule: ScalingRule, look: Observation, target: float) -> int:
    """Replicas for one look's load at `target` busy; a load that cannot be reckoned yet asks for what there is."""
    if look.service_s is None:
        return max(look.replicas, 1) if look.rate or look.waiting else 0
    needed = math.ceil(look.load * look.service_s / target + look.waiting * look.service_s / rule.drain_s - 1e-9)
    busy = look.rate * look.service_s / max(look.replicas, 1)
    if look.late_share > rule.late_share and busy > rule.low:
        needed = max(needed, look.replicas + 1)
    return max(needed, 1 if look.rate or look.waiting else 0)


def _over(
    observations: Sequence[Observation],
    span_s: float,
    value: Callable[[Observation], int],
    extreme: Callable[[Sequence[int]], int],
) -> int | None:
    """The least or most of the looks of the last span_s; None when they do not reach back that far."""
    since_s = observations[-1].now_s - span_s
    if observations[0].now_s > since_s:
        return None
    return extreme([value(look) for look in observations if look.now_s >= since_s])


def _unchanged(observations: Sequence[Observation], span_s: float) -> bool:
    since_s = observations[-1].now_s - span_s
    return len({look.replicas for look in observations if look.now_s >= since_s}) == 1


def _why(now: Observation) -> str:
    """`12.0 requests/s, 15.0 expected, 80 ms each, 3 waiting`."""
    expected = "" if now.forecast is None else f", {now.forecast:.1f} expected"
    each = "" if now.service_s is None else f", {1000 * now.service_s:.3g} ms each"
    return f"{now.rate:.1f} requests/s{expected}{each}, {now.waiting} waiting"
