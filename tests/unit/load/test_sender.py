"""The open-loop sender against servers that answer, stall, refuse to read, misbehave and vanish."""

from __future__ import annotations

import gc
import itertools
import re
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from tests.unit.load.harness import TIMING, milliseconds, send

from corun.clock import now_ns
from corun.load.ring import UNSENT
from corun.load.timing import Timing
from corun.load.work import Progress
from corun.testing.echo import Behaviour, EchoServer
from corun.wire import STAMPS, Address, Status

SELECT = Timing(rung="select", policy="other")
LEAD = Timing(rung="timerfd", policy="other", lead_ns=25_000)
SPIN = Timing(rung="spin-exclusive", policy="other", spin_ns=50_000)


def spaced(count: int, gap_s: float = 0.001) -> list[float]:
    return [index * gap_s for index in range(count)]


@pytest.fixture
def ring(tmp_path: Path) -> Path:
    return tmp_path / "a.ring"


@pytest.mark.parametrize("timing", [TIMING, LEAD, SELECT, SPIN], ids=["timerfd", "lead", "select", "spin"])
def test_every_scheduled_request_is_sent_once_and_never_early(ring: Path, timing: Timing) -> None:
    """On every rung of the wait ladder sent == scheduled, all stamps are in order, and slip is never negative."""
    with EchoServer() as server:
        result = send(server, spaced(300), ring, payload=bytes(16), timing=timing)
        assert server.infers == 300
    counts, records = result.counts, result.records
    assert (counts.scheduled, counts.sent, counts.ok, counts.lost, counts.unsent) == (300, 300, 300, 0, 0)
    stamps = [records[name] for name in ("t_intended", "t_wake", "t_tx_start", "t_tx_done", "t_rx")]
    for earlier, later in itertools.pairwise(stamps):
        assert (earlier <= later).all()
    assert (np.diff(records["t_intended"]) == 1_000_000).all()
    assert counts.backlog_max == 0
    assert counts.cpu_s > 0


def test_requests_due_together_all_leave(ring: Path) -> None:
    """Requests with one due instant (offline) are all sent, and each keeps that instant."""
    with EchoServer() as server:
        result = send(server, [0.0] * 100, ring)
    assert result.counts.ok == 100
    assert len(set(result.records["t_intended"].tolist())) == 1


def test_an_empty_segment_ends_at_once(ring: Path) -> None:
    """A stream without arrivals in a window is no fault."""
    with EchoServer() as server:
        result = send(server, [], ring)
    assert result.counts.scheduled == 0
    assert len(result.records) == 0


def test_a_late_sender_keeps_intended_instants(ring: Path) -> None:
    """Requests already overdue go out at once; their lateness is slip and sojourn, not a new schedule."""
    with EchoServer() as server:
        result = send(server, [-0.5, -0.4, 0.0, 0.01], ring)
    slip = milliseconds(result.records, "t_tx_start", "t_intended")
    assert result.counts.ok == 4
    assert slip[0] > 450
    assert slip[1] > 350
    assert (milliseconds(result.records, "t_rx", "t_intended") >= slip).all()


def test_a_server_that_does_not_read_never_blocks_the_sender(ring: Path) -> None:
    """200 images of 150 KB, more than all kernel buffers take: every one is noticed and kept in user space."""
    with EchoServer(Behaviour(never_reads=True)) as server:
        noticed = _EndOnceNoticed(200)
        result = send(server, spaced(200), ring, payload=bytes(150 * 1024), watches=[noticed])
        noticed.close()
    counts, records = result.counts, result.records
    assert counts.scheduled == 200
    assert counts.lost == 200
    assert 0 < counts.sent < 200
    assert counts.backlog_max > 10
    wake, due = records["t_wake"], records["t_intended"]
    assert (wake > 0).all(), "no request was forgotten while the socket was full"
    assert (wake >= due).all()
    wakes = np.unique(wake)
    assert (wakes[np.searchsorted(wakes, due)] == wake).all(), "noticed at the first wake-up after its instant"


