"""How much training a latency bound leaves room for: feedback controllers as pure functions of what was seen.

A controller turns the p99 of the last window into an *effort* u in [floor, 1]. The effort is not the duty: how
often a request meets the trainer (duty) matters less than how long it then waits (the micro-step) or what it has to
share while both run (the cores), so the ladder first cuts the step finer and gives up cores, and only then rests::

    u   1 ──────────────── 1/2 ─────────────── floor
        micro 1 ... micro_max   duty 1 ... duty 2u       (log scale)  (linear)      a device that does not preempt
    u   1 ──────────────── 2/T ─────────────── floor
        threads T ... 2    one thread, duty 1 ... Tu/2   (whole threads)  (linear)      T cores

On a 2-core machine an AIMD on the duty alone met its bound at 0.46 of the training speed where 0.74 met it without
any control. AIMD: Chiu & Jain 1989; the growing increase while nothing is harmed follows TGS (NSDI 2023); that growth
ends below where the bound broke last is CUBIC's plateau (Ha, Rhee & Xu 2008). PI: velocity-free form with conditional
integration against wind-up (Astrom & Hagglund, PID Controllers, 1995).

The p99 of a window of a few requests is its slowest one, and a good window proves little. Both controllers therefore
give room by the *peak*: the p99 with fast attack and slow release, which a single calm window does not clear. A bad
window proves little either: one slow reply of 60 is what a kept p99 looks like every other window. The bound counts as
broken when luck hardly explains the replies over it; until then it is answered by a little less effort, and forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from scipy import special

from corun.errors import InputError
from corun.share.page import Knobs

CONTROLLERS: Final = ("aimd", "pi")
FLOOR: Final = 0.05
RELEASE_PER_S: Final = 0.85
"""Share of the peak that is left a second later."""
WORST: Final = 1.5
"""Peak / bound at most: how long an overload is remembered must not depend on how bad it was."""
BELOW_KNEE: Final = 0.8
"""Share of the effort that broke the bound which is tried again while the load that broke it lasts."""
CREEP_PER_S: Final = 0.005
"""How fast the knee is tried higher under the same load: from BELOW_KNEE back to the whole of it in 50 s."""
LUCK: Final = 0.05
"""How rarely a p99 that is kept may pass for a broken one."""
GONE: Final = 0.6
"""Share of the knee's rate below which the load that broke the bound is over."""
_HALF: Final = 0.5


@dataclass(frozen=True)
class Window:
    """What was seen in one window; p99_ms is None when nothing was answered in it.

    over: replies slower than the bound that is steered by, None = not counted.
    """

    length_s: float
    replies: int
    p99_ms: float | None
    arrivals: int = 0
    service_ms: float | None = None
    over: int | None = None


@dataclass(frozen=True)
class State:
    """effort: the output, in [floor, 1]. The rest is the controller's memory.

    peak_ms: p99 with fast attack and slow release; rate: arrivals/s, likewise. knee: the effort at which the bound
    last began to break, infinite when it never did; knee_rate: the rate it broke at.

    It starts in the middle: a bound that cannot be met at full effort would otherwise be learned from a window of ruined
    replies.
    """

    effort: float = _HALF
    integral: float = _HALF
    streak: int = 0
    peak_ms: float = 0.0
    rate: float = 0.0
    knee: float = math.inf
    knee_rate: float = 0.0

    @property
    def ceiling(self) -> float:
        """The most effort that is tried while the load that broke the bound lasts; 1 when none did."""
        return min(1.0, BELOW_KNEE * self.knee)


class Controller(Protocol):
    """state' = next(state, window); pure."""

    @property
    def slo_ms(self) -> float: ...

    def next(self, state: State, window: Window) -> State: ...


def breaks(window: Window, slo_ms: float) -> bool:
    """Whether the bound is broken: p99 above it, by more replies than Poisson chance has of 1 % with LUCK."""
    if window.p99_ms is None or window.p99_ms <= slo_ms:
        return False
    return window.over is None or float(special.pdtrc(window.over - 1, 0.01 * window.replies)) < LUCK


def shown_ms(window: Window, slo_ms: float) -> float:
    """The p99 that a controller answers: at most WORST of the bound, at most the bound where luck explains more."""
    return min(window.p99_ms or 0.0, (WORST if breaks(window, slo_ms) else 1.0) * slo_ms)


def remember(state: State, window: Window, slo_ms: float) -> State:
    """The state with peak, rate and knee after a window; the effort is that of the window still.

    Peak and rate are what the window showed, or what is left of them. The knee is where the bound begins to break: windows
    over it right after one are the queue of the same overload. It creeps upwards, and is forgotten when the burst is over,
    so that a training job is back at full speed a few windows later. (Low latency alone proves nothing, it is what cutting
    has brought about.)
    """
    fresh, left = state.peak_ms <= slo_ms, RELEASE_PER_S**window.length_s
    rate = max(window.arrivals / window.length_s, state.rate * left)
    knee, knee_rate = state.knee + CREEP_PER_S * window.length_s, state.knee_rate
    if rate < GONE * knee_rate:
        knee, knee_rate = math.inf, 0.0
    if fresh and breaks(window, slo_ms):
        knee, knee_rate = state.effort, rate
    peak_ms = max(shown_ms(window, slo_ms), state.peak_ms * left)
    return replace(state, peak_ms=peak_ms, rate=rate, knee=knee, knee_rate=knee_rate)


