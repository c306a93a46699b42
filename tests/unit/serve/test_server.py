"""The server over real sockets, with a model that does as it is told."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.unit.serve.tools import FakeServable, Serving, csv_rows, until

from corun import __version__
from corun.clock import now_ns
from corun.errors import InputError, PeerClosed, RunFault
from corun.serve import ServableEngine
from corun.serve.server import IDLE_JOIN_S
from corun.wire import Address, Kind, Status, pack_reply, pack_request
from corun.wire.frames import NO_STAMPS
from corun.wire.messages import Arm, Drain, Hello, Load, Start, Stats, Stop, Warmup


def error_of(payload: bytes) -> str:
    return payload.decode()


def test_a_request_is_answered_with_ordered_stamps() -> None:
    """The reply has the model's payload, the batch size and ten stamps in order, all between send and receive."""
    with Serving() as serving:
        before = now_ns()
        frame = serving.client().ask(b"hello")
        assert (frame.header.kind, frame.header.status, frame.header.batch) == (Kind.REPLY, Status.OK, 1)
        assert frame.payload == b"reply to hello"
        stamps = [before, *frame.header.stamps, now_ns()]
        assert stamps == sorted(stamps)


def test_pipelined_requests_are_all_answered() -> None:
    """300 requests in one write get 300 replies, each its own."""
    with Serving() as serving:
        client = serving.client()
        ids = client.send(*(b"%d" % index for index in range(300)))
        frames = client.receive(300)
        assert {id: frames[id].payload for id in ids} == {id: b"reply to %d" % id for id in ids}


def test_many_connections_do_not_mix() -> None:
    """Fifty connections with interleaved requests each get their own replies."""
    with Serving() as serving:
        clients = [serving.client() for _ in range(50)]
        for turn in range(4):
            for index, client in enumerate(clients):
                client.send(b"%d/%d" % (index, turn))
        for index, client in enumerate(clients):
            frames = client.receive(4)
            assert [frames[turn].payload for turn in range(4)] == [b"reply to %d/%d" % (index, t) for t in range(4)]
        assert serving.ask(Stats())["completed"] == 200


def test_a_unix_socket_serves_and_is_removed_at_the_end(tmp_path: Path) -> None:
    """unix:/path works like TCP, and the file is gone after STOP."""
    path = tmp_path / "svc.sock"
    with Serving(address=Address("unix", str(path))) as serving:
        assert serving.client().ask(b"x").payload == b"reply to x"
        serving.stop()
    assert not path.exists()


def test_large_payloads_pass_in_both_directions() -> None:
    """Megabytes in and out, beside small requests of another connection."""
    with Serving() as serving:
        client, other = serving.client(), serving.client()
        big = bytes(range(256)) * 8192
        threading.Thread(target=lambda: client.send(big, big)).start()
        assert other.ask(b"small").payload == b"reply to small"
        frames = client.receive(2)
        assert all(frame.payload == b"reply to " + big for frame in frames.values())


def test_a_full_queue_rejects_and_counts() -> None:
    """While the model is busy, limit requests wait and the rest is answered REJECTED at once."""
    with Serving(queue_limit=5) as serving:
        serving.servable.gate.clear()
        client = serving.client()
        client.send(b"busy")
        serving.servable.entered.wait(60)
        client.send(*[b"x"] * 12)
        rejected = client.receive(7)
        assert {frame.header.status for frame in rejected.values()} == {Status.REJECTED}
        assert "queue is full" in error_of(next(iter(rejected.values())).payload)
        serving.servable.gate.set()
        assert {frame.header.status for frame in client.receive(6).values()} == {Status.OK}
        counts = serving.ask(Drain())
        assert (counts["received"], counts["completed"], counts["rejected"]) == (13, 6, 7)


def test_a_stalled_model_never_stops_the_reading() -> None:
    """With the model standing still the socket is drained, and HELLO, CLOCK and STATS are answered."""
    with Serving(queue_limit=10_000) as serving:
        serving.servable.gate.clear()
        client = serving.client()
        client.sock.settimeout(60)
        client.send(*[bytes(150_000)] * 200)
        channel = serving.channel()
        until(lambda: channel.request(Stats())["received"] == 200)
        assert channel.request(Hello("test"))["model"] == "fake"
        offset = channel.clock_offset()
        assert abs(offset.offset_ns) <= offset.bound_ns + 1
        serving.servable.gate.set()
        assert len(client.receive(200)) == 200


