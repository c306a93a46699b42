"""Which batch bound a service gets: the one that keeps its promise at the rate asked and carries the most.

    option     a size of the measured curve, not held or held for a share of the slack (bound - time of a full batch)
    judged     alone: percentile at the rate asked, and capacity = the highest rate at which the promise is kept,
               both by corun.plan.tail on the times of the curve
    chosen     of the options that keep it and have memory, the highest capacity; of those within TIE of that, the one
               held for the shortest time, then the smallest. None keeps it: the nearest.

A larger bound never makes a free server wait, so it costs little where requests are few; what it can cost is the latency
of whoever comes in a large batch. Holding fills batches and takes slack that services and training beside it will need,
so it has to carry more than TIE more. A simulated capacity is uncertain by 1 to 4 %, the times of a curve by more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from corun.plan.measured import Curve, Memory
from corun.plan.question import Slo
from corun.plan.search import bisect_rate
from corun.plan.tail import sojourn_percentile

LARGEST: Final = 32
SLACKS: Final = (0.1, 0.25)
TIE: Final = 0.10
REQUESTS: Final = 6000
LOWEST: Final = 0.01


@dataclass(frozen=True)
class Option:
    """A way to batch. predicted_ms: the promised percentile at the rate asked. capacity: requests/s, 0 = never kept."""

    max_batch: int
    max_delay_ms: float
    predicted_ms: float
    capacity: float


@dataclass(frozen=True)
class Choice:
    """The option taken, all there were, whether it keeps the promise, and a sentence why."""

    option: Option
    options: tuple[Option, ...]
    keeps: bool
    why: str


def sizes_to(largest: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `largest` itself; ValueError below 1."""
    if largest < 1:
        raise ValueError(f"a batch has one request or more, not {largest}")
    return (*(2**power for power in range(int(math.log2(largest)) + 1) if 2**power < largest), largest)


def choose(
    curve: Curve, rate: float, slo: Slo, largest: int = LARGEST, fits: Callable[[Memory], bool] = lambda memory: True
) -> Choice:
    """The batch bound of a service that is to answer `rate` requests/s. fits: whether a server's peak memory is there."""
    options = tuple(_judged(curve, rate, slo, size, delay) for size, delay in _ways(curve, slo, largest, fits))
    keeping = [one for one in options if one.predicted_ms <= slo.bound_ms]
    if keeping:
        chosen = _most(keeping)
        return Choice(chosen, options, True, _why(chosen, options, slo, rate))
    chosen = min(options, key=lambda one: (one.predicted_ms, -one.capacity, one.max_delay_ms, one.max_batch))
    if not math.isfinite(chosen.predicted_ms):
        chosen = max(options, key=lambda one: (limit(curve, one.max_batch), -one.max_delay_ms, -one.max_batch))
    near = (
        f"{slo.name} predicted {chosen.predicted_ms:.4g} ms" if math.isfinite(chosen.predicted_ms) else "overloaded"
    )
    why = f"nothing keeps {slo} at {rate:g}/s; {_words(chosen)} {_come(chosen)} nearest ({near})"
    return Choice(chosen, options, False, why)


def limit(curve: Curve, max_batch: int) -> float:
    """Requests/s of full batches one after the other, whatever the latency."""
    mean = float(np.mean(curve.shape))
    return 1000 * max_batch / (curve.times_ms(max_batch)[-1] * mean)


def percentile_ms(curve: Curve, rate: float, percentile: float, max_batch: int, max_delay_ms: float) -> float:
    """Predicted percentile of the sojourn of a service alone, in batches of up to `max_batch`."""
    times, mean = curve.times_ms(max_batch), float(np.mean(curve.shape))
    growth = tuple(time / times[0] for time in times)
    shape = tuple(value / mean for value in curve.shape)
    unit_ms, overhead_ms = times[0] * mean, curve.overhead_ms
    return sojourn_percentile(rate, shape, unit_ms, overhead_ms, percentile, growth, max_delay_ms, REQUESTS)


def capacity(curve: Curve, slo: Slo, max_batch: int, max_delay_ms: float = 0.0, rate: float | None = None) -> float:
    """The highest rate that keeps the promise; 0 = none does. rate: one that is known to keep it, to start from."""
    top = limit(curve, max_batch)

    def keeps(rate: float) -> bool:
        return percentile_ms(curve, rate, slo.percentile, max_batch, max_delay_ms) <= slo.bound_ms

    return bisect_rate(min(top, rate if rate else LOWEST * top), top, keeps)


def _ways(curve: Curve, slo: Slo, largest: int, fits: Callable[[Memory], bool]) -> Iterator[tuple[int, float]]:
    """(size, delay in ms) to look at, serving one by one first."""
    yield 1, 0.0
    for point in curve.points:
        if point.size == 1 or point.size > largest or not fits(point.memory):
            continue
        yield point.size, 0.0
        slack_ms = slo.bound_ms - curve.overhead_ms - point.ms * max(1.0, float(np.quantile(curve.shape, 0.9)))
        delays = dict.fromkeys(float(f"{share * slack_ms:.3g}") for share in SLACKS)
        yield from ((point.size, delay) for delay in delays if delay > 0)


def _judged(curve: Curve, rate: float, slo: Slo, size: int, delay_ms: float) -> Option:
    found_ms = percentile_ms(curve, rate, slo.percentile, size, delay_ms)
    kept = found_ms <= slo.bound_ms
    return Option(size, delay_ms, found_ms, capacity(curve, slo, size, delay_ms, rate if kept else None))


def _most(keeping: Sequence[Option]) -> Option:
    best = max(one.capacity for one in keeping)
    near = [one for one in keeping if one.capacity >= (1 - TIE) * best]
    return min(near, key=lambda one: (one.max_delay_ms, one.max_batch))


def _why(chosen: Option, options: Sequence[Option], slo: Slo, rate: float) -> str:
    single = options[0]
    if chosen.max_batch == 1:
        why = "batches gain nothing" if len(options) > 1 else "there are no batches"
        return f"{why}: one by one carries {chosen.capacity:.3g}/s within {slo}"
    alone = "nothing" if single.predicted_ms > slo.bound_ms and not single.capacity else f"{single.capacity:.3g}/s"
    kept = "" if single.predicted_ms <= slo.bound_ms else f", less than the {rate:g}/s asked"
    return f"{_words(chosen)} carry {chosen.capacity:.3g}/s within {slo}, one by one {alone}{kept}"


def _words(option: Option) -> str:
    if option.max_batch == 1:
        return "one by one"
    held = f" held up to {option.max_delay_ms:g} ms" if option.max_delay_ms else ""
    return f"batches of up to {option.max_batch}{held}"


def _come(option: Option) -> str:
    return "comes" if option.max_batch == 1 else "come"
