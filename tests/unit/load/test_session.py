"""A client under a launcher, and the server as it finds it."""

from __future__ import annotations

import csv
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from tests.unit.load.harness import TIMING, rows

from corun.arrivals import UNPLANNED_NS, Schedule
from corun.clock import NS_PER_S, now_ns
from corun.errors import InputError, PeerClosed, RunFault
from corun.load import target as targets
from corun.load.client import Client, ClientOptions
from corun.load.ring import open_ring, read_ring, ring_to_csv
from corun.load.session import Session
from corun.process import StopSignal
from corun.registry import Payload
from corun.testing.echo import Behaviour, EchoServer
from corun.wire import Address, Status
from corun.wire.channel import Channel
from corun.wire.messages import Arm, Clock, Drain, Hello, Load, Start, Stats, Stop

PAYLOADS = [Payload("a.jpg", b"a" * 100), Payload("b.jpg", b"b" * 200)]
MS = 1_000_000


@dataclass(frozen=True)
class Finished:
    """A segment that was drained."""

    arm: Arm
    counts: dict[str, object]

    @property
    def records(self) -> np.ndarray:
        return read_ring(str(self.counts["ring"]))


@dataclass
class Launcher:
    """The launcher's end of a client that runs in a thread."""

    channel: Channel
    client: Client
    hello: Hello
    thread: threading.Thread
    stop: StopSignal

    def arm(self, segment: int, first: int, last: int, ahead_ms: int = 60, length_ms: int = 100) -> Arm:
        start = now_ns() + ahead_ms * MS
        arm = Arm("corun", 1, segment, start, start + length_ms * MS, first, last)
        assert self.channel.request(arm)["ready"]
        return arm

    def run(
        self, segment: int, first: int, last: int, ahead_ms: int = 60, length_ms: int = 100, answered: int = 0
    ) -> Finished:
        """A whole segment: ARM, START, its time and at least so many answers, DRAIN."""
        arm = self.arm(segment, first, last, ahead_ms, length_ms)
        self.channel.request(Start(segment))
        if answered:
            self.wait_for("answered", answered)
        time.sleep(max(0, arm.stop_at_ns - now_ns()) / NS_PER_S)
        return Finished(arm, self.drain())

    def end(self) -> None:
        """Go away and wait for the client to notice."""
        self.channel.close()
        self.thread.join(60)
        assert not self.thread.is_alive()

    def wait_for(self, counter: str, count: int) -> None:
        """Until STATS says so many."""
        while self.channel.request(Stats())[counter] < count:
            time.sleep(0.001)

    def drain(self, timeout_ms: int = 60_000) -> dict[str, object]:
        return self.channel.request(Drain(timeout_ms))


@pytest.fixture
def start() -> Iterator[Callable[..., Launcher]]:
    """Starts clients and ends them with the test."""
    launchers: list[Launcher] = []

    def begin(*arguments: object, **options: object) -> Launcher:
        launchers.append(_start(*arguments, **options))
        return launchers[-1]

    yield begin
    for launcher in launchers:
        launcher.end()


def _start(server: EchoServer, schedule: Schedule, out: Path, **options: object) -> Launcher:
    target = replace(targets.find(server.address), same_clock=bool(options.pop("same_clock", True)))
    client = Client(ClientOptions("svc", out, **options), target, PAYLOADS, TIMING)
    near, far = socket.socketpair()
    stop = StopSignal()
    thread = threading.Thread(target=_serve, args=(client, schedule, Channel(far), stop), daemon=True)
    thread.start()
    channel = Channel(near)
    received = channel.receive(60.0)
    assert received is not None
    header, hello = received
    assert isinstance(hello, Hello)
    channel.reply(header)
    return Launcher(channel, client, hello, thread, stop)


def _serve(client: Client, schedule: Schedule, channel: Channel, stop: StopSignal) -> None:
    Session(client, schedule, channel, stop).run()
    client.close()
    channel.close()


@pytest.fixture
def server() -> Iterator[EchoServer]:
    with EchoServer() as running:
        yield running


def evenly(count: int, gap_s: float = 0.002, stream: int = 0) -> Schedule:
    made = rows([index * gap_s for index in range(count)], stream)
    made["payload"] = np.arange(count)
    return Schedule(made)


