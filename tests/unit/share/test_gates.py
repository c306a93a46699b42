"""The gate of a trainer: who holds it, how it is freed, what it steers, and that training is unharmed by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from corun.clock import NS_PER_MS, NS_PER_S, now_ns
from corun.errors import InputError
from corun.share.announce import Announcer
from corun.share.brakes import Mode
from corun.share.controllers import Window
from corun.share.gates import GateOptions, PageGate, from_options, make_steerings
from corun.share.page import STALE_AFTER_NS, Knobs, Page
from corun.share.steering import Wish
from corun.testing.flicker import NEVER_STALE_NS, Flicker


class Time:
    """A clock that moves only when the gate sleeps, and what happens meanwhile."""

    def __init__(self) -> None:
        self.now = NS_PER_S
        self.slept: list[int] = []
        self.meanwhile: list[tuple[int, Callable[[], None]]] = []

    def clock(self) -> int:
        return self.now

    def sleep(self, _bell: int, timeout_ns: int) -> None:
        self.slept.append(timeout_ns)
        self.advance(timeout_ns)

    def advance(self, by_ns: int) -> None:
        self.now += by_ns
        for item in [item for item in self.meanwhile if item[0] <= self.now]:
            self.meanwhile.remove(item)
            item[1]()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with Page.create(tmp_path) as made:
        yield made


def _gate(page: Page, time: Time, **options: Any) -> PageGate:
    return PageGate(page, clock=time.clock, sleep=time.sleep, **options)


def test_a_free_trainer_is_never_held(page: Page) -> None:
    """Without a mode and at full duty the gate does nothing, pending requests or not."""
    time = Time()
    gate = _gate(page, time)
    Announcer(page, 0, clock=time.clock, beating=False).on_request()
    for boundary in ("step", "micro", "layer"):
        gate.wait(boundary)
    assert time.slept == []
    assert gate.report()["gate_held"] == 0
    assert gate.report()["gate_stops"] == 3


def test_the_pause_between_two_windows_is_not_paid_back_as_rest(page: Page) -> None:
    """A throttled trainer that waited a minute for its next window starts it at once, and rests for its own work only."""
    time = Time()
    gate = _gate(page, time)
    page.set_knobs(Knobs(duty=0.5))
    gate.wait("step")
    time.advance(60 * NS_PER_S)
    gate.begin()
    gate.wait("step")
    assert time.slept == []
    time.advance(100 * NS_PER_MS)
    gate.wait("step")
    assert sum(time.slept) == pytest.approx(100 * NS_PER_MS, rel=0.01)


def test_a_window_of_observations_begins_with_the_measured_one(page: Page) -> None:
    """What lies before the measured window, load or silence, is not judged in it."""
    time, seen = Time(), []

    class Recording:
        window_s = 1.0
        bound_ms = 0.0
        first = Wish()

        def steer(self, window: Window, micro: int, step_ms: float) -> Wish:
            seen.append(window.length_s)
            return Wish()

    gate = _gate(page, time, steerings={Mode.SLO: Recording})
    page.mode = Mode.SLO
    gate.wait("step")
    time.advance(60 * NS_PER_S)
    gate.begin()
    gate.wait("step")
    assert seen == []
    time.advance(2 * NS_PER_S)
    gate.wait("step")
    assert seen == [2.0]


def test_preempt_waits_for_the_last_reply(page: Page) -> None:
    """The trainer goes on exactly when nothing is pending any more, and the time it was held is counted."""
    time = Time()
    gate = _gate(page, time)
    page.mode = Mode.PREEMPT
    service = Announcer(page, 0, clock=time.clock, beating=False)
    service.on_request()
    service.on_request()
    time.meanwhile = [
        (time.now + 30 * NS_PER_MS, service.on_reply),
        (time.now + 70 * NS_PER_MS, service.on_reply),
    ]
    gate.wait("micro")
    assert time.now >= NS_PER_S + 70 * NS_PER_MS
    assert page.pending(0) == 0
    assert gate.report()["gate_held_ms"] == pytest.approx((time.now - NS_PER_S) / NS_PER_MS)


def test_a_dead_service_holds_the_trainer_for_less_than_a_second(page: Page) -> None:
    """Pending requests of a service that no longer beats are passed over, and counted as stale."""
    time = Time()
    gate = _gate(page, time)
    page.mode = Mode.PREEMPT
    Announcer(page, 0, clock=time.clock, beating=False).on_request()
    gate.wait("micro")
    assert STALE_AFTER_NS <= time.now - NS_PER_S <= NS_PER_S
    gate.wait("micro")
    assert gate.report()["gate_stale"] == 2


def test_max_wait_bounds_one_stop(page: Page) -> None:
    """With max_wait a stop ends although requests are pending; the next stop holds anew."""
    time = Time()
    gate = _gate(page, time, max_wait_ns=5 * NS_PER_MS)
    page.mode = Mode.PREEMPT
    service = Announcer(page, 0, clock=time.clock, beating=False)
    service.on_request()
    for stop in (1, 2):
        gate.wait("micro")
        assert time.now == NS_PER_S + stop * 5 * NS_PER_MS


def test_the_duty_makes_the_trainer_rest(page: Page) -> None:
    """After 30 ms of work at duty 0.25 the trainer rests 90 ms."""
    time = Time()
    gate = _gate(page, time)
    page.set_knobs(Knobs(duty=0.25))
    gate.wait("micro")
    time.advance(30 * NS_PER_MS)
    began = time.now
    gate.wait("micro")
    assert time.now - began == 90 * NS_PER_MS


@pytest.mark.parametrize("setting", ["pending", "resting"])
def test_a_session_can_free_the_trainer(page: Page, setting: str) -> None:
    """When `attend` says so the trainer goes on at once, and that is counted; it is asked every 20 ms or sooner."""
    time = Time()
    gate = _gate(page, time)
    if setting == "pending":
        page.mode = Mode.PREEMPT
        Announcer(page, 0, clock=time.clock, beating=False).on_request()
    else:
        page.set_knobs(Knobs(duty=0.01))
        gate.wait("micro")
        time.advance(50 * NS_PER_MS)
    asked: list[int] = []

    def attend() -> bool:
        asked.append(time.now)
        return len(asked) == 4

    gate.attend = attend
    gate.wait("micro")
    assert len(asked) == 4
    assert all(later - earlier <= 20 * NS_PER_MS for earlier, later in pairwise(asked))
    assert gate.report()["gate_let_go"] == 1


class Recorder:
    """A steering that writes down its windows and wishes what it is told."""

    def __init__(self, wish: Wish, window_s: float = 1.0, bound_ms: float = 0.0) -> None:
        self.window_s = window_s
        self.bound_ms = bound_ms
        self.first = wish
        self.wish = wish
        self.seen: list[tuple[Window, int, float]] = []

    def steer(self, window: Window, micro: int, step_ms: float) -> Wish:
        self.seen.append((window, micro, step_ms))
        return self.wish


def test_a_window_tells_what_happened_in_it(page: Page) -> None:
    """A steering gets each window once: its replies, those over its bound, arrivals, p99, and how long a micro-step took."""
    time, recorder = Time(), Recorder(Wish(effort=1.0), bound_ms=6.0)
    gate = _gate(page, time, steerings={Mode.SLO: lambda: recorder}, micro_max=8)
    page.mode = Mode.SLO
    service = Announcer(page, 0, clock=time.clock, beating=False)
    gate.wait("step")
    for latency_ms in (5, 7, 9):
        service.on_request()
        service.on_reply(latency_ms * NS_PER_MS)
    service.on_request()
    for _ in range(26):
        gate.wait("step")
        gate.wait("micro")
        time.advance(40 * NS_PER_MS)
    (window, micro, step_ms), *rest = recorder.seen
    assert rest == []
    assert (window.replies, window.over, window.arrivals, window.p99_ms, micro) == (3, 2, 4, 9.0, 1)
    assert window.length_s >= 1.0
    assert step_ms == pytest.approx(40.0)
    assert page.last_p99_ns == 9 * NS_PER_MS


def test_the_most_careful_wish_counts(page: Page) -> None:
    """Of two steerings the smaller effort sets the knobs, on top of the micro-steps that slack allows."""
    time = Time()
    wishes = {Mode.SLO: Wish(effort=0.25), Mode.PREDICTIVE: Wish(effort=0.9), Mode.SLACK: Wish(micro=3)}
    steerings = {bit: (lambda wish=wish: Recorder(wish)) for bit, wish in wishes.items()}
    gate = _gate(page, time, steerings=steerings, micro_max=12)
    page.set_knobs(Knobs(threads=2))
    page.mode = sum(wishes)
    gate.wait("step")
    assert page.knobs == Knobs(12, 0.5, 2)
    page.mode = Mode.SLACK
    gate.wait("step")
    assert page.knobs.micro == 3


def test_threads_follow_the_requests_in_the_queue(page: Page) -> None:
    """A thread less for each that a pending request's service computes with, never below one, and back afterwards."""
    time = Time()
    gate = _gate(page, time, cores=4, service_threads=(1, 2, 8))
    services = [Announcer(page, slot, clock=time.clock, beating=False) for slot in range(3)]
    page.set_knobs(Knobs(threads=3))
    page.mode = Mode.ELASTIC
    seen = []
    for service in services:
        service.on_request()
        gate.wait("layer")
        seen.append(gate.knobs().threads)
    assert seen == [3, 1, 1]
    services[2].on_reply()
    services[0].on_reply()
    assert gate.knobs().threads == 2
    assert page.knobs.threads == 3
    time.advance(STALE_AFTER_NS + 1)
    assert gate.knobs().threads == 3
    assert time.slept == []
    page.mode = Mode.FREE
    services[0].on_request()
    assert gate.knobs().threads == 3


