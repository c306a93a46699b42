"""The micro-step a latency bound leaves room for, computed before anything runs.

While a non-preemptible micro-step of length g runs, a request that finds the service idle waits for its rest; the
requests behind it in the same busy period inherit that delay. The service is a queue whose server takes vacations
of length g whenever it is idle (Levy & Yechiali 1975), and its sojourns follow Lindley's recursion with one change::

    start[i] = end[i-1]                        if it arrives before the last one has ended
             = next micro-step boundary        otherwise: end[i-1] + k * g >= arrival
    sojourn[i] = start[i] + service[i] - arrival[i]

Fed with measured solo service times and the arrival list this predicted p50, p95 and p99 of real runs within 5 %.
Short steps cost efficiency (each has a fixed part), so the best choice is the coarsest one that meets the bound.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from corun.errors import InputError
from corun.share.controllers import percentile_ms

MicroCost = Callable[[int], float]
"""Milliseconds of one micro-step of that many samples."""


@dataclass(frozen=True)
class Choice:
    """A split of the step: parts, samples in the largest, its length, the predicted p99, and speed to the best split."""

    micro: int
    samples: int
    micro_ms: float
    p99_ms: float
    efficiency: float
    meets: bool


def gated_sojourns(arrivals_ns: Sequence[int], service_ns: Sequence[int], micro_ns: int) -> list[int]:
    """Sojourn of each request (ns) when training fills every idle moment with micro-steps of `micro_ns`.

    arrivals_ns, service_ns: (n,), arrivals ascending. micro_ns 0 = no training: plain Lindley.
    """
    sojourns = []
    free_at = arrivals_ns[0] if arrivals_ns else 0
    for arrival, service in zip(arrivals_ns, service_ns, strict=True):
        start = free_at
        if arrival > free_at:
            start = arrival
            if micro_ns:
                late = (arrival - free_at) % micro_ns
                start += micro_ns - late if late else 0
        free_at = start + service
        sojourns.append(free_at - arrival)
    return sojourns


def predict_p99_ms(arrivals_ns: Sequence[int], service_ns: Sequence[int], micro_ms: float) -> float:
    """p99 of the sojourns under that micro-step, in ms; InputError without requests."""
    p99 = percentile_ms(gated_sojourns(arrivals_ns, service_ns, round(micro_ms * 1e6)))
    if p99 is None:
        raise InputError("a latency cannot be predicted without any request")
    return p99


def choose_micro(
    arrivals_ns: Sequence[int],
    service_ns: Sequence[int],
    cost_ms: MicroCost,
    batch_size: int,
    p99_ms: float,
    least: int = 1,
) -> Choice:
    """The fastest split of a batch whose predicted p99 is at most `p99_ms`; the finest one when none is.

    cost_ms: length of a micro-step by its number of samples. least: samples a micro-batch needs. Splits whose
    parts have equal largest sizes are tried once, the smallest count of parts.
    """
    splits = {-(-batch_size // parts): parts for parts in range(batch_size // least, 0, -1)}
    speeds = {size: _speed(parts, batch_size, cost_ms) for size, parts in splits.items()}
    best = max(speeds.values())
    choices = [
        Choice(splits[size], size, cost_ms(size), p99, speeds[size] / best, p99 <= p99_ms)
        for size in sorted(splits)
        for p99 in (predict_p99_ms(arrivals_ns, service_ns, cost_ms(size)),)
    ]
    meeting = [choice for choice in choices if choice.meets]
    return max(meeting, key=lambda choice: choice.efficiency) if meeting else min(choices, key=lambda c: c.p99_ms)


REQUESTS_TO_PREDICT = 3000
_BISECTIONS = 12


def step_for_slack(rate_per_s: float, service_ms: float, p99_ms: float, longest_ms: float, seed: int = 0) -> float:
    """The longest micro-step (ms, at most `longest_ms`) with which Poisson arrivals keep their p99; 0 when none does.

    For a running trainer, which knows the rate and the service time of the last window but no arrival list. The
    synthetic arrivals have 3,000 requests from one seed, so the answer moves only when the load does.
    """
    if rate_per_s <= 0:
        return longest_ms
    draw = random.Random(seed).expovariate
    gap_ns, service_ns = 1e9 / rate_per_s, round(service_ms * 1e6)
    arrivals = list(accumulate(round(draw(1.0) * gap_ns) for _ in range(REQUESTS_TO_PREDICT)))
    services = [service_ns] * len(arrivals)

    def meets(step_ms: float) -> bool:
        return predict_p99_ms(arrivals, services, step_ms) <= p99_ms

    if meets(longest_ms):
        return longest_ms
    low, high = 0.0, longest_ms
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


def micro_for_step(micro: int, step_ms: float, wanted_ms: float, micro_max: int) -> int:
    """How many parts to cut into next, when `micro` parts took `step_ms` each and `wanted_ms` are allowed.

    A part has a fixed cost, so a finer split comes out longer than proportional; the next window corrects it. A
    coarser split is taken in steps of at most a factor of two.
    """
    needed = micro * step_ms / wanted_ms if wanted_ms > 0 else math.inf
    return max(1, -(-micro // 2), math.ceil(min(micro_max, needed) - 1e-9))


def _speed(parts: int, batch_size: int, cost_ms: MicroCost) -> float:
    """Samples per ms of a batch cut evenly into that many parts."""
    size, larger = divmod(batch_size, parts)
    return batch_size / (larger * cost_ms(size + 1 if larger else size) + (parts - larger) * cost_ms(size))