def test_segments_follow_each_other_with_their_own_rows(
    start: Callable[..., Launcher], server: EchoServer, tmp_path: Path
) -> None:
    """HELLO, then ARM, START, DRAIN as often as asked: each segment sends its rows of the stream, once."""
    one, two = evenly(20), evenly(30)
    two_rows = two.rows.copy()
    two_rows["id"] += 20
    other = evenly(7, stream=5).rows
    schedule = Schedule(np.concatenate([one.rows, other, two_rows]))
    launcher = start(server, schedule, tmp_path)
    assert (launcher.hello.role, launcher.hello.name, launcher.hello.model) == ("client", "svc", "null")
    for segment, (first, last) in enumerate([(0, 20), (20, 50)]):
        done = launcher.run(segment, first, last)
        counts, records, arm = done.counts, done.records, done.arm
        assert (counts["scheduled"], counts["sent"], counts["ok"]) == (last - first, last - first, last - first)
        assert records["id"].tolist() == list(range(first, last))
        assert records["t_intended"][0] == arm.start_at_ns
        assert (records["t_tx_start"] >= arm.start_at_ns).all()
        assert counts["ring"] == str(tmp_path / "infer_client" / f"svc.{segment}.ring")
    launcher.channel.request(Stop())
    launcher.thread.join(60)
    assert not launcher.thread.is_alive()
    assert server.infers == 50


def test_the_ring_says_whose_rows_these_are(
    start: Callable[..., Launcher], server: EchoServer, tmp_path: Path
) -> None:
    """Arm, repeat, segment, model, training job, rate and payload names reach the table."""
    launcher = start(server, evenly(4), tmp_path, train_model="vgg16", rate=500.0, image_size=32)
    ring = str(launcher.run(3, 0, 4).counts["ring"])
    ring_to_csv(ring, tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["file_name"] for row in table] == ["a.jpg", "b.jpg", "a.jpg", "b.jpg"]
    asked = {"arm": "corun", "repeat": "1", "segment": "3", "service": "svc", "infer_model_name": "null",
             "train_model_name": "vgg16", "request_rate": "500.0", "image_size": "32", "device": "cpu"}  # fmt: skip
    assert asked.items() <= table[0].items()
    assert open_ring(ring).metadata.timing["rung"] == "timerfd"


def test_no_request_ever_leaves_before_the_armed_start(
    start: Callable[..., Launcher], server: EchoServer, tmp_path: Path
) -> None:
    """Starts repeated: the START message may come early or late, the armed instant rules."""
    launcher = start(server, evenly(3, 0.0001), tmp_path)
    for segment in range(30):
        done = launcher.run(segment, 0, 3, ahead_ms=15, length_ms=1)
        assert (done.records["t_tx_start"] >= done.records["t_intended"]).all()
        assert done.records["t_intended"].min() == done.arm.start_at_ns


def test_arming_again_replaces_the_segment(
    start: Callable[..., Launcher], server: EchoServer, tmp_path: Path
) -> None:
    """A launcher that was too late arms anew for a later instant; only that one is sent."""
    launcher = start(server, evenly(5), tmp_path)
    launcher.arm(0, 0, 5)
    later = launcher.run(0, 0, 5, ahead_ms=200)
    assert later.records["t_intended"][0] == later.arm.start_at_ns
    assert server.infers == 5


def test_counters_are_told_while_the_segment_runs(
    start: Callable[..., Launcher], server: EchoServer, tmp_path: Path
) -> None:
    """STATS and CLOCK are answered between two requests, and every request is still sent."""
    launcher = start(server, evenly(200), tmp_path)
    launcher.arm(0, 0, 200, ahead_ms=20, length_ms=400)
    launcher.channel.request(Start())
    seen = [launcher.channel.request(Stats())["sent"] for _ in range(20)]
    assert seen == sorted(seen)
    assert launcher.channel.clock_offset(2).bound_ns >= 0
    launcher.wait_for("sent", 200)
    assert launcher.drain()["ok"] == 200


def test_draining_early_leaves_what_was_not_due_unsent(
    start: Callable[..., Launcher], server: EchoServer, tmp_path: Path
) -> None:
    """DRAIN before the segment's end: what is out is waited for, the rest is neither sent nor lost."""
    launcher = start(server, evenly(10, 1000.0), tmp_path)
    launcher.arm(0, 0, 10, ahead_ms=10, length_ms=100_000)
    launcher.channel.request(Start())
    launcher.wait_for("answered", 1)
    counts = launcher.drain()
    assert (counts["ok"], counts["lost"], counts["unsent"], counts["scheduled"]) == (1, 0, 9, 10)