def test_a_batcher_groups_what_waits() -> None:
    """With max_batch 4, requests queued behind a busy model run in fours and say so in their replies."""
    with Serving(max_batch=4) as serving:
        serving.servable.gate.clear()
        client = serving.client()
        client.send(b"first")
        serving.servable.entered.wait(60)
        client.send(*[b"x"] * 8)
        until(lambda: serving.ask(Stats())["queue_len"] == 8)
        serving.servable.gate.set()
        frames = client.receive(9)
        assert [frames[id].header.batch for id in range(9)] == [1] + [4] * 8


def test_bad_payloads_and_failures_are_answered() -> None:
    """BAD_REQUEST and FAILED carry their reason; the same batch and the next one succeed."""
    with Serving(max_batch=3, max_delay_ns=60 * 10**9) as serving:
        client = serving.client()
        client.send(b"a", b"bad", b"b")
        frames = client.receive(3)
        assert [frames[id].header.status for id in range(3)] == [Status.OK, Status.BAD_REQUEST, Status.OK]
        assert "not a readable image" in error_of(frames[1].payload)
        client.send(b"boom", b"a", b"b")
        assert {frame.header.status for frame in client.receive(3).values()} == {Status.FAILED}
        client.send(b"a", b"b", b"c")
        assert {frame.header.status for frame in client.receive(3).values()} == {Status.OK}
        assert any("the network exploded" in line for line in serving.lines)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".ljust(64), "not a corun frame"),
        (pack_request(Kind.INFER, 0, 0, 10)[:24] + b"\xff" * 8 + bytes(32), "over the limit"),
        (pack_request(Kind.INFER, 0, 0, 10)[:60] + b"abc", "middle of a frame"),
        (pack_request(Kind.INFER, 0, 0, 100) + b"only a part", "middle of a frame"),
        (pack_request(Kind.INFER, 0, 0, 200_000) + bytes(100_000), "middle of a frame"),
        (pack_reply(Kind.REPLY, 0, 0, 0, NO_STAMPS, 0), "instead of a request"),
    ],
    ids=["http", "oversized", "truncated header", "truncated", "truncated large", "reply"],
)
def test_a_bad_frame_costs_its_connection_only(data: bytes, words: str, tmp_path: Path) -> None:
    """Garbage, truncated and oversized frames close that connection with a logged reason; others are served."""
    with Serving(out=tmp_path) as serving:
        good = serving.client()
        with socket.create_connection((serving.server.address.host, serving.server.address.port)) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(60)
            while sock.recv(1000):
                pass
        assert good.ask(b"x").header.status == Status.OK
        assert any(words in line for line in serving.lines)
        assert words in (tmp_path / "events.csv").read_text()


def test_a_bad_control_message_is_answered_and_the_connection_lives() -> None:
    """A well-framed message with a wrong body is BAD_REQUEST with the field's name, not a closed connection."""
    with Serving() as serving:
        channel = serving.channel()
        for body in (b'{"modle":"x"}', b"[" * 50_000, b"\xff\xfe"):
            channel.sock.sendall(pack_request(Kind.LOAD, 0, 1000, len(body)) + body)
            with pytest.raises(RunFault, match="bad LOAD message"):
                channel.wait_reply(1000, 60.0)
        channel.sock.sendall(pack_request(Kind.REPLY, 0, 1001, 0))
        with pytest.raises(RunFault, match="not a control message"):
            channel.wait_reply(1001, 60.0)
        assert channel.request(Hello("test"))["name"] == "svc"


def test_a_client_that_disappears_is_cancelled(tmp_path: Path) -> None:
    """Requests of a closed connection are not run; their rows say CANCELLED; others are served."""
    with Serving(out=tmp_path) as serving:
        serving.servable.gate.clear()
        gone, stays = serving.client(), serving.client()
        gone.send(b"running")
        serving.servable.entered.wait(60)
        gone.send(b"waiting", b"waiting too")
        until(lambda: serving.ask(Stats())["queue_len"] == 2)
        connected = serving.ask(Stats())["connections"]
        gone.sock.close()
        until(lambda: serving.ask(Stats())["connections"] == connected - 1)
        stays.send(b"mine")
        until(lambda: serving.ask(Stats())["queue_len"] == 3)
        serving.servable.gate.set()
        assert stays.receive(1)[0].payload == b"reply to mine"
        serving.stop()
    assert [batch for batch in serving.servable.batches if b"waiting" in batch] == []
    assert [row["status"] for row in csv_rows(tmp_path)] == ["OK", "CANCELLED", "CANCELLED", "OK"]


