"""The router over real sockets: servers that echo, misbehave or go away on one side, clients on the other."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from corun.clock import NS_PER_MS, now_ns
from corun.errors import PeerClosed, RunFault
from corun.tasks.commands import RouterControl
from corun.tasks.router import Router, RouterOptions
from corun.tasks.routing import Limits, Pending, Routing
from corun.testing.ask import Asker
from corun.testing.echo import Behaviour, EchoServer
from corun.wire import (
    PART,
    STREAM,
    Address,
    Kind,
    ReplyReader,
    RequestHeader,
    RequestReader,
    Status,
    connect,
    pack_reply,
    pack_request,
    reply_flags,
)
from corun.wire.channel import Channel
from corun.wire.frames import NO_STAMPS
from corun.wire.messages import Hello, Load

LOOPBACK = Address("tcp", "127.0.0.1", 0)


class Stop:
    """A StopSignal without the signals, for a router in a thread."""

    def __init__(self) -> None:
        self.requested = False
        self._read, self._write = socket.socketpair()

    def fileno(self) -> int:
        return self._read.fileno()

    def request(self) -> None:
        self._write.send(b"x")

    def close(self) -> None:
        self._read.close()
        self._write.close()


class Running:
    """A router in a thread of this process, its control client, and what it said."""

    def __init__(self, directory: Path, limits: Limits, finish_s: float) -> None:
        self.said: list[str] = []
        control = Address("unix", str(directory / "c.sock"))
        self.router = Router(RouterOptions(LOOPBACK, control, "router", limits, finish_s), self.said.append)
        self.stop = Stop()
        self.control = RouterControl(control, timeout_s=60.0)
        self.address = self.router.address
        self._thread = threading.Thread(target=self.router.run, args=(self.stop,), daemon=True)
        self._thread.start()

    def add(self, name: str, address: Address) -> None:
        self.control.add(name, address)
        self.until(lambda figures: any(one.name == name and one.state == "ready" for one in figures.replicas))

    def until(self, condition: Callable[[Any], bool]) -> Any:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            figures = self.control.stats()
            if condition(figures):
                return figures
            time.sleep(0.005)
        raise AssertionError((figures, self.said))

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.control.close()
        self.stop.close()


@pytest.fixture
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """Routers that end with the test."""
    made: list[Running] = []

    def make(finish_s: float = 0.2, **limits: int) -> Running:
        made.append(Running(tmp_path_factory.mktemp("r"), Limits(**limits), finish_s))
        return made[-1]

    yield make
    for client in Client.made:
        client.sock.close()
    Client.made.clear()
    for one in made:
        if one.stop.fileno() >= 0:
            one.stop.request()
            one.join()


class Client:
    """Sends frames with the ids it likes and collects the replies by id."""

    made: ClassVar[list[Client]] = []

    def __init__(self, address: Address) -> None:
        self.made.append(self)
        self.sock = connect(address)
        self.sock.settimeout(60)
        self.reader = ReplyReader()

    def send(self, *ids: int, size: int = 100, stream: int = 0, flags: int = 0) -> None:
        for id in ids:
            header = pack_request(Kind.INFER, stream, id, size, now_ns(), now_ns(), flags=flags)
            self.sock.sendall(header + bytes(size))

    def replies(self, count: int) -> list[Any]:
        found: list[Any] = []
        while len(found) < count:
            found += self.reader.receive(self.sock)
        return found


@contextmanager
def silent_server() -> Iterator[tuple[Address, Callable[[], None]]]:
    """Accepts, reads and never answers; the second value breaks its connections."""
    listener = socket.create_server(("127.0.0.1", 0))
    socks: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                sock = listener.accept()[0]
            except OSError:
                return
            socks.append(sock)
            threading.Thread(target=_swallow, args=(sock,), daemon=True).start()

    def die() -> None:
        while not socks:
            time.sleep(0.001)
        _end(listener, thread)
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield Address("tcp", "127.0.0.1", listener.getsockname()[1]), die
    _end(listener, thread)


def _end(listener: socket.socket, thread: threading.Thread) -> None:
    """Close a listener that a thread accepts from: a blocked accept would outlive it and take another one's place."""
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(60)
    assert not thread.is_alive()
    listener.close()


def _swallow(sock: socket.socket) -> None:
    with sock, contextlib.suppress(OSError):
        while sock.recv(65536):
            pass