def test_a_stop_signal_drains_and_still_answers(
    start: Callable[..., Launcher], server: EchoServer, tmp_path: Path
) -> None:
    """SIGTERM in a segment ends it early; the launcher still gets the counts, then the client leaves."""
    launcher = start(server, evenly(10, 1000.0), tmp_path)
    launcher.arm(0, 0, 10, ahead_ms=10, length_ms=100_000)
    launcher.channel.request(Start())
    launcher.wait_for("answered", 1)
    launcher.stop.request()
    assert launcher.drain()["unsent"] == 9
    launcher.thread.join(60)
    assert not launcher.thread.is_alive()


def test_a_launcher_that_vanishes_ends_the_client(
    start: Callable[..., Launcher], server: EchoServer, tmp_path: Path
) -> None:
    """No orphan goes on sending: the segment is cut off, its ring complete up to there."""
    launcher = start(server, evenly(10, 1000.0), tmp_path)
    launcher.arm(0, 0, 10, ahead_ms=10, length_ms=100_000)
    launcher.channel.request(Start())
    launcher.wait_for("answered", 1)
    launcher.channel.close()
    launcher.thread.join(60)
    assert not launcher.thread.is_alive()
    assert (read_ring(tmp_path / "infer_client/svc.0.ring")["status"] == Status.OK).sum() == 1


def test_an_empty_segment_answers_with_zeros(
    start: Callable[..., Launcher], server: EchoServer, tmp_path: Path
) -> None:
    """A stream without rows in a window drains like any other."""
    launcher = start(server, evenly(3), tmp_path)
    counts = launcher.run(0, 0, 0).counts
    assert (counts["scheduled"], counts["sent"], counts["lost"]) == (0, 0, 0)


def test_messages_out_of_turn_are_refused_in_words(
    start: Callable[..., Launcher], server: EchoServer, tmp_path: Path
) -> None:
    """START or DRAIN before ARM, and LOAD, are answered with an error; the client lives on."""
    launcher = start(server, evenly(3), tmp_path)
    for message, words in [(Start(), "Start"), (Drain(), "no segment is armed"), (Load("x"), "Load")]:
        with pytest.raises(RunFault, match=words):
            launcher.channel.request(message)
    assert launcher.arm(0, 0, 3)


def test_a_lost_server_is_reported_and_the_next_segment_connects_anew(
    start: Callable[..., Launcher], tmp_path: Path
) -> None:
    """Segment 0 loses its connection, ARM fails while nobody listens, and works again with a new server."""
    first = EchoServer(Behaviour(close_at=3), Address("unix", str(tmp_path / "s")))
    with first:
        launcher = start(first, evenly(6), tmp_path)
        counts = launcher.run(0, 0, 6).counts
        assert (counts["ok"], counts["lost"]) == (2, 4)
        assert re.search("closed|broke", str(counts["fault"]))
    with pytest.raises(RunFault, match="cannot connect"):
        launcher.arm(1, 0, 6)
    with EchoServer(address=Address("unix", str(tmp_path / "s"))):
        assert launcher.run(1, 0, 6).counts["ok"] == 6


def test_a_free_running_client_goes_on_counting_ids(
    start: Callable[..., Launcher], server: EchoServer, tmp_path: Path
) -> None:
    """Rows without a due instant mean a closed loop: it runs to the segment's end, ids unique over segments."""
    loops = rows([0.0, 0.0])
    loops["intended_ns"] = UNPLANNED_NS
    launcher = start(server, Schedule(loops), tmp_path, one_at_a_time=True, think_ns=10 * MS)
    ids: list[int] = []
    for segment in range(2):
        records = launcher.run(segment, segment, segment + 1, length_ms=150, answered=1).records
        assert 0 < len(records) <= 16
        ids += records["id"].tolist()
    assert ids == list(range(len(ids)))


def test_an_open_loop_client_refuses_rows_without_an_instant(
    start: Callable[..., Launcher], server: EchoServer, tmp_path: Path
) -> None:
    """It cannot know when to send them; the error names the client that can."""
    loops = rows([0.0])
    loops["intended_ns"] = UNPLANNED_NS
    launcher = start(server, Schedule(loops), tmp_path)
    with pytest.raises(RunFault, match=r"client\.py"):
        launcher.arm(0, 0, 1)


