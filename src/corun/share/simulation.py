"""A simulated device in virtual time, so that GPU policies and controllers are tested without a GPU.

The device runs kernels of given lengths from in-order streams. How streams share it is one of three ways::

    kernels   one kernel at a time, never interrupted; at its end the stream of the highest priority goes on,
              among equals the kernel submitted first                       (streams of one process)
    slices    the streams take turns of a quantum; a kernel is paused at its end     (processes without MPS)
    shares    streams run side by side, each at its share of the SMs; shares that add up to more than the
              device are scaled down while all are busy                     (MPS, MIG, green contexts)

Services are event-driven; the trainer is the ordinary program it is in reality, with the real gate, page and
announcers on a virtual clock: whenever it waits, the simulation advances. The sole sources of time are the lengths
given and the arrivals.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from corun.clock import NS_PER_MS, NS_PER_S
from corun.share.announce import Announcer
from corun.share.gates import PageGate
from corun.share.page import Page

How = Literal["kernels", "slices", "shares"]
QUANTUM_NS: Final = 2 * NS_PER_MS
_EPSILON: Final = 1e-6


class Timeline:
    """Events in virtual ns. `advance` runs what is due, in order of time and then of arrangement."""

    def __init__(self) -> None:
        self.now_ns = 0
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, when_ns: int, act: Callable[[], None]) -> None:
        """Arrange something; an instant in the past is now."""
        heapq.heappush(self._events, (max(when_ns, self.now_ns), next(self._numbers), act))

    def advance(self, until_ns: int, stop: Callable[[], bool] | None = None) -> None:
        """Go on to `until_ns`, or to the event after which `stop` holds; nothing happens when it holds already."""
        if stop and stop():
            return
        while self._events and self._events[0][0] <= until_ns:
            when, _, act = heapq.heappop(self._events)
            self.now_ns = when
            act()
            if stop and stop():
                return
        self.now_ns = max(self.now_ns, until_ns)

    def clock(self) -> int:
        return self.now_ns


@dataclass
class Kernel:
    """work_ns: what is left of it at full speed. done is called at its end."""

    work_ns: float
    number: int
    done: Callable[[], None] | None = None


class Stream:
    """Kernels in order; made by `Device.stream`. priority: lower goes first, as in CUDA. share: of the SMs."""

    def __init__(self, device: Device, name: str, priority: int, share: float) -> None:
        self.name = name
        self.priority = priority
        self.share = share
        self.busy_ns = 0.0
        self.queue: deque[Kernel] = deque()
        self._device = device

    def submit(self, lengths_ns: Sequence[int], done: Callable[[], None] | None = None) -> None:
        """Queue kernels without waiting; `done` is called when the last of them has ended."""
        last = len(lengths_ns) - 1
        self._device.change(lambda: self._append(lengths_ns, last, done))

    def _append(self, lengths_ns: Sequence[int], last: int, done: Callable[[], None] | None) -> None:
        for index, length in enumerate(lengths_ns):
            self.queue.append(Kernel(max(1, length), next(self._device.numbers), done if index == last else None))


class Device:
    """Runs streams on a timeline."""

    def __init__(self, timeline: Timeline, how: How = "kernels", quantum_ns: int = QUANTUM_NS) -> None:
        self._timeline = timeline
        self._how = how
        self._quantum_ns = quantum_ns
        self._streams: list[Stream] = []
        self._running: dict[Stream, float] = {}
        self._since_ns = 0
        self._turn: Stream | None = None
        self._turn_ends_ns = 0
        self._version = 0
        self.numbers = itertools.count()

    def stream(self, name: str, priority: int = 0, share: float = 1.0) -> Stream:
        """A new stream."""
        self._streams.append(Stream(self, name, priority, share))
        return self._streams[-1]

    def change(self, act: Callable[[], None]) -> None:
        """Account for what ran so far, let `act` change the queues, and decide anew what runs."""
        self._account()
        act()
        self._decide()

    def _account(self) -> None:
        """Reduce running kernels by what they did since the last time; retire those that ended."""
        now = self._timeline.now_ns
        elapsed = now - self._since_ns
        self._since_ns = now
        ended = []
        for stream, rate in self._running.items():
            kernel = stream.queue[0]
            kernel.work_ns -= elapsed * rate
            stream.busy_ns += elapsed * rate
            if kernel.work_ns <= _EPSILON:
                ended.append(stream)
        for stream in ended:
            kernel = stream.queue.popleft()
            del self._running[stream]
            if kernel.done:
                self._timeline.at(now, kernel.done)

    def _decide(self) -> None:
        waiting = [stream for stream in self._streams if stream.queue]
        choose = {"kernels": self._kernels, "slices": self._slices, "shares": self._shares}[self._how]
        self._running = choose(waiting)
        self._version += 1
        if not self._running:
            return
        version, now = self._version, self._timeline.now_ns
        ends = min(stream.queue[0].work_ns / rate for stream, rate in self._running.items())
        next_ns = now + max(1, -int(-ends // 1))
        if self._how == "slices" and len(waiting) > 1:
            next_ns = min(next_ns, max(now + 1, self._turn_ends_ns))
        self._timeline.at(next_ns, lambda: self._tick(version))

    def _tick(self, version: int) -> None:
        if version == self._version:
            self.change(lambda: None)

    def _kernels(self, waiting: list[Stream]) -> dict[Stream, float]:
        if self._running or not waiting:
            return self._running
        return {min(waiting, key=lambda stream: (stream.priority, stream.queue[0].number)): 1.0}

    def _slices(self, waiting: list[Stream]) -> dict[Stream, float]:
        now, turn = self._timeline.now_ns, self._turn
        if not waiting:
            return {}
        if turn not in waiting or (now >= self._turn_ends_ns and len(waiting) > 1):
            last = self._streams.index(turn) if turn else -1
            count = len(self._streams)
            turn = min(waiting, key=lambda stream: (self._streams.index(stream) - last - 1) % count)
            self._turn, self._turn_ends_ns = turn, now + self._quantum_ns
        assert turn is not None
        return {turn: 1.0}

    def _shares(self, waiting: list[Stream]) -> dict[Stream, float]:
        total = max(1.0, sum(stream.share for stream in waiting))
        return {stream: stream.share / total for stream in waiting}


@dataclass(frozen=True)
class Load:
    """One service's requests: arrival instants and service times at full speed, ns, and kernels a request has."""

    arrivals_ns: Sequence[int]
    service_ns: Sequence[int]
    kernels: int = 7


