"""From what was seen in a window to the knobs of the next one: feedback, forecast and slack, side by side.

    slo          p99 against the bound          -> effort      (reacts to anything, after a window of it)
    predictive   forecast rate x service time   -> effort      (before it happens, if the forecast is right)
    slack        rate, service time, step time  -> micro       (how coarse the steps may be at this load)

Each has windows of its own. Their wishes are combined carefully: the least effort, on top of the micro-steps that
slack allows. No clock and no page in here but those of `Watch`, which cuts the page's counters into windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from corun.clock import NS_PER_MS, NS_PER_S
from corun.share.brakes import Mode
from corun.share.controllers import Controller, State, Window, ladder, percentile_ms
from corun.share.forecast import Forecaster, Headroom
from corun.share.page import Knobs, Page
from corun.share.slack import micro_for_step, step_for_slack

SERVICE_PERCENTILE = 5.0


@dataclass(frozen=True)
class Wish:
    """What a steering asks for; None = nothing."""

    effort: float | None = None
    micro: int | None = None


class Steering(Protocol):
    """Learns from windows in order. micro, step_ms: parts of a step at present and how long each took (0 = unknown).

    first: its wish before the first window has ended. bound_ms: replies slower than this are counted, 0 = none.
    """

    window_s: float
    bound_ms: float
    first: Wish

    def steer(self, window: Window, micro: int, step_ms: float) -> Wish: ...


class SloSteering:
    """Feedback: the windowed p99 against the latency bound."""

    def __init__(self, controller: Controller, window_s: float) -> None:
        self.window_s = window_s
        self.bound_ms = controller.slo_ms
        self._controller = controller
        self._state = State()
        self.first = Wish(effort=self._state.effort)

    def steer(self, window: Window, micro: int, step_ms: float) -> Wish:
        self._state = self._controller.next(self._state, window)
        return Wish(effort=self._state.effort)


class PredictiveSteering:
    """Feed-forward: the forecast arrival rate times the service time is the utilisation to leave room for.

    The service time is the fifth percentile of the latencies seen (a request that met neither queue nor trainer),
    smoothed over windows.
    """

    bound_ms = 0.0

    def __init__(self, forecaster: Forecaster, headroom: Headroom, window_s: float) -> None:
        self.window_s = window_s
        self._forecaster = forecaster
        self._headroom = headroom
        self.first = Wish(effort=1.0)
        self._service_ms: float | None = None

    def steer(self, window: Window, micro: int, step_ms: float) -> Wish:
        self._forecaster.observe(window.arrivals / window.length_s)
        if window.service_ms is not None:
            self._service_ms = _smoothed(self._service_ms, window.service_ms, 0.2)
        rate = self._forecaster.forecast()
        if rate is None or self._service_ms is None:
            return Wish(effort=1.0)
        return Wish(effort=self._headroom.effort(rate * self._service_ms / 1000))


class SlackSteering:
    """Feed-forward for the micro-step: as long as the bound leaves room for at the load of the last windows."""

    bound_ms = 0.0

    def __init__(self, slo_ms: float, micro_max: int, window_s: float) -> None:
        self.window_s = window_s
        self._slo_ms = slo_ms
        self._micro_max = micro_max
        self.first = Wish(micro=micro_max)
        self._rate: float | None = None
        self._service_ms: float | None = None

    def steer(self, window: Window, micro: int, step_ms: float) -> Wish:
        self._rate = _smoothed(self._rate, window.arrivals / window.length_s, 0.25)
        if window.service_ms is not None:
            self._service_ms = _smoothed(self._service_ms, window.service_ms, 0.25)
        if self._service_ms is None or not step_ms:
            return Wish(micro=micro)
        wanted_ms = step_for_slack(self._rate, self._service_ms, self._slo_ms, longest_ms=micro * step_ms)
        return Wish(micro=micro_for_step(micro, step_ms, wanted_ms, self._micro_max))


def _smoothed(before: float | None, value: float, weight: float) -> float:
    return value if before is None else weight * value + (1 - weight) * before


class Watch:
    """Cuts the page's replies and arrivals into windows for one steering; its last wish stands in between."""

    def __init__(self, steering: Steering, page: Page, now: int) -> None:
        self._steering = steering
        self._page = page
        self._period_ns = round(steering.window_s * NS_PER_S)
        self.wish = steering.first
        self.p99_ms: float | None = None
        self.begin(now)

    def begin(self, now: int) -> None:
        """Start a window now; what was seen since the last one belongs to none."""
        self._began = now
        self._cursors = self._page.cursors()
        self._arrivals = self._page.arrivals

    def look(self, now: int, micro: int, step_ms: float) -> bool:
        """Judge the window if it is over; True when it was."""
        if now - self._began < self._period_ns:
            return False
        latencies, self._cursors = self._page.latencies_since(self._cursors)
        arrivals = self._page.arrivals
        self.p99_ms = percentile_ms(latencies)
        bound_ns = self._steering.bound_ms * NS_PER_MS
        window = Window(
            length_s=(now - self._began) / NS_PER_S,
            replies=len(latencies),
            p99_ms=self.p99_ms,
            arrivals=arrivals - self._arrivals,
            service_ms=percentile_ms(latencies, SERVICE_PERCENTILE),
            over=sum(latency > bound_ns for latency in latencies) if bound_ns else None,
        )
        self.wish = self._steering.steer(window, micro, step_ms)
        self._began, self._arrivals = now, arrivals
        return True


class Wheel:
    """All steerings of a mode. The knobs of full effort come from the page whenever the mode begins.

    micro_max, least_threads: how far the ladder goes.
    """

    def __init__(
        self, steerings: Mapping[Mode, Steering], page: Page, now: int, micro_max: int, least_threads: int
    ) -> None:
        self._watches = [Watch(steering, page, now) for steering in steerings.values()]
        self._page = page
        self._base = page.knobs
        self._micro_max = micro_max
        self._least_threads = least_threads

    def begin(self, now: int) -> None:
        """All windows begin now; what was learned stays."""
        for watch in self._watches:
            watch.begin(now)

    def resume(self, now: int) -> None:
        """The mode is switched on again: windows begin now, the base is the page's."""
        self._base = self._page.knobs
        self.begin(now)

    def turn(self, now: int, micro: int, step_ms: float) -> Knobs | None:
        """New knobs when a window ended, else None."""
        ended = [watch.look(now, micro, step_ms) for watch in self._watches]
        return self.knobs() if any(ended) else None

    def knobs(self) -> Knobs:
        """What all steerings together ask for now."""
        wishes = [watch.wish for watch in self._watches]
        for wish in wishes:
            if wish.micro is not None:
                self._base = replace(self._base, micro=wish.micro)
        efforts = [wish.effort for wish in wishes if wish.effort is not None]
        return ladder(min(efforts, default=1.0), self._base, self._micro_max, self._least_threads)

    @property
    def p99_ms(self) -> float | None:
        """p99 of the last window that had replies."""
        return next((watch.p99_ms for watch in self._watches if watch.p99_ms is not None), None)
