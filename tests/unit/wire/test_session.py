"""The conversation of a worker with its launcher: windows, refusals, and every way it can end."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from corun.clock import NS_PER_MS, now_ns
from corun.errors import InputError, PeerClosed, RunFault
from corun.process import StopSignal
from corun.wire import session as sessions
from corun.wire.channel import Channel
from corun.wire.messages import Arm, Clock, Drain, Hello, Load, Start, Stats, Stop, Warmup
from corun.wire.session import Session, run_alone

HELLO = Hello(role="worker", name="w", pid=1)
ANSWER_S = 60.0


class FakeClock:
    """The clock of a session: ahead of the machine's when a test says so. `last` is what it was last told."""

    def __init__(self) -> None:
        self.ahead_ns = self.last = 0

    def __call__(self) -> int:
        self.last = now_ns() + self.ahead_ns
        return self.last


@dataclass
class Fake:
    """Work that counts its steps and notes when the session decided for each."""

    limit: int = 1 << 60
    refuses: str = ""
    arms: list[Arm] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    clock: FakeClock = field(default_factory=FakeClock)

    def arm(self, arm: Arm) -> dict[str, Any]:
        if self.refuses:
            raise InputError(self.refuses)
        self.arms.append(arm)
        self.steps.clear()
        return {"prepared": arm.segment}

    def step(self) -> bool:
        self.steps.append(self.clock.last)
        time.sleep(0.001)
        return len(self.steps) < self.limit

    def counts(self) -> dict[str, Any]:
        return {"steps": len(self.steps)}


@dataclass
class Worker:
    """A session that runs in a thread, and the launcher's end of its channel."""

    channel: Channel
    work: Fake
    stop: StopSignal
    session: Session
    thread: threading.Thread

    def arm(self, segment: int = 0, ahead_ms: int = 5, length_ms: int = 40) -> dict[str, Any]:
        start = now_ns() + ahead_ms * NS_PER_MS
        return self.channel.request(Arm("corun", 0, segment, start, start + length_ms * NS_PER_MS), ANSWER_S)

    def wait_for_steps(self, count: int) -> None:
        """Until STATS says so many."""
        while self.channel.request(Stats(), ANSWER_S)["steps"] < count:
            time.sleep(0.001)

    def window(self, segment: int = 0, steps: int = 1) -> dict[str, Any]:
        """A whole window, drained when it has made so many steps."""
        self.arm(segment, length_ms=60_000)
        self.channel.request(Start(segment), ANSWER_S)
        self.wait_for_steps(steps)
        return self.channel.request(Drain(), ANSWER_S)

    def ended(self) -> str:
        self.thread.join(ANSWER_S)
        assert not self.thread.is_alive()
        return self.session.ended


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Worker]]:
    """Make workers, with one clock; all of them are ended after the test."""
    made: list[Worker] = []
    clock = FakeClock()
    monkeypatch.setattr(sessions, "now_ns", clock)
    far_ends: list[socket.socket] = []

    def make(**settings: Any) -> Worker:
        ours, theirs = socket.socketpair()
        far_ends.append(theirs)
        work, stop = Fake(clock=clock, **settings), StopSignal()
        session = Session(Channel(theirs), HELLO, work, stop)
        thread = threading.Thread(target=session.run, daemon=True)
        thread.start()
        channel = Channel(ours)
        received = channel.receive(ANSWER_S)
        assert received
        assert received[1] == HELLO
        channel.reply(received[0])
        made.append(Worker(channel, work, stop, session, thread))
        return made[-1]

    yield make
    for one in made:
        one.channel.close()
        one.thread.join(ANSWER_S)
    for far_end in far_ends:
        far_end.close()


def test_it_works_inside_the_window_only(worker: Callable[..., Worker]) -> None:
    """No step begins before start_at or at stop_at and later; DRAIN answers with the window's counts."""
    one = worker()
    one.arm(3, length_ms=60_000)
    one.channel.request(Start(3), ANSWER_S)
    one.wait_for_steps(3)
    (arm,) = one.work.arms
    one.work.clock.ahead_ns = 60_000 * NS_PER_MS
    while one.work.clock.last < arm.stop_at_ns:
        time.sleep(0.001)
    body = one.channel.request(Drain(), ANSWER_S)
    assert body["steps"] == len(one.work.steps) >= 3
    assert all(arm.start_at_ns <= began < arm.stop_at_ns for began in one.work.steps)


def test_windows_follow_each_other(worker: Callable[..., Worker]) -> None:
    """Each ARM begins a new window; the same session lives through all of them."""
    one = worker()
    assert all(one.window(segment)["steps"] > 0 for segment in range(3))
    assert [arm.segment for arm in one.work.arms] == [0, 1, 2]


def test_arm_alone_starts_nothing(worker: Callable[..., Worker]) -> None:
    """Without START the armed instant does not stand: nothing runs."""
    one = worker()
    assert one.arm(length_ms=20) == {"ready": True, "prepared": 0}
    time.sleep(0.04)
    assert one.channel.request(Stats(), ANSWER_S) == {"steps": 0}