class SimulatedService:
    """First come, first served, one request on the device at a time; sojourns in order of completion."""

    def __init__(self, timeline: Timeline, stream: Stream, load: Load, announcer: Announcer | None = None) -> None:
        self._timeline = timeline
        self._stream = stream
        self._kernels = load.kernels
        self._announcer = announcer
        self._waiting: deque[tuple[int, int]] = deque()
        self._serving = False
        self.ends_ns: list[int] = []
        self.sojourns_ns: list[int] = []
        for arrival, service in zip(load.arrivals_ns, load.service_ns, strict=True):
            timeline.at(arrival, lambda pair=(arrival, service): self._arrive(pair))  # type: ignore[misc]

    def _arrive(self, request: tuple[int, int]) -> None:
        if self._announcer:
            self._announcer.on_request()
        self._waiting.append(request)
        if not self._serving:
            self._next()

    def _next(self) -> None:
        self._serving = bool(self._waiting)
        if self._serving:
            arrival, service = self._waiting.popleft()
            self._stream.submit(cut(service, self._kernels), lambda: self._reply(arrival))

    def _reply(self, arrival_ns: int) -> None:
        now = self._timeline.now_ns
        self.ends_ns.append(now)
        self.sojourns_ns.append(now - arrival_ns)
        if self._announcer:
            self._announcer.on_reply(now - arrival_ns)
        self._next()