@dataclass(frozen=True)
class Aimd:
    """Add while the peak stays below `margin` of the bound, multiply when a window's p99 exceeds that.

    The increase doubles with every further good window, up to `max_increase`, and ends at the ceiling below the effort
    that broke the bound last. The decrease is the overshoot itself: while the bound is not broken margin * slo / p99,
    since windows of one effort differ by more than the margin; else slo / p99, but at least `least_cut` and at most
    `most_cut`, so one bad window is answered in one window. After either the effort is held until the peak has gone.
    """

    slo_ms: float
    margin: float = 0.8
    increase: float = 0.05
    max_increase: float = 0.4
    least_cut: float = 0.7
    most_cut: float = 0.3
    floor: float = FLOOR

    def __post_init__(self) -> None:
        _check(self.slo_ms, self.margin, self.floor)

    def next(self, state: State, window: Window) -> State:
        state = remember(state, window, self.slo_ms)
        p99, wanted_ms = window.p99_ms or 0.0, self.margin * self.slo_ms
        if p99 > wanted_ms:
            cut = wanted_ms / shown_ms(window, self.slo_ms)
            if breaks(window, self.slo_ms):
                cut = min(self.least_cut, max(self.most_cut, self.slo_ms / p99))
            return replace(state, effort=max(self.floor, state.effort * cut), streak=0)
        if state.peak_ms > wanted_ms:
            return replace(state, streak=0)
        step = min(self.max_increase, self.increase * 2.0**state.streak)
        highest = max(state.effort, state.ceiling)
        return replace(state, effort=min(highest, state.effort + step), streak=min(state.streak + 1, 16))


@dataclass(frozen=True)
class Pi:
    """effort = kp * e + I with e = ln(margin * slo / peak), limited to [-limit, limit]; at most the ceiling.

    The logarithm because a queue's tail answers to effort about exponentially. Room is given by the peak and taken by the
    last p99; in between e is 0. I integrates ki * e * seconds, `haste` times as fast downwards: room is taken slowly, a
    broken bound answered quickly. It never pushes the output beyond its limits (anti-windup by clamping), so a long
    overload or a quiet night winds nothing up.
    """

    slo_ms: float
    margin: float = 0.8
    kp: float = 0.1
    ki_per_s: float = 0.04
    haste: float = 2.5
    limit: float = 1.5
    floor: float = FLOOR

    def __post_init__(self) -> None:
        _check(self.slo_ms, self.margin, self.floor)

    def next(self, state: State, window: Window) -> State:
        state = remember(state, window, self.slo_ms)
        error = self._error(state.peak_ms)
        if error < 0:
            error = min(0.0, self._error(shown_ms(window, self.slo_ms)))
        gain = self.ki_per_s * (self.haste if error < 0 else 1.0)
        proportional = self.kp * error
        integral = state.integral + gain * window.length_s * error
        highest = max(self.floor, state.ceiling)
        if error > 0:
            integral = min(integral, max(state.integral, highest - proportional))
        else:
            integral = max(integral, min(state.integral, self.floor - proportional))
        integral = max(self.floor, min(highest, integral))
        effort = max(self.floor, min(highest, proportional + integral))
        return replace(state, effort=effort, integral=integral)

    def _error(self, p99_ms: float) -> float:
        error = math.log(self.margin * self.slo_ms / p99_ms) if p99_ms > 0 else self.limit
        return max(-self.limit, min(self.limit, error))


def _check(slo_ms: float, margin: float, floor: float) -> None:
    problems = []
    if not slo_ms > 0 or not math.isfinite(slo_ms):
        problems.append(f"slo_ms is {slo_ms}; give the latency bound in ms")
    if not 0 < margin <= 1:
        problems.append(f"margin is {margin}; it must be above 0 and at most 1")
    if not 0 < floor <= 1:
        problems.append(f"floor is {floor}; it must be above 0 and at most 1")
    if problems:
        raise InputError("the controller cannot be built", problems)


def make_controller(name: str, slo_ms: float, margin: float, floor: float) -> Controller:
    """`aimd` or `pi` for one latency bound; InputError for another name or impossible numbers."""
    if name == "aimd":
        return Aimd(slo_ms, margin=margin, floor=floor)
    if name == "pi":
        return Pi(slo_ms, margin=margin, floor=floor)
    raise InputError(f'controller "{name}" is unknown: use {" or ".join(CONTROLLERS)}')


def ladder(effort: float, base: Knobs, micro_max: int, least_threads: int = 0) -> Knobs:
    """The knobs of an effort in (0, 1]: finer micro-steps and fewer threads first, rest last.

    base: what full effort means. micro_max: parts a step may be cut into. least_threads: threads the trainer may be cut
    down to, 0 = its threads are left alone. Where neither can change, all of the effort is duty. Monotone: less effort
    never means coarser steps, more threads or more duty.
    """
    if effort >= 1:
        return base
    finest = max(base.micro, micro_max)
    fineness = min(1.0, (1 - effort) / _HALF)
    micro = min(finest, math.ceil(base.micro * (finest / base.micro) ** fineness - 1e-9))
    if 0 < least_threads < base.threads:
        capacity, last = effort * base.threads, least_threads + 1
        if capacity + 1e-9 >= last:
            return Knobs(micro, base.duty, math.floor(capacity + 1e-9))
        return Knobs(micro, base.duty * capacity / last, least_threads)
    rest = effort if finest == base.micro else min(1.0, effort / _HALF)
    return replace(base, micro=micro, duty=base.duty * rest)


def percentile_ms(latencies_ns: Sequence[int], percent: float = 99.0) -> float | None:
    """The exact percentile ("higher": an existing sample) in ms; None without samples.

    No sample floor: a controller must act on a short window, and errs on the careful side (below 100 replies
    this is the largest).
    """
    if not latencies_ns:
        return None
    ordered = sorted(latencies_ns)
    return ordered[min(len(ordered) - 1, math.ceil(percent / 100 * (len(ordered) - 1)))] / 1e6
