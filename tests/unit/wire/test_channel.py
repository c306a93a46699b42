"""Control channels: requests and replies of both ends over one stream."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from corun.arrivals import ROW, Schedule
from corun.clock import now_ns
from corun.errors import FrameError, PeerClosed, RunFault
from corun.load.session import Session as ClientSession
from corun.load.timing import Timing
from corun.profile.control import Control
from corun.wire import Kind, pack_reply, pack_request
from corun.wire.channel import Channel, answer_clock
from corun.wire.frames import NO_STAMPS
from corun.wire.messages import Clock, Hello, Message, Stats, Stop, Warmup
from corun.wire.session import Session as WorkerSession

CLIENT = SimpleNamespace(
    options=SimpleNamespace(service="a", stream=0),
    target=SimpleNamespace(model="null", device="cpu"),
    timing=Timing("timerfd", "other"),
)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    left, right = socket.socketpair()
    near, far = Channel(left), Channel(right)
    yield near, far
    near.close()
    far.close()


def test_a_request_gets_the_body_of_its_reply(ends: tuple[Channel, Channel]) -> None:
    """What the far end answers is what `wait_reply` returns, whatever the order of the answers."""
    near, far = ends
    ids = [near.send(Warmup(count)) for count in (1, 2, 3)]
    received = [far.receive(1.0) for _ in ids]
    for item in reversed(received):
        assert item is not None
        header, message = item
        assert isinstance(message, Warmup)
        far.reply(header, {"ms": [message.count]})
    assert [near.wait_reply(id, 1.0)["ms"] for id in ids] == [[1], [2], [3]]


def test_both_ends_may_ask_at_once(ends: tuple[Channel, Channel]) -> None:
    """A request that comes while waiting for a reply is kept, not mistaken for it."""
    near, far = ends
    asked, answered = near.send(Hello("client")), far.send(Stats())
    item = far.receive(1.0)
    assert item is not None
    far.reply(item[0], {"pid": 1})
    assert near.wait_reply(asked, 1.0) == {"pid": 1}
    item = near.receive(0)
    assert item is not None
    assert item[1] == Stats()
    near.reply(item[0], {"ok": 2})
    assert far.wait_reply(answered, 1.0) == {"ok": 2}


def test_a_failure_is_raised_with_its_reason(ends: tuple[Channel, Channel]) -> None:
    """A reply with an error status becomes RunFault with the peer's sentence."""
    near, far = ends
    id = near.send(Stop())
    item = far.receive(1.0)
    assert item is not None
    far.fail(item[0], "the disk is full")
    with pytest.raises(RunFault, match="the disk is full"):
        near.wait_reply(id, 1.0)


def test_an_unknown_status_is_a_failure_too(ends: tuple[Channel, Channel]) -> None:
    """A status this side does not know is reported by its number."""
    near, far = ends
    id = near.send(Stop())
    far.sock.sendall(pack_reply(Kind.STOP, 0, id, 77, NO_STAMPS, 0))
    with pytest.raises(RunFault, match="77"):
        near.wait_reply(id, 1.0)


class Recording(Channel):
    """Remembers how long each question may take, and has nobody to answer it."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.asked: list[tuple[str, float | None]] = []

    def request(self, message: Message, timeout_s: float | None = 30.0) -> dict[str, Any]:
        self.asked.append((type(message).__name__, timeout_s))
        raise PeerClosed("nobody")


@pytest.mark.parametrize(
    "say_hello",
    [
        lambda channel: WorkerSession(channel, Hello("worker"), None, None).run(),  # type: ignore[arg-type]
        lambda channel: ClientSession(CLIENT, Schedule(np.zeros(0, ROW)), channel, None).run(),  # type: ignore[arg-type]
        lambda channel: Control(channel, lambda: None).hello({}),  # type: ignore[arg-type, return-value]
    ],
    ids=["worker", "client", "profiler"],
)
def test_a_process_waits_for_its_launcher_as_long_as_others_take_to_start(
    say_hello: Callable[[Channel], None], ends: tuple[Channel, Channel]
) -> None:
    """HELLO has no time limit: the launcher accepts the first process when the last model is loaded."""
    channel = Recording(ends[0].sock)
    with pytest.raises(PeerClosed, match="nobody"):
        say_hello(channel)
    assert channel.asked == [("Hello", None)]


def test_no_answer_in_time_is_an_error(ends: tuple[Channel, Channel]) -> None:
    """A peer that is silent is PeerClosed after the timeout; looking for a request returns None."""
    near, _ = ends
    with pytest.raises(PeerClosed, match="no answer within"):
        near.request(Stats(), timeout_s=0.05)
    assert near.receive(0) is None
    assert near.receive(0.01) is None


def test_a_peer_that_closes_is_told_apart_from_garbage(ends: tuple[Channel, Channel]) -> None:
    """The end of the stream is PeerClosed, in the middle of a frame it says so; garbage is FrameError."""
    near, far = ends
    far.sock.sendall(pack_request(Kind.STATS, 0, 1, 0)[:30])
    far.close()
    with pytest.raises(PeerClosed, match="middle of a frame"):
        near.receive(1.0)
    left, right = socket.socketpair()
    with left, right:
        right.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(FrameError, match="not a corun frame"):
            Channel(left).receive(1.0)


def test_the_clock_handshake_bounds_the_offset_by_half_the_round_trip(ends: tuple[Channel, Channel]) -> None:
    """Both ends share a clock here, so the measured offset is within its own bound of zero."""
    near, far = ends

    def answer() -> None:
        for _ in range(16):
            item = far.receive(60.0)
            assert item is not None
            assert isinstance(item[1], Clock)
            answer_clock(far, item[0], now_ns())

    thread = threading.Thread(target=answer)
    thread.start()
    offset = near.clock_offset()
    thread.join()
    assert abs(offset.offset_ns) <= offset.bound_ns
