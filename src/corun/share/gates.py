"""The trainer's side of the cooperative policies: what happens at every place where it may stop.

    before each step and micro-step (and layer, if asked)      gate.wait("step" | "micro" | "layer")
        a window is over?      steer: p99, arrivals, step time -> knobs on the page
        a request is pending?  sleep until the last one is answered, its service dies, or the trainer is wanted
        rest is owed?          sleep it off

The fast path is two reads of shared memory. The rules are those of `brakes` and `steering`; this file only
gives them a clock, a page and a way to sleep. `attend` is called about every 20 ms while the trainer
is held: it lets a session answer its launcher, and returns True to let go at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import msgspec

from corun.clock import NS_PER_MS, now_ns
from corun.errors import InputError, suggest
from corun.share.brakes import LOOK_AGAIN_NS, Brakes, Mode
from corun.share.controllers import FLOOR, make_controller
from corun.share.forecast import Headroom, make_forecaster
from corun.share.page import STALE_AFTER_NS, Knobs, Page
from corun.share.steering import PredictiveSteering, SlackSteering, SloSteering, Steering, Wheel


@dataclass(frozen=True)
class GateOptions:
    """What a trainer's `--gate-options` may say; times with their unit, 0 = off.

    page: path of the shared page. mode: bits of brakes.Mode to start with. slo_ms, window_s: slo and slack.
    margin, controller, floor: the slo policy. micro_max: finest split of a step that may be asked for. least_threads:
    threads the trainer may be cut down to. cores, service_threads (by slot): the elastic policy.
    forecaster, history, forecast_s, low, high: the predictive policy. max_wait_ms: see Brakes. stale_ms: see Page.
    """

    page: str
    mode: int = 0
    slo_ms: float = 0.0
    margin: float = 0.8
    controller: str = "aimd"
    floor: float = FLOOR
    window_s: float = 5.0
    micro_max: int = 1
    least_threads: int = 0
    cores: int = 0
    service_threads: tuple[int, ...] = ()
    forecaster: str = "ewma"
    history: str = ""
    forecast_s: float = 1.0
    low: float = 0.2
    high: float = 0.7
    max_wait_ms: float = 0.0
    stale_ms: float = STALE_AFTER_NS / NS_PER_MS


@dataclass
class Counted:
    """What the gate did so far."""

    stops: int = 0
    held: int = 0
    held_ns: int = 0
    stale: int = 0
    let_go: int = 0
    windows: int = 0
    fewer: int = 0


class PageGate:
    """The gate of a trainer that shares a page with the services. Called from the training thread only.

    steerings: makes the steering of a mode bit when that bit is first switched on.
    """

    def __init__(
        self,
        page: Page,
        steerings: Mapping[Mode, Callable[[], Steering]] | None = None,
        micro_max: int = 1,
        max_wait_ns: int = 0,
        stale_ns: int = STALE_AFTER_NS,
        clock: Callable[[], int] = now_ns,
        sleep: Callable[[int, int], None] | None = None,
        least_threads: int = 0,
        cores: int = 0,
        service_threads: Sequence[int] = (),
    ) -> None:
        self.attend: Callable[[], bool] = _never
        self.counted = Counted()
        self._page = page
        self._steerings = steerings or {}
        self._micro_max = micro_max
        self._least_threads = least_threads
        self._cores = cores
        self._service_threads = service_threads
        self._stale_ns = stale_ns
        self._clock = clock
        self._sleep = sleep or page.sleep
        self._brakes = Brakes(max_wait_ns)
        self._mode = Mode.FREE
        self._wheel: Wheel | None = None
        self._wheels: dict[Mode, Wheel] = {}
        self._in_micro = False
        self._fresh = False
        self._released_ns = 0
        self._step_ns = 0.0

    def begin(self) -> None:
        """A measured window is about to begin: the pause before it was neither work nor load."""
        self._brakes.begin()
        self._in_micro = False
        self._fresh = True

    def wait(self, boundary: str) -> None:
        """Return when the trainer may go on; `boundary` is step, micro or layer."""
        now = self._clock()
        if self._fresh and self._wheel:
            self._wheel.begin(now)
        self._fresh = False
        if self._in_micro:
            self._measure(now - self._released_ns)
        if boundary == "step":
            self._steer(now)
            self._page.trainer_beat(now)
        self._hold(now)
        self._in_micro = boundary == "micro"

    def _measure(self, step_ns: int) -> None:
        """Smooth the length of a micro-step."""
        self._step_ns = step_ns if not self._step_ns else 0.9 * self._step_ns + 0.1 * step_ns

    def _hold(self, now: int) -> None:
        """Stand until both brakes are off or the session wants the trainer."""
        brakes = self._brakes
        brakes.arrive(now, self._page.duty)
        self.counted.stops += 1
        while (until := brakes.held_until(now, self._pending(now))) and not self.attend():
            with self._page.asleep() as bell:
                if brakes.held_until(now, self._page.busy and bool(self._page.mode & Mode.PREEMPT)):
                    self._sleep(bell, min(until - now, LOOK_AGAIN_NS))
            now = self._clock()
        self.counted.let_go += bool(until)
        self._released_ns = now
        held_ns = brakes.leave(now)
        if held_ns > 0:
            self.counted.held += 1
            self.counted.held_ns += held_ns

    def _pending(self, now: int) -> bool:
        if not self._page.busy or not self._page.mode & Mode.PREEMPT:
            return False
        if self._page.waiting_slots(now, self._stale_ns):
            return True
        self.counted.stale += 1
        return False

    def knobs(self) -> Knobs:
        """What the next step should be like; under Mode.ELASTIC what the next layer should be."""
        knobs = self._page.knobs
        if not self._page.busy or not self._page.mode & Mode.ELASTIC:
            return knobs
        left = self._cores_left()
        if left >= (knobs.threads or self._cores):
            return knobs
        self.counted.fewer += 1
        return replace(knobs, threads=left)

    def _cores_left(self) -> int:
        """Cores that the services with pending requests do not compute on; at least 1."""
        slots = self._page.waiting_slots(self._clock(), self._stale_ns)
        taken = sum(self._service_threads[slot] for slot in slots if slot < len(self._service_threads))
        return max(1, self._cores - taken)

    def _steer(self, now: int) -> None:
        mode = Mode(self._page.mode)
        if mode != self._mode:
            self._switch(mode, now)
        before = self._page.knobs
        knobs = self._wheel.turn(now, before.micro, self._step_ns / NS_PER_MS) if self._wheel else None
        if self._wheel is None or knobs is None:
            return
        self._page.set_knobs(knobs)
        self._page.judged(round((self._wheel.p99_ms or 0) * NS_PER_MS))
        self.counted.windows += 1
        if knobs.micro != before.micro:
            self._step_ns = 0.0

    def _switch(self, mode: Mode, now: int) -> None:
        """Steer as the new mode says, from the knobs on the page; a mode that was on before goes on where it was."""
        self._mode, self._step_ns = mode, 0.0
        self._wheel = self._wheels.get(mode)
        if self._wheel:
            self._wheel.resume(now)
        elif steerings := {bit: make() for bit, make in self._steerings.items() if mode & bit}:
            self._wheel = self._wheels[mode] = Wheel(steerings, self._page, now, self._micro_max, self._least_threads)
        if self._wheel:
            self._page.set_knobs(self._wheel.knobs())

    def report(self) -> dict[str, Any]:
        """Counters and the knobs in force, for STATS and the counts of a segment."""
        counted, knobs = self.counted, self._page.knobs
        return {
            "gate_stops": counted.stops,
            "gate_held": counted.held,
            "gate_held_ms": counted.held_ns / NS_PER_MS,
            "gate_stale": counted.stale,
            "gate_let_go": counted.let_go,
            "gate_windows": counted.windows,
            "gate_fewer_threads": counted.fewer,
            "micro": knobs.micro,
            "duty": knobs.duty,
            "threads": knobs.threads,
        }

    def close(self) -> None:
        """Leave the page."""
        self._page.close()


def _never() -> bool:
    return False


def from_options(options: Mapping[str, Any]) -> PageGate:
    """Build the gate of a trainer from `--gate-options`; InputError names what is wrong with them."""
    try:
        given = msgspec.convert(dict(options), GateOptions)
    except msgspec.ValidationError as error:
        raise InputError("the gate's options are wrong", [str(error)]) from None
    known = [item.name for item in fields(GateOptions)]
    unknown = [f'"{name}" is unknown{suggest(name, known)}' for name in options if name not in known]
    if unknown:
        raise InputError("the gate's options are wrong", unknown)
    steerings = make_steerings(given)
    page = Page.open(given.page)
    if given.mode:
        page.mode = given.mode
    return PageGate(
        page,
        steerings,
        micro_max=given.micro_max,
        max_wait_ns=round(given.max_wait_ms * NS_PER_MS),
        stale_ns=round(given.stale_ms * NS_PER_MS),
        least_threads=given.least_threads,
        cores=given.cores,
        service_threads=given.service_threads,
    )


def make_steerings(given: GateOptions) -> dict[Mode, Callable[[], Steering]]:
    """The steerings a gate may be asked for; InputError for impossible options of one of them."""
    made: dict[Mode, Callable[[], Steering]] = {}
    if given.slo_ms:
        controller = make_controller(given.controller, given.slo_ms, given.margin, given.floor)
        made[Mode.SLO] = lambda: SloSteering(controller, given.window_s)
        made[Mode.SLACK] = lambda: SlackSteering(given.slo_ms, given.micro_max, given.window_s)
    headroom = Headroom(given.low, given.high, given.floor)
    forecaster = make_forecaster(given.forecaster, given.forecast_s, given.history)
    made[Mode.PREDICTIVE] = lambda: PredictiveSteering(forecaster, headroom, given.forecast_s)
    return made
