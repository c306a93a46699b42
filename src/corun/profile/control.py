"""The profiler's conversation with the launcher, held while it waits for the next tick.

    HELLO ▶   ARM(arm, repeat, start_at, stop_at) ◀ ready   START   ── ticks ──   DRAIN ◀ counts   …   STOP

It samples all the time; ARM only says which arm the rows of a window belong to. One thread: the wait for the
next deadline is also the wait for a message.
"""

from __future__ import annotations

import dataclasses
import os
import select
import socket
from collections.abc import Callable

from corun import __version__
from corun.clock import NS_PER_S, now_ns
from corun.errors import WireError
from corun.process import StopSignal
from corun.profile.sampler import IDLE, SamplerStatistics, Window
from corun.profile.source import Row
from corun.wire.channel import Channel, answer_clock
from corun.wire.frames import RequestHeader
from corun.wire.messages import Arm, Clock, Drain, Hello, Message, Start, Stats, Stop


class Control:
    """Answers the launcher and knows which window a moment belongs to."""

    def __init__(self, channel: Channel, statistics: Callable[[], SamplerStatistics]) -> None:
        self._channel = channel
        self._statistics = statistics
        self._window: Window | None = None
        self.ended = ""

    def hello(self, info: dict[str, object]) -> None:
        """Say who this is; PeerClosed when the launcher has gone."""
        self._channel.introduce(
            Hello(
                role="profiler",
                name="profiler",
                pid=os.getpid(),
                version=__version__,
                clock_ns=now_ns(),
                host=socket.gethostname(),
                info=info,
            )
        )

    def fileno(self) -> int:
        return self._channel.fileno()

    def segment_at(self, t_ns: int) -> Row:
        """The arm, repeat and segment cells at a moment."""
        return self._window.cells(t_ns) if self._window else IDLE

    def answer(self) -> bool:
        """Answer what has arrived; False once the launcher said STOP or went away."""
        try:
            while received := self._channel.receive(0.0):
                if not self._handle(*received, now_ns()):
                    self.ended = "told to stop"
                    return False
        except WireError as error:
            self.ended = f"lost the launcher: {error}"
            return False
        return True

    def _handle(self, header: RequestHeader, message: Message, received_ns: int) -> bool:
        match message:
            case Arm():
                self._window = Window(
                    message.arm, message.repeat, message.segment, message.start_at_ns, message.stop_at_ns
                )
                self._channel.reply(header, {"ready": True})
            case Start():
                self._channel.reply(header)
            case Stats():
                self._channel.reply(header, self._counts())
            case Drain():
                self._window = None
                self._channel.reply(header, self._counts())
            case Clock():
                answer_clock(self._channel, header, received_ns)
            case Stop():
                self._channel.reply(header, self._counts())
                return False
            case _:
                self._channel.fail(header, f"a profiler does not answer {type(message).__name__}")
        return True

    def _counts(self) -> dict[str, object]:
        return dataclasses.asdict(self._statistics())


def waiter(stop: StopSignal, control: Control | None) -> Callable[[int], bool]:
    """`wait_until(deadline_ns)`: True at the deadline, False when it is time to stop."""
    readable = [stop.fileno(), *([control.fileno()] if control else [])]

    def wait_until(deadline_ns: int) -> bool:
        while not stop.requested:
            if control and not control.answer():
                return False
            remaining_ns = deadline_ns - now_ns()
            if remaining_ns <= 0:
                return True
            select.select(readable, [], [], remaining_ns / NS_PER_S)
        return False

    return wait_until