def test_a_slow_reader_gets_every_byte_in_pieces(ring: Path, tmp_path: Path) -> None:
    """Sends that the kernel takes in part go on where they stopped: all replies come back OK."""
    behaviour = Behaviour(delay_s=0.002, stall_at=1, stall_s=60.0)
    with EchoServer(behaviour, Address("unix", str(tmp_path / "s"))) as server:
        full = _GoOnWhenFull(server)
        result = send(server, spaced(150, 0.0002), ring, payload=bytes(300_000), watches=[full])
        full.close()
    assert result.counts.ok == 150
    assert result.counts.backlog_max > 0, "the kernel's buffers were never full: the test is too small"
    assert (result.records["t_tx_done"] > result.records["t_tx_start"]).all()


def test_replies_are_matched_by_id_in_any_order(ring: Path) -> None:
    """A server may answer in another order than it was asked."""
    with EchoServer(Behaviour(shuffle=5)) as server:
        result = send(server, spaced(50), ring)
    assert result.counts.ok == 50
    arrived_there = result.records["stamps"][:, STAMPS.index("rx_first")]
    assert (arrived_there >= result.records["t_tx_start"]).all(), "a request has the reply of an earlier one"
    assert (arrived_there <= result.records["t_rx"]).all()


def test_statuses_and_reply_sizes_are_recorded(ring: Path) -> None:
    """A rejected request is an error with its status and an empty reply; the others keep theirs."""
    with EchoServer(Behaviour(reject_every=4, reply_bytes=40)) as server:
        result = send(server, spaced(40), ring)
    rejected = result.records["status"] == Status.REJECTED
    assert (result.counts.ok, result.counts.errors) == (30, 10)
    assert rejected.sum() == 10
    assert (result.records["reply_len"][rejected] == 0).all()
    assert (result.records["reply_len"][~rejected] == 40).all()


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (Behaviour(close_at=10), "middle of a frame|connection broke"),
        (Behaviour(garbage_at=10), "not a corun frame"),
    ],
    ids=["closes", "garbage"],
)
def test_a_broken_connection_loses_the_rest_and_nothing_else(ring: Path, behaviour: Behaviour, words: str) -> None:
    """Replies before the break count, everything after it is LOST, and the segment ends with its reason.

    Replies that arrive in one piece with garbage are not trusted either, and a reset discards what was not read.
    """
    with EchoServer(behaviour) as server:
        result = send(server, spaced(100), ring)
    counts = result.counts
    assert re.search(words, counts.fault)
    assert counts.ok <= 9
    assert counts.lost == 100 - counts.ok
    assert (result.records["status"][: counts.ok] == Status.OK).all()
    assert (result.records["status"][counts.ok :] == Status.LOST).all()


def test_a_server_that_vanishes_while_it_owes_image_sized_requests_is_a_fault(ring: Path) -> None:
    """A reset while the kernel buffer is full ends the segment; it neither raises nor spins until the timeout."""
    server = EchoServer(Behaviour(delay_s=0.05))
    with server:
        closer = _CloseServer(server)
        result = send(server, spaced(300), ring, payload=bytes(150 * 1024), patience_s=60, watches=[closer])
        closer.close()
    assert result.counts.fault
    assert result.counts.lost > 200


def test_a_request_without_a_reply_is_lost_when_patience_ends(ring: Path) -> None:
    """The drain timeout bounds the wait for a reply that never comes; the others keep theirs."""
    with EchoServer(Behaviour(mute_at=3)) as server:
        result = send(server, spaced(10), ring, patience_s=3.0)
    assert (result.counts.ok, result.counts.lost, result.counts.fault) == (9, 1, "")
    assert result.records["status"][2] == Status.LOST
    assert result.records["t_tx_done"][2] > 0