def test_feedback_takes_threads_before_it_takes_time(page: Page) -> None:
    """Half the effort of a trainer of four threads is two of them, at full duty."""
    time = Time()
    gate = _gate(page, time, steerings={Mode.SLO: lambda: Recorder(Wish(effort=0.5))}, least_threads=1)
    page.set_knobs(Knobs(threads=4))
    page.mode = Mode.SLO
    gate.wait("step")
    assert gate.knobs() == Knobs(threads=2)


def test_a_mode_that_was_on_before_goes_on_where_it_was(page: Page) -> None:
    """Controllers keep what they learned over arms without them; no window spans the pause."""
    time, made = Time(), []

    def make() -> Recorder:
        made.append(Recorder(Wish(effort=0.5), window_s=0.05))
        return made[-1]

    gate = _gate(page, time, steerings={Mode.SLO: make}, micro_max=4)
    service = Announcer(page, 0, clock=time.clock, beating=False)
    for arm in (0, Mode.SLO, 0, Mode.SLO):
        page.set_knobs(Knobs())
        page.mode = arm
        for _ in range(4):
            gate.wait("step")
            time.advance(20 * NS_PER_MS)
            service.on_request()
            service.on_reply()
        assert page.knobs.micro == (4 if arm else 1)
    (recorder,) = made
    assert [window.arrivals for window, _, _ in recorder.seen] == [3, 3]
    assert all(window.length_s < 0.1 for window, _, _ in recorder.seen)