def test_a_client_that_never_reads_delays_nobody(tmp_path: Path) -> None:
    """Its replies pile up to the limit, then its connection is closed with a reason; others are served meanwhile."""
    with Serving(out=tmp_path, backlog_limit=1 << 20, queue_limit=10_000) as serving:
        deaf, other = serving.client(), serving.client()
        deaf.sock.settimeout(60)
        asked = 0
        while asked < 10_000:
            try:
                deaf.send(bytes(100_000))
            except OSError:
                break
            asked += 1
            assert other.ask(b"quick").header.status == Status.OK
        assert 5 < asked < 10_000
        until(lambda: any("does not read its replies" in line for line in serving.lines))
        assert other.ask(b"still").header.status == Status.OK
        assert "does not read its replies" in (tmp_path / "events.csv").read_text()


def test_without_a_model_requests_are_not_loaded() -> None:
    """A server that waits for LOAD says so, then serves what is loaded."""
    with Serving(model="") as serving:
        channel, client = serving.channel(), serving.client()
        assert client.ask(b"x").header.status == Status.NOT_LOADED
        assert channel.request(Hello("test"))["model"] == ""
        for message in (Warmup(1), Arm("alone", 0, 0, 0, 0)):
            with pytest.raises(RunFault, match="no model is loaded"):
                channel.request(message)
        assert channel.request(Load("fake"))["model"] == "fake"
        assert client.ask(b"x").header.status == Status.OK
        assert channel.request(Hello("test"))["model"] == "fake"


def test_a_load_replaces_the_model_and_a_failed_one_keeps_it(tmp_path: Path) -> None:
    """LOAD switches when the new model is ready; with an error it answers the reason and the old one serves on."""
    names: list[str] = []

    def load(message: Load) -> Any:
        names.append(message.model)
        if message.model == "broken":
            raise InputError("unknown model", ["did you mean another?"])
        if message.model == "crash":
            raise ZeroDivisionError("in the plug-in")
        return ServableEngine(FakeServable(message.model))

    with Serving(load, model="one", out=tmp_path) as serving:
        channel, client = serving.channel(), serving.client()
        for model, words in (("broken", "did you mean another"), ("crash", "in the plug-in")):
            with pytest.raises(RunFault, match=words):
                channel.request(Load(model))
            assert channel.request(Hello("test"))["model"] == "one"
        assert client.ask(b"x").header.status == Status.OK
        assert channel.request(Load("two"))["model"] == "two"
        assert channel.request(Hello("test"))["model"] == "two"
        client.ask(b"y")
        serving.stop()
    assert names == ["one", "broken", "crash", "two"]
    assert [row["infer_model_name"] for row in csv_rows(tmp_path)] == ["one", "two"]


def test_the_server_answers_while_a_model_is_loading() -> None:
    """HELLO, STATS and refusals do not wait for the loader."""
    gate = threading.Event()

    def load(message: Load) -> Any:
        gate.wait(120)
        return ServableEngine(FakeServable())

    with Serving(load, model="") as serving:
        loader, channel, client = serving.channel(), serving.channel(), serving.client()
        id = loader.send(Load("slow"))
        assert channel.request(Hello("test"))["model"] == ""
        assert client.ask(b"x").header.status == Status.NOT_LOADED
        gate.set()
        assert loader.wait_reply(id, 60.0)["model"] == "fake"
        assert client.ask(b"x").header.status == Status.OK


def test_a_first_model_that_cannot_be_loaded_ends_the_server() -> None:
    """serve() raises what the loader raised."""

    def load(message: Load) -> Any:
        raise InputError("no such weights")

    with Serving(load) as serving:
        serving.join()
    assert isinstance(serving.error, InputError)