def test_clients_with_the_same_ids_get_their_own_replies(running: Callable[..., Running]) -> None:
    """Ids and streams are the client's own on both sides, however the replies are shuffled on the way."""
    router = running()
    with EchoServer(Behaviour(shuffle=4)) as server:
        router.add("a", server.address)
        first, second = Client(router.address), Client(router.address)
        first.send(7, 8, stream=1)
        second.send(8, 7, stream=2)
        mine, theirs = first.replies(2), second.replies(2)
        assert {(frame.header.stream, frame.header.id) for frame in mine} == {(1, 7), (1, 8)}
        assert {(frame.header.stream, frame.header.id) for frame in theirs} == {(2, 7), (2, 8)}
        assert all(frame.header.status == Status.OK and len(frame.payload) == 40 for frame in mine + theirs)
        assert all(frame.header.stamps[0] > 0 for frame in mine)


def test_requests_are_spread_over_replicas(running: Callable[..., Running]) -> None:
    """Two equal replicas get equal shares; large payloads arrive whole."""
    router = running()
    with EchoServer() as one, EchoServer() as two:
        router.add("a", one.address)
        router.add("b", two.address)
        client = Client(router.address)
        for id in range(10):
            client.send(id, size=300_000)
            assert client.replies(1)[0].header.id == id
        assert (one.infers, two.infers) == (5, 5)


def test_a_replica_that_dies_loses_nothing(running: Callable[..., Running]) -> None:
    """What it had not answered is answered by the other one, and the death is counted."""
    router = running()
    with silent_server() as (address, die), EchoServer() as good:
        router.add("bad", address)
        client = Client(router.address)
        client.send(*range(6))
        router.until(lambda figures: figures.outstanding == 6)
        router.add("good", good.address)
        die()
        assert sorted(frame.header.id for frame in client.replies(6)) == list(range(6))
        figures = router.control.stats()
        assert (figures.retried, figures.answered) == (6, {0: 6})
        assert next(one.lost for one in figures.replicas if one.name == "bad") == 6


def test_a_replica_that_sends_garbage_or_half_a_reply_is_left(running: Callable[..., Running]) -> None:
    """Bytes that are no frame, and a connection closed inside one, cost one retry and no answer."""
    for behaviour in (Behaviour(garbage_at=1), Behaviour(close_at=1)):
        router = running()
        with EchoServer(behaviour) as bad, EchoServer() as good:
            router.add("bad", bad.address)
            client = Client(router.address)
            router.add("good", good.address)
            client.send(*range(4))
            assert sorted(frame.header.id for frame in client.replies(4)) == [0, 1, 2, 3]


def test_a_replica_that_comes_back_is_used_again(running: Callable[..., Running], tmp_path: Path) -> None:
    """Its connection is made anew, and what was held meanwhile is answered."""
    router, address = running(hold_ns=60_000 * NS_PER_MS), Address("unix", str(tmp_path / "s"))
    with EchoServer(address=address) as server:
        router.add("a", server.address)
    client = Client(router.address)
    router.until(lambda figures: not figures.replicas[0].connected)
    client.send(1)
    with EchoServer(address=address):
        assert client.replies(1)[0].header.status == Status.OK


class _FromThePortItself(socket.socket):
    """Is given the very port it connects to, as the kernel does once in some thousand times."""

    def connect_ex(self, address: Any) -> int:
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.bind(address)
        return super().connect_ex(address)