def test_start_of_another_segment_is_refused(worker: Callable[..., Worker]) -> None:
    """START names the armed segment; any other is refused with both numbers."""
    one = worker()
    with pytest.raises(RunFault, match="segment 1 is not armed; none is"):
        one.channel.request(Start(1), ANSWER_S)
    one.arm(2)
    with pytest.raises(RunFault, match="segment 1 is not armed; 2 is"):
        one.channel.request(Start(1), ANSWER_S)


def test_a_refused_arm_leaves_nothing_armed(worker: Callable[..., Worker]) -> None:
    """Work that cannot be prepared answers with its reason, and START is refused then."""
    one = worker(refuses="no payloads")
    with pytest.raises(RunFault, match="no payloads"):
        one.arm()
    with pytest.raises(RunFault, match="none is"):
        one.channel.request(Start(0), ANSWER_S)


def test_it_answers_between_two_steps(worker: Callable[..., Worker]) -> None:
    """STATS and CLOCK are answered while a window runs, and DRAIN ends it early."""
    one = worker()
    one.arm(length_ms=60_000)
    one.channel.request(Start(0), ANSWER_S)
    one.wait_for_steps(3)
    clock = one.channel.request(Clock(1), ANSWER_S)
    assert 0 < clock["t1_ns"] <= clock["t2_ns"]
    drained = one.channel.request(Drain(), ANSWER_S)["steps"]
    assert one.channel.request(Stats(), ANSWER_S)["steps"] == drained >= 3


def test_work_that_is_done_rests(worker: Callable[..., Worker]) -> None:
    """A step that returns False ends the window's work; the session goes on answering."""
    one = worker(limit=2)
    assert one.window(steps=2)["steps"] == 2
    assert one.window(1, steps=2)["steps"] == 2


def test_a_new_arm_during_a_window_replaces_it(worker: Callable[..., Worker]) -> None:
    """ARM in the middle of a window ends that window; the new one runs when it is started."""
    one = worker()
    one.arm(0, length_ms=60_000)
    one.channel.request(Start(0), ANSWER_S)
    one.wait_for_steps(1)
    assert one.window(1)["steps"] > 0
    assert [arm.segment for arm in one.work.arms] == [0, 1]


def test_a_window_armed_and_started_at_once_still_waits_for_its_instant(worker: Callable[..., Worker]) -> None:
    """ARM and START that arrive together in the middle of a window end it; no step comes before the new start_at."""
    one = worker()
    one.arm(0, length_ms=60_000)
    one.channel.request(Start(0), ANSWER_S)
    one.wait_for_steps(1)
    start = now_ns() + 200 * NS_PER_MS
    armed = one.channel.send(Arm("corun", 0, 1, start, start + 60_000 * NS_PER_MS))
    started = one.channel.send(Start(1))
    for id in (armed, started):
        one.channel.wait_reply(id, ANSWER_S)
    one.wait_for_steps(1)
    one.channel.request(Drain(), ANSWER_S)
    assert min(one.work.steps) >= start


@pytest.mark.parametrize("message", [Load("null"), Warmup()])
def test_messages_of_other_roles_are_refused(worker: Callable[..., Worker], message: Load | Warmup) -> None:
    """LOAD and WARMUP are not for workers: the refusal names the role."""
    with pytest.raises(RunFault, match=f"a worker does not answer {type(message).__name__}"):
        worker().channel.request(message, ANSWER_S)


def test_stop_is_answered_and_ends_it(worker: Callable[..., Worker]) -> None:
    """STOP is answered with the counts, also in the middle of a window."""
    one = worker()
    one.arm(length_ms=60_000)
    one.channel.request(Start(0), ANSWER_S)
    assert "steps" in one.channel.request(Stop("over"), ANSWER_S)
    assert one.ended() == "told to stop"


def test_a_lost_launcher_ends_it(worker: Callable[..., Worker]) -> None:
    """A launcher that goes away ends the worker, in the middle of a window too."""
    one = worker()
    one.arm(length_ms=60_000)
    one.channel.request(Start(0), ANSWER_S)
    one.channel.close()
    assert one.ended().startswith("lost the launcher")


def test_a_stop_signal_ends_it(worker: Callable[..., Worker]) -> None:
    """A stop signal ends the worker while it rests."""
    one = worker()
    one.stop.request()
    assert one.ended() == "stopped by a signal"


def test_nobody_there_is_an_error() -> None:
    """A launcher that closes without answering HELLO raises PeerClosed."""
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs, pytest.raises(PeerClosed):
        Session(Channel(theirs), HELLO, Fake(), StopSignal()).run()


def test_by_hand_it_arms_itself() -> None:
    """run_alone makes one window from now on and returns its counts; work that is done ends it early."""
    work = Fake(limit=5)
    assert run_alone(work, "alone", 60.0, StopSignal()) == {"steps": 5}
    assert [(arm.arm, arm.stop_at_ns - arm.start_at_ns) for arm in work.arms] == [("alone", 60_000 * NS_PER_MS)]
    stop = StopSignal()
    stop.request()
    assert run_alone(Fake(), "alone", 60.0, stop) == {"steps": 0}