def test_resting_after_replies_uses_the_gaps_of_the_schedule(
    start: Callable[..., Launcher], server: EchoServer, tmp_path: Path
) -> None:
    """As the original did: a gap begins with the reply, so the instants of the schedule are not kept."""
    launcher = start(server, Schedule(rows([0.0, 0.01, 0.03])), tmp_path, one_at_a_time=True, after_reply=True)
    launcher.arm(0, 0, 3, length_ms=600_000)
    launcher.channel.request(Start())
    launcher.wait_for("answered", 3)
    records = Finished(Arm("corun", 1, 0, 0, 0), launcher.drain()).records
    rests = (records["t_intended"][1:] - records["t_rx"][:-1]).tolist()
    assert len(rests) >= 2
    assert rests == ([10 * MS, 20 * MS] * len(rests))[: len(rests)]


def test_another_hosts_stamps_are_corrected_in_the_table(start: Callable[..., Launcher], tmp_path: Path) -> None:
    """A server 5 s ahead: the offset is found before and after, and the stages lie inside the request again."""
    with EchoServer(Behaviour(clock_offset_ns=5 * NS_PER_S)) as server:
        launcher = start(server, evenly(20), tmp_path, same_clock=False)
        counts = launcher.run(0, 0, 20).counts
    clock = counts["clock"]
    assert isinstance(clock, dict)
    assert set(clock) == {"before", "after"}
    bound = max(clock["before"]["bound_ns"], clock["after"]["bound_ns"]) + MS
    assert abs(clock["before"]["offset_ns"] - 5 * NS_PER_S) <= bound
    ring_to_csv(str(counts["ring"]), tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            assert int(row["t_tx_start_ns"]) - bound <= int(row["s_rx_first_ns"]) <= int(row["t_rx_ns"]) + bound


def test_a_server_with_another_model_is_asked_to_load_ours(server: EchoServer) -> None:
    """LOAD is sent only when needed; a refusal is the user's error with the server's words."""
    assert targets.find(server.address, "null").model == "null"
    assert server.loads == []
    assert targets.find(server.address, "other").model == "other"
    assert server.loads == ["other"]
    with pytest.raises(InputError, match='cannot load "nonsense": unknown model'):
        targets.find(server.address, "nonsense")


def test_a_server_without_a_model_is_waited_for_or_refused() -> None:
    """With a model asked for it is loaded; without one a starting server has wait_s to finish loading."""
    with EchoServer(Behaviour(model="")) as server:
        with pytest.raises(InputError, match="has no model; give --model"):
            targets.find(server.address)
        threading.Timer(0.3, lambda: setattr(server, "model", "late")).start()
        assert targets.find(server.address, wait_s=60).model == "late"
    with EchoServer(Behaviour(model="")) as server:
        assert targets.find(server.address, "null").model == "null"


def test_nobody_and_somebody_else_are_told_apart() -> None:
    """No listener, and a listener that does not speak our protocol, each get a sentence."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    silent = socket.socket()
    silent.bind(("127.0.0.1", 0))

    def answer_like_a_web_server() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)
            while sock.recv(1000):
                pass

    threading.Thread(target=answer_like_a_web_server, daemon=True).start()
    with pytest.raises(PeerClosed, match="not a corun server"):
        targets.find(Address("tcp", "127.0.0.1", port))
    listener.close()
    with silent, pytest.raises(PeerClosed, match="is the server running there"):
        targets.find(Address("tcp", "127.0.0.1", silent.getsockname()[1]))


@pytest.mark.parametrize("name", ["", "a/b"])
def test_a_service_name_must_be_a_file_name(name: str, tmp_path: Path) -> None:
    """It becomes part of a path."""
    with pytest.raises(InputError, match="file name"):
        ClientOptions(name, tmp_path)


def test_clock_probes_are_answered(start: Callable[..., Launcher], server: EchoServer, tmp_path: Path) -> None:
    """The launcher can compare clocks with an idle client."""
    launcher = start(server, evenly(1), tmp_path)
    body = launcher.channel.request(Clock(now_ns()))
    assert body["t1_ns"] <= body["t2_ns"] <= now_ns()