def test_hello_tells_who_serves_and_how() -> None:
    """Role, name, pid, version, model, device, host, clock and every option that matters for a number."""
    with Serving(queue_limit=77, max_batch=4, max_delay_ns=2_000_000, threads=3) as serving:
        body = serving.ask(Hello("test"))
        assert (body["role"], body["name"], body["version"]) == ("server", "svc", __version__)
        assert (body["model"], body["device"], body["host"]) == ("fake", "cpu", socket.gethostname())
        assert abs(body["clock_ns"] - now_ns()) < 60 * 10**9
        info = body["info"]
        assert (info["queue_limit"], info["max_batch"], info["max_delay_ms"], info["threads"]) == (77, 4, 2.0, 3)
        assert (info["policy"], info["weights"], info["switch_interval_ms"]) == ("fifo", "random", 0.5)
        assert info["buffers"]["sndbuf"] > 0


def test_rows_and_counts_belong_to_the_armed_segment(tmp_path: Path) -> None:
    """ARM labels what arrives afterwards; DRAIN answers with that segment's counts; START wants the armed one."""
    with Serving(out=tmp_path) as serving:
        channel, client = serving.channel(), serving.client()
        client.ask(b"before")
        channel.request(Arm("alone", 0, 4, 0, 0))
        with pytest.raises(RunFault, match="segment 5 is not armed; 4 is"):
            channel.request(Start(5))
        channel.request(Start(4))
        client.ask(b"one")
        client.ask(b"bad")
        assert channel.request(Drain())["received"] == 2
        channel.request(Arm("corun", 1, 5, 0, 0))
        client.ask(b"two")
        counts = channel.request(Drain())
        assert (counts["received"], counts["completed"], counts["bad"]) == (1, 1, 0)
        assert channel.request(Stats())["received"] == 4
        serving.stop()
    rows = csv_rows(tmp_path)
    assert [(row["arm"], row["repeat"], row["segment"]) for row in rows] == [
        ("", "", ""),
        ("alone", "0", "4"),
        ("alone", "0", "4"),
        ("corun", "1", "5"),
    ]


def test_drain_waits_for_what_is_outstanding_and_turns_new_requests_away(tmp_path: Path) -> None:
    """While it is pending new requests are DRAINING; its answer comes after the last reply, with the rows on disk."""
    with Serving(out=tmp_path) as serving:
        serving.servable.gate.clear()
        channel, client = serving.channel(), serving.client()
        client.send(b"running", b"waiting")
        until(lambda: serving.ask(Stats())["received"] == 2)
        id = channel.send(Drain(60_000))
        until(lambda: serving.server.control.pending)
        assert client.ask(b"late").header.status == Status.DRAINING
        serving.servable.gate.set()
        counts = channel.wait_reply(id, 60.0)
        assert (counts["received"], counts["completed"], counts["draining"]) == (3, 2, 1)
        assert len(csv_rows(tmp_path)) == 3
        assert {frame.header.status for frame in client.receive(2).values()} == {Status.OK}
        assert client.ask(b"after").header.status == Status.OK


def test_a_drain_that_takes_too_long_says_what_is_left() -> None:
    """After timeout_ms it is answered as a failure and the server serves on."""
    with Serving() as serving:
        serving.servable.gate.clear()
        client = serving.client()
        client.send(b"running", b"waiting")
        until(lambda: serving.ask(Stats())["received"] == 2)
        with pytest.raises(RunFault, match="2 requests are not answered"):
            serving.ask(Drain(30))
        serving.servable.gate.set()
        assert len(client.receive(2)) == 2
        assert client.ask(b"x").header.status == Status.OK


def test_stop_cancels_what_waits_and_writes_every_row(tmp_path: Path) -> None:
    """The running request is finished, the waiting ones are CANCELLED, all have replies and rows."""
    with Serving(out=tmp_path) as serving:
        serving.servable.gate.clear()
        client = serving.client()
        client.send(b"running")
        serving.servable.entered.wait(60)
        client.send(b"a", b"b")
        until(lambda: serving.ask(Stats())["queue_len"] == 2)
        channel = serving.channel()
        id = channel.send(Stop())
        cancelled = client.receive(2)
        assert {frame.header.status for frame in cancelled.values()} == {Status.CANCELLED}
        serving.servable.gate.set()
        assert client.receive(1)[0].header.status == Status.OK
        body = channel.wait_reply(id, 60.0)
        assert (body["completed"], body["cancelled"], body["rows"]) == (1, 2, 3)
        serving.join()
        with pytest.raises((PeerClosed, OSError)):
            serving.channel()
    assert sorted(row["status"] for row in csv_rows(tmp_path)) == ["CANCELLED", "CANCELLED", "OK"]
    assert serving.final is not None
    assert serving.final.counts.received == 3


