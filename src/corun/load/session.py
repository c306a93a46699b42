"""A client under a launcher: HELLO, then segments by ARM, START, DRAIN until STOP; and a client run by hand.

    HELLO ▶   ARM(start_at, stop_at, first, last) ◀ ready   START ── requests ──   DRAIN ◀ counts   …   STOP

While a segment runs the control socket is one more descriptor of the sender's wait: STATS is answered between
two requests, DRAIN sets the time by which the outstanding replies must be here. rows first..last-1 are positions
among the rows of this client's stream in the schedule file.
"""

from __future__ import annotations

import os
import select
import socket
from dataclasses import dataclass
from typing import Any

from corun import __version__
from corun.arrivals import Schedule
from corun.clock import NS_PER_MS, NS_PER_S, now_ns
from corun.errors import CorunError, PeerClosed, RunFault
from corun.load.client import Client
from corun.load.work import Counts, Progress
from corun.process import StopSignal
from corun.wire.channel import Channel, answer_clock
from corun.wire.frames import RequestHeader
from corun.wire.messages import Arm, Clock, Drain, Hello, Message, Start, Stats, Stop

START_AHEAD_S = (0.2, 1.0, 5.0)
LAST_WORDS_S = 5.0


class StopWatch:
    """A stop signal during a segment: nothing new is sent, outstanding replies are waited for."""

    def __init__(self, stop: StopSignal, drain_timeout_s: float) -> None:
        self._stop = stop
        self._patience_ns = round(drain_timeout_s * NS_PER_S)

    def fileno(self) -> int:
        return self._stop.fileno()

    def attend(self, progress: Progress) -> int | None:
        return now_ns() + self._patience_ns


def run_by_hand(client: Client, schedule: Schedule, duration_s: float, stop: StopSignal) -> tuple[Counts, float]:
    """One segment, armed by itself; returns the counts and the seconds from its start to its last reply."""
    start_at = _arm_by_hand(client, schedule, duration_s)
    counts = client.run([StopWatch(stop, client.options.drain_timeout_s)])
    elapsed_s = (now_ns() - start_at) / NS_PER_S
    client.finish()
    return counts, elapsed_s


def _arm_by_hand(client: Client, schedule: Schedule, duration_s: float) -> int:
    """Arm for an instant that is still ahead when everything is ready; returns it."""
    for ahead_s in START_AHEAD_S:
        start_at = now_ns() + round(ahead_s * NS_PER_S)
        stop_at = start_at + round(duration_s * NS_PER_S)
        client.arm(Arm("alone", 0, 0, start_at, stop_at, 0, len(schedule)), schedule.rows)
        if now_ns() < start_at:
            return start_at
    raise RunFault(f"the client was not ready within {START_AHEAD_S[-1]:g} s; the machine is overloaded")


@dataclass
class _Armed:
    """A segment that was armed: ran, then answered with its counts."""

    arm: Arm
    counts: Counts | None = None


class Session:
    """Answers the launcher; `run` returns when it says STOP or goes away, or on a stop signal."""

    def __init__(self, client: Client, schedule: Schedule, channel: Channel, stop: StopSignal) -> None:
        self._client = client
        self._rows = schedule.of_stream(client.options.stream).rows
        self._channel = channel
        self._stop = stop
        self._armed: _Armed | None = None
        self._drain: RequestHeader | None = None
        self._finish_by: int | None = None
        self._over = False
        self._start = False

    def run(self) -> None:
        """Say HELLO and serve until the end."""
        self._channel.introduce(self._hello())
        while not self._over:
            self._answer()
            if self._start:
                self._run_segment()
            elif not self._over:
                self._wait()

    def _hello(self) -> Hello:
        options, target = self._client.options, self._client.target
        return Hello(
            role="client",
            name=options.service,
            pid=os.getpid(),
            version=__version__,
            model=target.model,
            device=target.device,
            clock_ns=now_ns(),
            host=socket.gethostname(),
            info={"stream": options.stream, "timing": self._client.timing.as_dict()},
        )

    def _wait(self) -> None:
        """Until the launcher says something; after a stop signal it has LAST_WORDS_S to drain us."""
        if not self._stop.requested:
            select.select([self._channel.fileno(), self._stop.fileno()], [], [])
        elif self._armed is None or not select.select([self._channel.fileno()], [], [], LAST_WORDS_S)[0]:
            self._over = True

    def _answer(self) -> None:
        """Answer everything that has arrived."""
        while not self._over:
            try:
                received = self._channel.receive(0.0)
                if received is None:
                    return
                self._handle(*received, now_ns())
            except PeerClosed:
                self._over = True

    # While a segment runs: corun.load.work.Watch

    def fileno(self) -> int:
        return self._channel.fileno()

    def attend(self, progress: Progress) -> int | None:
        """The launcher spoke during the segment; the time to be done by, once it wants the segment's end."""
        self._finish_by = None
        self._answer()
        return now_ns() if self._over else self._finish_by

    def _handle(self, header: RequestHeader, message: Message, received_ns: int) -> None:
        match message:
            case Arm() if not self._start:
                self._arm(header, message)
            case Start() if self._armed and not self._start:
                self._start = True
                self._channel.reply(header)
            case Stats():
                progress = self._client.progress()
                self._channel.reply(header, progress.as_dict() if progress else {})
            case Drain():
                self._on_drain(header, message)
            case Clock():
                answer_clock(self._channel, header, received_ns)
            case Stop():
                self._over = True
                self._channel.reply(header)
            case _:
                self._channel.fail(header, f"a client does not answer {type(message).__name__} now")

    def _arm(self, header: RequestHeader, arm: Arm) -> None:
        try:
            self._client.arm(arm, self._rows[arm.first : arm.last])
        except CorunError as error:
            self._armed = None
            self._channel.fail(header, str(error))
            return
        self._armed = _Armed(arm)
        self._channel.reply(header, {"ready": True, "scheduled": arm.last - arm.first})

    def _on_drain(self, header: RequestHeader, drain: Drain) -> None:
        if self._start:
            self._drain = header
            self._finish_by = now_ns() + drain.timeout_ms * NS_PER_MS
        elif self._armed is None:
            self._channel.fail(header, "no segment is armed")
        else:
            self._report(header)

    def _run_segment(self) -> None:
        armed = self._armed
        assert armed is not None
        armed.counts = self._client.run([self, StopWatch(self._stop, self._client.options.drain_timeout_s)])
        self._start = False
        if self._drain is not None:
            self._report(self._drain)
            self._drain = None
        elif self._over:
            self._client.finish()

    def _report(self, header: RequestHeader) -> None:
        """The counts of the segment; one that never got its START has none."""
        armed, self._armed = self._armed, None
        assert armed is not None
        body: dict[str, Any] = self._client.finish() if armed.counts else Counts(0, 0, 0, 0, 0).as_dict()
        self._channel.reply(header, body)