def cut(length_ns: int, parts: int) -> list[int]:
    """A length as `parts` nearly equal lengths with the same sum."""
    size, larger = divmod(length_ns, parts)
    return [size + 1] * larger + [size] * (parts - larger)


@dataclass(frozen=True)
class TrainingCost:
    """Length of a micro-step by its samples, interpolated between (samples, ms) points, ascending.

    The default is measured: a 6-convolution network, batch 64, on two cores (full step 120 ms; cut into 4, 8 and
    16 it ran at 1.10, 1.00 and 0.83 of that speed). resume_ms: what the first micro-step after a pause takes longer.
    kernels: of one micro-step.
    """

    points: tuple[tuple[int, float], ...] = ((4, 9.04), (8, 15.0), (16, 27.3), (64, 120.0))
    resume_ms: float = 0.5
    kernels: int = 18

    def micro_ms(self, samples: int) -> float:
        """Milliseconds of a micro-step; beyond the points the nearest two are extended."""
        points = self.points
        index = next((i for i, (size, _) in enumerate(points[1:-1], 1) if samples <= size), len(points) - 1)
        (left, left_ms), (right, right_ms) = points[index - 1], points[index]
        return left_ms + (samples - left) * (right_ms - left_ms) / (right - left)


@dataclass
class SimulatedTrainer:
    """Steps of `batch` samples on a stream until the timeline reaches an end, through a real gate.

    run_ahead: micro-steps in flight at most. done: (instant, samples) of each finished micro-step. starts: instant
    and pending flag at which each was issued.
    """

    timeline: Timeline
    stream: Stream
    gate: PageGate | None = None
    batch: int = 64
    cost: TrainingCost = field(default_factory=TrainingCost)
    run_ahead: int = 1
    done: list[tuple[int, int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    _in_flight: int = 0

    def run(self, until_ns: int) -> None:
        """Train until then; what is in flight at that instant is not counted."""
        while self.timeline.now_ns < until_ns:
            self._step(until_ns)

    def _step(self, until_ns: int) -> None:
        self._stop_at("step")
        micro = self.gate.knobs().micro if self.gate else 1
        for samples in cut(self.batch, min(micro, self.batch)):
            resumed = self._stop_at("micro")
            if self.timeline.now_ns >= until_ns:
                return
            self._issue(samples, resumed)
            self.timeline.advance(until_ns, lambda: self._in_flight < self.run_ahead)

    def _stop_at(self, boundary: str) -> bool:
        """Stand at the gate; True when the trainer was held there."""
        before = self.timeline.now_ns
        if self.gate:
            self.gate.wait(boundary)
        return self.timeline.now_ns > before

    def _issue(self, samples: int, resumed: bool) -> None:
        length_ms = self.cost.micro_ms(samples) + (self.cost.resume_ms if resumed else 0.0)
        self._in_flight += 1
        self.starts.append(self.timeline.now_ns)
        self.stream.submit(cut(round(length_ms * NS_PER_MS), self.cost.kernels), lambda: self._finish(samples))

    def _finish(self, samples: int) -> None:
        self._in_flight -= 1
        self.done.append((self.timeline.now_ns, samples))

    def samples_between(self, begin_ns: int, end_ns: int) -> int:
        """Samples of micro-steps that ended in [begin, end)."""
        return sum(samples for at_ns, samples in self.done if begin_ns <= at_ns < end_ns)

    def rate(self, begin_ns: int, end_ns: int) -> float:
        """Samples/s of micro-steps that ended in [begin, end)."""
        return self.samples_between(begin_ns, end_ns) * NS_PER_S / (end_ns - begin_ns)


def sleep_on(timeline: Timeline, page: Page) -> Callable[[int, int], None]:
    """How a gate sleeps in virtual time: until the bell is rung or the time is over."""
    return lambda bell, timeout_ns: timeline.advance(timeline.now_ns + timeout_ns, lambda: page.rung(bell))
