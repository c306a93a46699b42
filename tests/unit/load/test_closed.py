"""The client with one request in flight, and what it hides that an open-loop client shows."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
from tests.unit.load.harness import milliseconds, one_at_a_time, over, send

from corun.load.work import Progress
from corun.testing.echo import Behaviour, EchoServer
from corun.wire import Status

RATE = 100.0
REQUESTS = 250
STALL = Behaviour(stall_at=125, stall_s=1.0)
MS = 1_000_000


@pytest.fixture
def ring(tmp_path: Path) -> Path:
    return tmp_path / "a.ring"


def paced(count: int = REQUESTS, rate: float = RATE) -> list[float]:
    return [index / rate for index in range(count)]


def p99(values: np.ndarray) -> float:
    return float(np.percentile(values, 99, method="higher"))


def test_a_stalled_server_shows_in_the_sojourn_of_the_open_loop(ring: Path) -> None:
    """4.10 variant b: a server stands still until 100 more requests have left: all are late by what they waited for."""
    with EchoServer(Behaviour(stall_at=125, stall_s=60.0)) as server:
        result = send(server, paced(), ring, watches=[watch := _GoOnAfter(server, sent=225)])
        watch.close()
    records = result.records
    assert result.counts.ok == REQUESTS
    assert p99(milliseconds(records, "t_rx", "t_intended")) > 500
    assert over(server.stood_still, records["t_tx_start"], records["t_rx"]) > 100, "requests still left"


def test_a_stalled_server_shows_in_the_sojourn_of_a_paced_loop_and_hides_from_its_response(ring: Path) -> None:
    """4.10 variant b: one in flight and paced, one response has the stall in it and 100 sojourns have."""
    with EchoServer(STALL) as server:
        result = one_at_a_time(server, paced(), ring)
    records = result.records
    assert result.counts.ok == REQUESTS
    assert p99(milliseconds(records, "t_rx", "t_intended")) > 500
    assert milliseconds(records, "t_rx", "t_tx_start").max() > 900
    assert over(server.stood_still, records["t_tx_start"], records["t_rx"]) == 1
    assert over(server.stood_still, records["t_intended"], records["t_rx"]) >= 100


def test_a_stalled_server_hides_from_a_free_running_loop(ring: Path) -> None:
    """4.10 variant b, the control: without intended instants only one sojourn of 250 has the stall in it."""
    with EchoServer(STALL) as server:
        result = one_at_a_time(server, paced(), ring, rests_ns=[2 * MS], stop_s=60.0)
    records = result.records
    assert result.counts.ok == REQUESTS
    assert milliseconds(records, "t_rx", "t_tx_start").max() > 900
    assert over(server.stood_still, records["t_intended"], records["t_rx"]) == 1


def test_at_most_one_request_is_in_flight(ring: Path) -> None:
    """No request is sent before the reply to the one before it is here."""
    with EchoServer(Behaviour(delay_s=0.005)) as server:
        result = one_at_a_time(server, [0.0] * 20, ring)
    records = result.records
    assert result.counts.ok == 20
    assert (records["t_tx_start"][1:] >= records["t_rx"][:-1]).all()


def test_a_free_running_loop_rests_after_each_reply(ring: Path) -> None:
    """Each due instant is the last reply plus its rest, rests in turn, and nothing is sent before it."""
    with EchoServer() as server:
        result = one_at_a_time(server, [0.0] * 9, ring, rests_ns=[5 * MS, 10 * MS], stop_s=60.0)
    records = result.records
    rests = records["t_intended"][1:] - records["t_rx"][:-1]
    assert rests.tolist() == [5 * MS, 10 * MS] * 4
    assert (records["t_tx_start"] >= records["t_intended"]).all()


def test_a_free_running_loop_ends_with_the_segment(ring: Path) -> None:
    """It stops at the end of its time with the slots it used, none of them lost."""
    with EchoServer() as server:
        result = one_at_a_time(server, [0.0] * 1000, ring, rests_ns=[20 * MS], stop_s=0.3)
    counts = result.counts
    assert 0 < counts.scheduled <= 16
    assert counts.scheduled == counts.sent == counts.ok == len(result.records)


def test_a_reply_that_never_comes_ends_the_loop_when_patience_does(ring: Path) -> None:
    """The unanswered request and those due behind it are LOST; the loop does not hang."""
    with EchoServer(Behaviour(mute_at=3)) as server:
        result = one_at_a_time(server, paced(10, 100.0), ring, patience_s=3.0)
    assert result.counts.ok == 2
    assert result.counts.lost == 8


def test_a_broken_connection_loses_the_rest(ring: Path) -> None:
    """A server that closes in the middle of a reply leaves counts and a reason."""
    with EchoServer(Behaviour(close_at=5)) as server:
        result = one_at_a_time(server, paced(10, 200.0), ring)
    assert result.counts.ok == 4
    assert result.counts.lost == 6
    assert "middle of a frame" in result.counts.fault
    assert (result.records["status"][4:] == Status.LOST).all()


def test_large_requests_pass_in_pieces(ring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A payload larger than the socket takes at once is sent to its end."""
    monkeypatch.setattr("tests.unit.load.harness.PAYLOAD", bytes(30_000_000))
    with EchoServer() as server:
        result = one_at_a_time(server, [0.0] * 3, ring)
    assert result.counts.ok == 3


def test_a_server_that_does_not_read_cannot_hang_the_loop(ring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience bounds the sending too."""
    monkeypatch.setattr("tests.unit.load.harness.PAYLOAD", bytes(30_000_000))
    with EchoServer(Behaviour(never_reads=True)) as server:
        result = one_at_a_time(server, [0.0] * 3, ring, patience_s=0.3)
    assert (result.counts.sent, result.counts.lost) == (0, 3)


class _GoOnAfter:
    """A watch that is always readable: it has the server go on once so many requests have left."""

    def __init__(self, server: EchoServer, sent: int) -> None:
        self._server, self._sent = server, sent
        self._near, self._far = socket.socketpair()
        self._far.send(b"x")

    def fileno(self) -> int:
        return self._near.fileno()

    def attend(self, progress: Progress) -> None:
        if progress.sent >= self._sent and not self._server.go_on.is_set():
            self._server.go_on.set()
            self._near.recv(1)

    def close(self) -> None:
        self._near.close()
        self._far.close()