def test_ending_early_sends_nothing_new_and_waits_for_what_is_outstanding(ring: Path) -> None:
    """A drain in the middle: what was sent is answered, what was not due stays unsent, and they add up."""
    with EchoServer() as server:
        watch = _EndAfter(sent=20)
        result = send(server, [*spaced(30), *(60.0 + offset for offset in spaced(20))], ring, watches=[watch])
        watch.close()
    counts = result.counts
    assert counts.ok + counts.unsent == counts.scheduled == 50
    assert counts.unsent >= 20
    assert (result.records["status"][-20:] == UNSENT).all()


def test_a_reply_to_another_request_changes_no_record(ring: Path) -> None:
    """A second reply to a request, one to a request never made and one of another stream are strays."""
    with EchoServer(Behaviour(repeat_at=2)) as server:
        result = send(server, spaced(5), ring)
    assert result.counts.ok == 5
    assert result.counts.strays == 3


def test_garbage_collection_is_as_before_after_a_segment(ring: Path) -> None:
    """The collector is off while a segment runs and on again afterwards."""
    assert gc.isenabled()
    with EchoServer() as server:
        send(server, spaced(5), ring)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_stall_of_the_client_shows_in_sojourn_and_not_in_response(ring: Path) -> None:
    """4.10 variant a: what falls due while the client stands still is sent late; only sojourn holds the wait."""
    with EchoServer() as server:
        pause = _Sleep(after_sent=20, seconds=0.5)
        result = send(server, spaced(1000, 0.002), ring, watches=[pause])
        pause.close()
    assert result.counts.ok == 1000
    records = result.records
    held = (records["t_intended"] > pause.from_ns) & (records["t_intended"] < pause.until_ns)
    assert held.sum() >= 200, "the schedule ended before the stall: the test is too small"
    assert (records["t_tx_start"][held] >= pause.until_ns).all()
    sojourn = milliseconds(records, "t_rx", "t_intended")
    response = milliseconds(records, "t_rx", "t_tx_start")
    still_to_wait = (pause.until_ns - records["t_intended"][held]) / 1e6
    assert np.median(still_to_wait) > 150
    assert (sojourn[held] >= still_to_wait).all()
    assert (sojourn - response)[held] == pytest.approx(milliseconds(records, "t_tx_start", "t_intended")[held])


class _Pipe:
    """A watch that is always readable: it is attended after every wake-up."""

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()
        self._far.send(b"x")

    def fileno(self) -> int:
        return self._near.fileno()

    def close(self) -> None:
        self._near.close()
        self._far.close()


class _EndAfter(_Pipe):
    def __init__(self, sent: int) -> None:
        super().__init__()
        self._sent = sent

    def attend(self, progress: Progress) -> int | None:
        return now_ns() + 60_000_000_000 if progress.sent >= self._sent else None


class _EndOnceNoticed(_Pipe):
    """Ends the segment when so many requests were noticed, sent or not."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def attend(self, progress: Progress) -> int | None:
        return now_ns() if progress.sent + progress.backlog >= self._count else None


class _GoOnWhenFull(_Pipe):
    """Has the server go on once the kernel takes no more."""

    def __init__(self, server: EchoServer) -> None:
        super().__init__()
        self._server = server

    def attend(self, progress: Progress) -> int | None:
        if progress.backlog and not self._server.go_on.is_set():
            self._server.go_on.set()
            self._near.recv(1)
        return None


class _Sleep(_Pipe):
    def __init__(self, after_sent: int, seconds: float) -> None:
        super().__init__()
        self._after, self._seconds = after_sent, seconds
        self.from_ns = self.until_ns = 0

    def attend(self, progress: Progress) -> int | None:
        if progress.sent >= self._after:
            self.from_ns = now_ns()
            time.sleep(self._seconds)
            self.until_ns = now_ns()
            self._after = 1 << 60
            self._near.recv(1)
        return None


class _CloseServer(_Pipe):
    def __init__(self, server: EchoServer) -> None:
        super().__init__()
        self._server = server

    def attend(self, progress: Progress) -> int | None:
        if progress.backlog > 20:
            self._server.__exit__()
            self._near.recv(1)
        return None