def test_rows_reach_the_disk_while_serving(tmp_path: Path) -> None:
    """Without DRAIN or STOP every row is in the file within its second or so."""
    with Serving(out=tmp_path) as serving:
        client = serving.client()
        for _ in range(10):
            client.ask(b"x")
        until(lambda: len(csv_rows(tmp_path)) == 10)


def test_rows_reach_the_disk_under_steady_load(tmp_path: Path) -> None:
    """A server that is never quiet writes too, in slices between polls."""
    with Serving(out=tmp_path) as serving:
        client, end = serving.client(), time.monotonic() + 60
        while not csv_rows(tmp_path):
            client.ask(b"x")
            assert time.monotonic() < end


def test_a_full_disk_ends_the_rows_and_not_the_service(tmp_path: Path) -> None:
    """The fault is said once, requests are answered on, and serve() raises it at the end."""
    with Serving(out=tmp_path) as serving:
        client = serving.client()
        assert serving.server._rows is not None

        def refuse(data: bytes) -> None:
            raise OSError(28, "No space left on device")

        serving.server._rows._write = refuse  # type: ignore[method-assign]
        client.ask(b"x")
        until(lambda: any("No space left" in line for line in serving.lines))
        assert client.ask(b"x").header.status == Status.OK
        serving.stop()
    assert isinstance(serving.error, RunFault)


def test_warm_up_is_outside_the_queue_and_an_event(tmp_path: Path) -> None:
    """WARMUP answers its times and leaves no rows and no counts; after LOAD it happened by itself."""
    with Serving(out=tmp_path, warmup=2) as serving:
        assert len(serving.servable.batches) == 2
        assert len(serving.ask(Warmup(3))["ms"]) == 3
        assert serving.ask(Stats())["received"] == 0
        serving.stop()
    assert csv_rows(tmp_path) == []
    kinds = [line.split(",")[1] for line in (tmp_path / "events.csv").read_text().splitlines()[1:]]
    assert kinds == ["start", "load", "warmup", "ready", "warmup", "drain", "stop"]


def test_statistics_say_nothing_they_cannot_support() -> None:
    """p50 is None below 11 answers and p99 below 662; then they are positive."""
    with Serving() as serving:
        channel, client = serving.channel(), serving.client()
        client.send(*[b"x"] * 10)
        client.receive(10)
        body = channel.request(Stats())
        assert (body["recent_p50_ms"], body["recent_p99_ms"]) == (None, None)
        client.send(*[b"x"] * 700)
        client.receive(700)
        body = channel.request(Stats())
        assert 0 < body["recent_p50_ms"] <= body["recent_p99_ms"]
        assert (body["model"], body["queue_len"], body["connections"]) == ("fake", 0, 2)


def test_a_dead_model_thread_ends_the_server() -> None:
    """An error outside the engine (a policy that breaks) is raised from serve(), never a silent hang."""
    with Serving() as serving:

        def broken(now_ns: int) -> Any:
            raise LookupError("the policy broke")

        serving.server.queue._policy.pop = broken  # type: ignore[method-assign]
        serving.client().send(b"x")
        serving.join()
    assert isinstance(serving.error, RunFault)
    assert "the policy broke" in str(serving.error)


def test_a_model_thread_with_nothing_to_do_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a busy model is left behind at the end; an idle one may need a while to be scheduled."""
    with Serving() as serving:
        worker, waited = serving.server.worker, []
        join = worker.join

        def remember(timeout_s: float) -> bool:
            waited.append(timeout_s)
            return join(timeout_s)

        monkeypatch.setattr(worker, "join", remember)
        serving.stop()
    assert waited == [IDLE_JOIN_S]
    assert not serving.server.abandoned


def test_a_port_in_use_is_bad_input() -> None:
    """The second server on a port is refused before it loads anything."""
    with Serving() as serving, pytest.raises(InputError, match="choose another"):
        Serving(address=serving.server.address)


def test_the_reader_of_a_connection_is_its_own() -> None:
    """Half a frame on one connection does not hold up another."""
    with Serving() as serving:
        slow, quick = serving.client(), serving.client()
        data = pack_request(Kind.INFER, 0, 0, 6) + b"in two"
        slow.sock.sendall(data[:66])
        assert quick.ask(b"x").header.status == Status.OK
        slow.sock.sendall(data[66:])
        assert slow.receive(1)[0].payload == b"reply to in two"
