"""A worker under a launcher: it works inside armed windows, step by step, and rests outside of them.

    HELLO ▶   ARM(start_at, stop_at) ◀ ready   START   ── steps ──   DRAIN ◀ counts   …   STOP

One thread. Between two steps the control socket is looked at without waiting, so an answer comes within one step;
outside a window the worker sleeps until the launcher speaks, the window begins or a stop signal comes. A step that
runs over the window's end is finished: whoever summarises decides what of it counts.
"""

from __future__ import annotations

import select
from typing import Any, Protocol

from corun.clock import NS_PER_S, now_ns
from corun.errors import CorunError, WireError
from corun.wire.channel import Channel, answer_clock
from corun.wire.frames import RequestHeader
from corun.wire.messages import Arm, Clock, Drain, Hello, Message, Start, Stats, Stop


class StopRequest(Protocol):
    """What asks a worker to finish: corun.process.StopSignal."""

    requested: bool

    def fileno(self) -> int: ...


class Work(Protocol):
    """What is done in a window."""

    def arm(self, arm: Arm) -> dict[str, Any]:
        """Prepare one window; the body of the answer. A CorunError refuses it with its sentence."""

    def step(self) -> bool:
        """One unit of work; False when there is nothing left to do in this window."""

    def counts(self) -> dict[str, Any]:
        """Counters of the window: the body of STATS, DRAIN and STOP."""


class Session:
    """Does `work` when told to; `run` returns when the launcher says STOP or goes away, or on a stop signal.

    ended: why it returned, as a sentence.
    """

    def __init__(self, channel: Channel, hello: Hello, work: Work, stop: StopRequest) -> None:
        self._channel = channel
        self._hello = hello
        self._work = work
        self._stop = stop
        self._armed: Arm | None = None
        self._running = False
        self.ended = ""

    def run(self) -> None:
        """Say HELLO and serve until the end; PeerClosed when nobody answers the HELLO."""
        self._channel.introduce(self._hello)
        while self._goes_on():
            if self._due():
                self._run_window()
            else:
                self._rest()

    def _goes_on(self) -> bool:
        """Answer what has arrived; False once it is over."""
        if self._stop.requested:
            self.ended = self.ended or "stopped by a signal"
        try:
            while not self.ended and (received := self._channel.receive(0.0)):
                self._handle(*received, now_ns())
        except WireError as error:
            self.ended = f"lost the launcher: {error}"
        return not self.ended

    def _due(self) -> bool:
        return self._running and self._armed is not None and now_ns() >= self._armed.start_at_ns

    def _rest(self) -> None:
        """Until somebody speaks or the window begins."""
        timeout_s = None
        if self._running and self._armed is not None:
            timeout_s = max(0.0, (self._armed.start_at_ns - now_ns()) / NS_PER_S)
        select.select([self._channel.fileno(), self._stop.fileno()], [], [], timeout_s)

    def _run_window(self) -> None:
        """Steps until the window ends, there is nothing left, or the launcher says otherwise."""
        window = self._armed
        while window is not None and self._armed is window and self._running and now_ns() < window.stop_at_ns:
            if not self._work.step() or not self._goes_on():
                break
        if self._armed is window:
            self._running = False

    def _handle(self, header: RequestHeader, message: Message, received_ns: int) -> None:
        match message:
            case Arm():
                self._arm(header, message)
            case Start():
                self._start(header, message)
            case Stats():
                self._channel.reply(header, self._work.counts())
            case Drain():
                self._running = False
                self._channel.reply(header, self._work.counts())
            case Clock():
                answer_clock(self._channel, header, received_ns)
            case Stop():
                self.ended = "told to stop"
                self._channel.reply(header, self._work.counts())
            case _:
                self._channel.fail(header, f"a {self._hello.role} does not answer {type(message).__name__}")

    def _arm(self, header: RequestHeader, arm: Arm) -> None:
        self._armed, self._running = None, False
        try:
            body = self._work.arm(arm)
        except CorunError as error:
            self._channel.fail(header, str(error))
            return
        self._armed = arm
        self._channel.reply(header, {"ready": True, **body})

    def _start(self, header: RequestHeader, start: Start) -> None:
        if self._armed is None or self._armed.segment != start.segment:
            armed = "none is" if self._armed is None else f"{self._armed.segment} is"
            self._channel.fail(header, f"segment {start.segment} is not armed; {armed}")
            return
        self._running = True
        self._channel.reply(header)


def run_alone(work: Work, arm: str, duration_s: float, stop: StopRequest) -> dict[str, Any]:
    """One window of `duration_s` from now on, armed by itself; returns its counts."""
    start_ns = now_ns()
    window = Arm(arm, 0, 0, start_ns, start_ns + round(duration_s * NS_PER_S))
    work.arm(window)
    while not stop.requested and now_ns() < window.stop_at_ns and work.step():
        pass
    return work.counts()