def test_options_build_a_gate_that_works(page: Page) -> None:
    """`--gate-options` of every policy give a gate on the page it names; numbers and names are checked."""
    options = {"page": str(page.path), "mode": int(Mode.PREEMPT), "slo_ms": 50, "micro_max": 8, "max_wait_ms": 3}
    gate = from_options(options)
    assert page.mode == Mode.PREEMPT
    gate.wait("step")
    gate.close()
    bad: list[dict[str, Any]] = [
        {},
        {"page": "/nowhere"},
        {**options, "slo": 5},
        {**options, "slo_ms": "fast"},
        {**options, "controller": "pid"},
        {**options, "forecaster": "oracle"},
        {**options, "low": 0.9},
    ]
    for given in bad:
        with pytest.raises(InputError):
            from_options(given)


def test_steerings_exist_for_what_has_a_bound() -> None:
    """Without a bound there is nothing to steer by but the forecast."""
    assert set(make_steerings(GateOptions("x"))) == {Mode.PREDICTIVE}
    assert set(make_steerings(GateOptions("x", slo_ms=10))) == {Mode.SLO, Mode.SLACK, Mode.PREDICTIVE}


def test_no_micro_step_starts_while_a_request_is_pending(page: Page) -> None:
    """With real threads and the real clock: no stamp of a start lies between a request's arrival and its reply."""
    page.mode = Mode.PREEMPT
    gate, starts, give_up_ns = PageGate(page, stale_ns=NEVER_STALE_NS), [], now_ns() + 60 * NS_PER_S
    with Flicker(page) as service:
        while len(starts) < 60 or gate.report()["gate_held"] <= 10:
            assert now_ns() < give_up_ns
            asked = now_ns()
            gate.wait("micro")
            starts.append((asked, now_ns()))
            time.sleep(0.001)
    requests = service.times
    assert len(requests) > 5
    for asked, released in starts:
        for arrived, answered in requests:
            if arrived < asked < answered:
                assert released >= answered


def _train(gate: PageGate | None, steps: int = 25, micro: int = 4, layers: bool = False) -> torch.Tensor:
    """Weights of a small convolutional network with BatchNorm after some steps with stops between the parts."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(inplace=True),
        torch.nn.Flatten(),
        torch.nn.Linear(288, 4),
    )
    if gate and layers:
        for layer in module:
            layer.register_forward_pre_hook(lambda *_: gate.wait("layer"))
    optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        images, labels = torch.randn(16, 1, 8, 8), torch.randint(0, 4, (16,))
        optimizer.zero_grad()
        for part in range(micro):
            if gate:
                gate.wait("micro")
            rows = slice(4 * part, 4 * part + 4)
            loss = torch.nn.functional.cross_entropy(module(images[rows]), labels[rows]) / micro
            loss.backward()
        optimizer.step()
    return torch.cat([value.detach().double().flatten() for value in module.state_dict().values()])


@pytest.mark.parametrize("layers", [False, True])
def test_training_under_preemption_is_bit_identical(page: Page, layers: bool) -> None:
    """Weights after training that was held again and again are those of training that never was."""
    page.mode = Mode.PREEMPT
    gate = PageGate(page, stale_ns=NEVER_STALE_NS)
    with Flicker(page):
        held = _train(gate, layers=layers)
    assert gate.report()["gate_held"] > 0
    assert torch.equal(held, _train(None))