def test_a_router_never_takes_itself_for_a_replica(
    running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that meets itself on the port of a replica that is gone is given up, so that it can come back."""
    router = running()
    with EchoServer() as gone:
        address = gone.address
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", _FromThePortItself)
        router.control.add("a", address)
        deadline = time.monotonic() + 60
        while router.router.routing.replicas["a"].link.failures < 1 and time.monotonic() < deadline:
            time.sleep(0.005)
    figures = router.until(lambda figures: not figures.replicas[0].connected)
    assert figures.replicas[0].state == "down"
    with EchoServer(address=address):
        router.until(lambda figures: figures.replicas[0].state == "ready")


def test_a_drained_replica_is_forgotten_once_it_has_answered(running: Callable[..., Running]) -> None:
    """Nothing new goes there; its last reply still arrives."""
    router = running()
    with EchoServer(Behaviour(stall_at=1, stall_s=60.0)) as old, EchoServer() as new:
        router.add("old", old.address)
        client = Client(router.address)
        client.send(1, 2)
        router.until(lambda figures: figures.outstanding == 2)
        router.add("new", new.address)
        router.control.drain("old")
        client.send(3)
        assert [(frame.header.id, frame.header.status) for frame in client.replies(1)] == [(3, int(Status.OK))]
        old.go_on.set()
        assert {frame.header.status for frame in client.replies(2)} == {int(Status.OK)}
        router.until(lambda figures: [one.name for one in figures.replicas] == ["new"])
        assert (old.infers, new.infers) == (2, 1)


def test_over_the_limit_the_answer_is_rejected(running: Callable[..., Running]) -> None:
    """The router never holds more than it may; the rest is told at once, with a reason."""
    router = running(requests=3)
    with silent_server() as (address, _):
        router.add("a", address)
        client = Client(router.address)
        client.send(0, 1, 2, 3, 4)
        replies = client.replies(2)
        assert [(frame.header.id, frame.header.status) for frame in replies] == [(3, 1), (4, 1)]
        assert b"send fewer" in replies[0].payload


def test_without_replicas_requests_end_not_loaded(running: Callable[..., Running]) -> None:
    """After hold_ns the answer says that no replica is ready."""
    router = running(hold_ns=NS_PER_MS)
    with Asker(router.address) as asker:
        answer = asker.ask(b"x")
    assert answer.status == Status.NOT_LOADED
    assert b"no replica is ready" in answer.payload


def test_a_silent_replica_is_given_up(running: Callable[..., Running]) -> None:
    """An answer that does not come within answer_ns ends EXPIRED; nobody waits for ever."""
    router = running(answer_ns=20 * NS_PER_MS)
    with silent_server() as (address, _), Asker(router.address) as asker:
        router.add("a", address)
        assert asker.ask(b"x").status == Status.EXPIRED


def test_a_client_that_sends_garbage_harms_nobody_else(running: Callable[..., Running]) -> None:
    """Its connection is closed with a reason; the others are served."""
    router = running()
    with EchoServer() as server:
        router.add("a", server.address)
        bad, good = Client(router.address), Client(router.address)
        bad.sock.sendall(b"GET / HTTP/1.1\r\n".ljust(64, b"\n"))
        with pytest.raises(PeerClosed):
            bad.replies(1)
        good.send(1)
        assert good.replies(1)[0].header.status == Status.OK
    assert any("not a corun frame" in line for line in router.said)


def test_a_client_that_leaves_is_not_answered(running: Callable[..., Running]) -> None:
    """Its reply is dropped and counted as answered; the router goes on."""
    router = running()
    with EchoServer(Behaviour(delay_s=0.05)) as server:
        router.add("a", server.address)
        client = Client(router.address)
        client.send(1)
        router.until(lambda figures: figures.received == 1)
        client.sock.close()
        router.until(lambda figures: figures.answered == {0: 1} and figures.clients == 0)


def test_hello_and_clock_are_a_replicas_and_load_is_refused(running: Callable[..., Running]) -> None:
    """A client finds the model behind the router; without one it sees the router itself; nobody changes the model."""
    router = running()
    client = Client(router.address)
    channel = Channel(client.sock)
    assert channel.request(Hello("client"))["model"] == ""
    with EchoServer(Behaviour(clock_offset_ns=10**12)) as server:
        router.add("a", server.address)
        assert channel.request(Hello("client"))["model"] == "null"
        assert channel.clock_offset(2).offset_ns > 10**11
        with pytest.raises(RunFault, match="does not answer LOAD"):
            channel.request(Load("other"))
        assert server.loads == []


def test_latencies_are_numbered_so_that_nothing_is_counted_twice(running: Callable[..., Running]) -> None:
    """`since` the last answer's `next_latency` gives each latency once."""
    router = running()
    with EchoServer() as server:
        router.add("a", server.address)
        client = Client(router.address)
        client.send(1, 2)
        client.replies(2)
        figures = router.until(lambda figures: figures.next_latency == 2)
        assert len(figures.latencies_us) == 2
        client.send(3)
        client.replies(1)
        later = router.until(lambda figures: figures.next_latency == 3)
        assert len(router.control.stats(figures.next_latency).latencies_us) == 1
        assert router.control.stats(later.next_latency).latencies_us == []


def test_bad_commands_are_answered_with_a_sentence(running: Callable[..., Running]) -> None:
    """Unknown names, taken names, bad addresses and lines that are no command change nothing."""
    router = running()
    with pytest.raises(RunFault, match='no replica "x"'):
        router.control.drain("x")
    router.control.add("a", Address("tcp", "127.0.0.1", 9))
    with pytest.raises(RunFault, match="already is"):
        router.control.add("a", Address("tcp", "127.0.0.1", 9))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(router.control.address.target)
        for line in (b"nonsense\n", b'{"do": "explode"}\n', b'{"do": "add", "name": "b", "address": "nowhere"}\n'):
            sock.sendall(line)
            told = msgspec.json.decode(sock.recv(65536))
            assert not told["ok"]
            assert told["error"]
    assert [one.name for one in router.control.stats().replicas] == ["a"]
    router.control.remove("a")
    assert router.control.stats().replicas == []


def test_stopping_finishes_what_is_open(running: Callable[..., Running]) -> None:
    """After a stop new requests are answered DRAINING and the one under way with its result."""
    router = running(finish_s=60.0)
    with EchoServer(Behaviour(stall_at=1, stall_s=60.0)) as server:
        router.add("a", server.address)
        client = Client(router.address)
        client.send(1)
        router.until(lambda figures: figures.outstanding == 1)
        router.stop.request()
        deadline = time.monotonic() + 60
        while not any("finishes" in line for line in router.said) and time.monotonic() < deadline:
            time.sleep(0.001)
        client.send(2)
        assert [(frame.header.id, frame.header.status) for frame in client.replies(1)] == [(2, int(Status.DRAINING))]
        server.go_on.set()
        assert [(frame.header.id, frame.header.status) for frame in client.replies(1)] == [(1, int(Status.OK))]
    router.join()


@contextmanager
def talking_server() -> Iterator[tuple[Address, list[Any]]]:
    """Sends two parts of an answer, then waits for CANCEL and ends it CANCELLED; the frames it received."""
    listener = socket.create_server(("127.0.0.1", 0))
    received: list[Any] = []

    def serve() -> None:
        try:
            sock = listener.accept()[0]
        except OSError:
            return
        reader = RequestReader()
        with contextlib.suppress(PeerClosed, OSError), sock:
            while True:
                for frame in reader.receive(sock):
                    received.append(frame.header)
                    header = frame.header
                    if header.kind == Kind.INFER:
                        for made in (1, 2):
                            flags = reply_flags(made, part=True)
                            sock.sendall(
                                pack_reply(Kind.REPLY, header.stream, header.id, 0, NO_STAMPS, 2, 0, flags) + b"ab"
                            )
                    elif header.kind == Kind.CANCEL:
                        sock.sendall(pack_reply(Kind.REPLY, header.stream, header.id, Status.CANCELLED, NO_STAMPS, 0))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield Address("tcp", "127.0.0.1", listener.getsockname()[1]), received
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def test_an_answer_in_parts_is_passed_on_and_can_be_taken_back(running: Callable[..., Running]) -> None:
    """Parts arrive as they are made; CANCEL reaches the replica that makes them, and its CANCELLED is not retried."""
    router = running()
    with talking_server() as (address, received), EchoServer() as other:
        router.add("a", address)
        client = Client(router.address)
        client.send(7, stream=3, flags=STREAM)
        parts = client.replies(2)
        assert [(frame.header.id, bool(frame.header.flags & PART), bytes(frame.payload)) for frame in parts] == [
            (7, True, b"ab")
        ] * 2
        router.add("b", other.address)
        client.sock.sendall(pack_request(Kind.CANCEL, 3, 7, 0))
        last = client.replies(1)[0]
        assert (last.header.id, last.header.status, last.header.flags & PART) == (7, Status.CANCELLED, 0)
        assert received[1].id == received[0].id
        assert other.infers == 0


def test_an_answer_that_has_begun_is_not_begun_again_elsewhere(running: Callable[..., Running]) -> None:
    """A replica that dies after the first part costs the request its answer: nobody gets the first tokens twice."""
    table: list[tuple[int, int]] = []
    limits = Limits()
    routing: Routing[str, None] = Routing(
        limits, lambda *_: None, lambda one, status, _: table.append((one.header.id, status))
    )
    for name in "ab":
        routing.ready(routing.add(name, None), 1)
    request = Pending("me", RequestHeader(Kind.INFER, STREAM, 0, 5, 0, 0, 0, 0), b"", 1)
    routing.submit(request, 1)
    replica = routing.replicas["a"]
    assert routing.part(replica, next(iter(replica.outstanding)), 2) is request
    routing.fail(replica, 3)
    assert table == [(5, Status.FAILED)]


def test_a_request_that_waits_can_be_taken_back() -> None:
    """CANCEL of a request no replica has yet ends it at once; one that is not there changes nothing."""
    ends: list[Status] = []
    routing: Routing[str, None] = Routing(Limits(), lambda *_: None, lambda _one, status, _: ends.append(status))
    routing.submit(Pending("me", RequestHeader(Kind.INFER, 0, 2, 5, 0, 0, 0, 0), b"", 1), 1)
    assert routing.take_back("me", 2, 6) is None
    assert routing.take_back("you", 2, 5) is None
    assert ends == []
    assert routing.take_back("me", 2, 5) is None
    assert ends == [Status.CANCELLED]
    assert routing.open == 0
