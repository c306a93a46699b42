"""One address for all replicas of a task: protocol v1 on both sides, the least loaded replica in between.

    clients ──▶ epoll ─▶ routing table ─▶ one connection per replica ──▶ servers      one thread, no asyncio
            ◀── id restored ◀── replies in any order ◀──
    control socket (corun.tasks.commands): add, drain, remove, stats

A frame is passed on with a request id of the router's own, so clients need not agree on theirs, and every stamp as it
came: the stages that a client sees are the replica's, and the way through the router shows up as network time. Peers
that misbehave are cut off, as in the server; a replica whose connection breaks is connected to again, with back-off,
until somebody removes it.

    python -m corun.tasks.router --listen 127.0.0.1:54100 --control unix:/tmp/router.sock --replica 127.0.0.1:54101
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import socket
from array import array
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Protocol

import msgspec
import typer

from corun import __version__
from corun.clock import NS_PER_MS, NS_PER_S, now_ns
from corun.errors import CorunError, FrameError, InputError, PeerClosed, RunFault, guard
from corun.process import StopSignal, die_with_parent
from corun.serve.connection import Connection
from corun.tasks.commands import (
    Add,
    Command,
    Drain,
    Finish,
    Remove,
    ReplicaFigures,
    RouterFigures,
    Stats,
    Told,
    decode_command,
    encode,
)
from corun.tasks.routing import Limits, Pending, Replica, Routing, State
from corun.wire import (
    PART,
    STREAM,
    Address,
    Kind,
    ReplyReader,
    RequestHeader,
    Status,
    listen,
    pack_reply,
    pack_request,
)
from corun.wire.frames import NO_STAMPS
from corun.wire.messages import Hello
from corun.wire.sockets import meets_itself

__all__ = ["Router", "RouterOptions"]

EPOLLIN, EPOLLOUT = select.EPOLLIN, select.EPOLLOUT
INFER, CANCEL, REPLY, OK = int(Kind.INFER), int(Kind.CANCEL), int(Kind.REPLY), int(Status.OK)
PASSED_ON = frozenset({int(Kind.HELLO), int(Kind.CLOCK)})
OF_ROUTER = 1 << 62
TICK_S = 0.1
RETRY_FIRST_NS = 50 * NS_PER_MS
RETRY_MOST_NS = NS_PER_S
LATENCIES = 8192
COMMAND_LIMIT = 64 << 10

Request = Pending[Connection]


class StopRequest(Protocol):
    """What asks the router to finish: corun.process.StopSignal."""

    requested: bool

    def fileno(self) -> int: ...


class Link:
    """The way to one replica; connection: None while there is none. retry_at_ns: next attempt to make one."""

    __slots__ = ("address", "connecting", "connection", "failures", "retry_at_ns")

    def __init__(self, address: Address) -> None:
        self.address = address
        self.connection: Connection | None = None
        self.connecting: socket.socket | None = None
        self.failures = 0
        self.retry_at_ns = 0


Target = Replica[Connection, Link]


class RouterOptions(msgspec.Struct, frozen=True):
    """Where a router listens and how much it holds; finish_s: how long a stopping router waits for answers."""

    listen: Address
    control: Address | None = None
    name: str = "router"
    limits: Limits = Limits()
    finish_s: float = 10.0


def _print(line: str) -> None:
    print(line, flush=True)


class Router:
    """Listens from the moment it is made; `run` is its loop, in the caller's thread.

    Raises InputError when an address cannot be had.
    """

    def __init__(self, options: RouterOptions, say: Callable[[str], None] = _print) -> None:
        self.options = options
        self.routing: Routing[Connection, Link] = Routing(options.limits, self._send, self._refuse)
        self._say = say
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._clients: dict[int, Connection] = {}
        self._asked: dict[int, tuple[Connection, RequestHeader, Target]] = {}
        self._next_ask = OF_ROUTER
        self._latencies = array("q")
        self._first_latency = 0
        self._stop_by_ns = 0
        self._turning_away = False
        self._resting: list[socket.socket] = []
        self._listener = self._listen(options.listen, self._accept)
        self.address = _bound(options.listen, self._listener)
        self._control = self._listen(options.control, self._accept_control) if options.control else None
        self._commanders: set[socket.socket] = set()

    def _listen(self, address: Address, accept: Callable[[int], None]) -> socket.socket:
        sock = listen(address)
        sock.setblocking(False)
        self._watch(sock.fileno(), EPOLLIN, accept)
        return sock

    # The loop

    def run(self, stop: StopRequest | None = None) -> None:
        """Route until `stop`; what is open then may finish within options.finish_s."""
        if stop:
            self._watch(stop.fileno(), EPOLLIN, partial(self._finish, stop))
        self._say(f"{self.options.name} routes on {self.address}, pid {os.getpid()}")
        gc.collect()
        gc.freeze()
        try:
            self._loop()
        finally:
            gc.unfreeze()
            self._close()

    def _loop(self) -> None:
        poll, handlers = self._epoll.poll, self._handlers
        next_tick = 0
        while not (self._stop_by_ns and self._finished()):
            for fd, events in poll(TICK_S):
                handler = handlers.get(fd)
                if handler is not None:
                    handler(events)
            now = now_ns()
            if now >= next_tick:
                next_tick = now + round(TICK_S * NS_PER_S)
                self._tick(now)

    def _tick(self, now: int) -> None:
        self.routing.expire(now)
        while self._resting:
            self._epoll.modify(self._resting.pop().fileno(), EPOLLIN)
        for replica in list(self.routing.replicas.values()):
            link = replica.link
            if replica.state is State.DRAINING:
                self._forget_if_drained(replica)
            elif replica.state is State.DOWN and now >= link.retry_at_ns and not replica.outstanding:
                self._reconnect(replica)

    def _finish(self, stop: StopRequest, _events: int) -> None:
        self._unwatch(stop.fileno())
        self._turning_away = True
        self._stop_by_ns = now_ns() + round(self.options.finish_s * NS_PER_S)
        self._say(f"{self.options.name} finishes: {self.routing.open} requests are open")

    def _finished(self) -> bool:
        if now_ns() > self._stop_by_ns:
            self.routing.cancel(now_ns())
            return True
        return not self.routing.open and not any(client.backlog_bytes for client in self._clients.values())

    def _close(self) -> None:
        routing = self.routing
        self._say(f"{self.options.name} stopped: {routing.received} received, {_words(routing.answered)}")
        for client in list(self._clients.values()):
            client.close()
        for replica in list(routing.replicas.values()):
            self._disconnect(replica)
        for commander in self._commanders:
            commander.close()
        for sock, address in ((self._listener, self.options.listen), (self._control, self.options.control)):
            if sock is not None and address is not None:
                sock.close()
                if address.scheme == "unix":
                    with contextlib.suppress(OSError):
                        os.unlink(address.host)
        self._epoll.close()

    def _watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def _unwatch(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    # Clients

    def _accept(self, _events: int) -> None:
        while (sock := self._accepted(self._listener)) is not None:
            client = Connection(sock, self._epoll)
            self._clients[client.fd] = client
            self._handlers[client.fd] = partial(self._serve_client, client)

    def _accepted(self, listener: socket.socket) -> socket.socket | None:
        """The next connection; where there are no descriptors left the listener rests until the next tick."""
        try:
            return listener.accept()[0]
        except BlockingIOError:
            return None
        except OSError as error:
            self._say(f"cannot accept: {error.strerror or error}")
            self._epoll.modify(listener.fileno(), 0)
            self._resting.append(listener)
            return None

    def _serve_client(self, client: Connection, events: int) -> None:
        if events & EPOLLOUT:
            client.flush()
        if not events & ~EPOLLOUT:
            return
        if client.reason:
            self._drop_client(client, client.reason)
            return
        try:
            frames: list[Any] = client.reader.receive(client.sock)
        except PeerClosed as error:
            self._drop_client(client, str(error) if client.reader.mid_frame else "")
            return
        except FrameError as error:
            self._drop_client(client, str(error))
            return
        for header, payload, _, t_done in frames:
            if header.kind == CANCEL:
                self._take_back(client, header)
            elif header.kind != INFER:
                self._ask(client, header, payload)
            elif self._turning_away:
                self.routing.turn_away(Pending(client, header, payload, t_done))
            else:
                self.routing.submit(Pending(client, header, payload, t_done), t_done)

    def _take_back(self, client: Connection, header: RequestHeader) -> None:
        found = self.routing.take_back(client, header.stream, header.id)
        if found is not None and (connection := found[0].link.connection) is not None:
            connection.send(pack_request(CANCEL, header.stream, found[1], 0, header.t_intended, header.t_tx), b"")

    def _drop_client(self, client: Connection, reason: str) -> None:
        """Its requests stay with the replicas that have them; the answers are dropped, those in parts ended."""
        if reason:
            self._say(f"closed the connection of {client.peer}: {reason}")
        for header in self.routing.headers_of(client):
            if header.flags & STREAM:
                self._take_back(client, header)
        self._clients.pop(client.fd, None)
        self._handlers.pop(client.fd, None)
        client.close()

    def _refuse(self, request: Request, status: Status, reason: str) -> None:
        header, received = request.header, request.received_ns
        body = msgspec.json.encode({"error": reason})
        stamps = (received, received, *NO_STAMPS[3:], now_ns())
        request.client.send(pack_reply(REPLY, header.stream, header.id, status, stamps, len(body)), body)

    # Control frames on the data port

    def _ask(self, client: Connection, header: RequestHeader, payload: bytes) -> None:
        """HELLO and CLOCK are a replica's to answer: its model, its clock. The rest is refused."""
        target = next((one for one in self.routing.replicas.values() if one.state is State.READY), None)
        if header.kind not in PASSED_ON:
            name = Kind(header.kind).name
            _answer(client, header, Status.FAILED, {"error": f"a router does not answer {name}; ask a replica"})
        elif target is not None and target.link.connection is not None:
            id, self._next_ask = self._next_ask, self._next_ask + 1
            self._asked[id] = (client, header, target)
            packed = pack_request(header.kind, header.stream, id, len(payload), header.t_intended, header.t_tx)
            target.link.connection.send(packed, payload)
        elif header.kind == Kind.HELLO:
            hello = Hello("server", self.options.name, os.getpid(), __version__, clock_ns=now_ns())
            _answer(client, header, Status.OK, msgspec.structs.asdict(hello))
        else:
            _answer(client, header, Status.FAILED, {"error": "no replica is ready"})

    def _answered(self, header: Any, payload: bytes) -> None:
        client, asked, _ = self._asked.pop(header.id, (None, None, None))
        if client is None or asked is None:
            self.routing.strays += 1
            return
        client.send(
            pack_reply(header.kind, header.stream, asked.id, header.status, header.stamps, len(payload)), payload
        )

    # Replicas

    def _send(self, replica: Target, id: int, request: Request) -> None:
        connection = replica.link.connection
        if connection is None:
            return
        header = request.header
        packed = pack_request(
            INFER,
            header.stream,
            id,
            header.payload_len,
            header.t_intended,
            header.t_tx,
            header.shape,
            header.flags,
        )
        connection.send(packed, request.payload)

    def _serve_replica(self, replica: Target, events: int) -> None:
        connection = replica.link.connection
        if connection is None:
            return
        if events & EPOLLOUT:
            connection.flush()
        if not events & ~EPOLLOUT:
            return
        try:
            frames: list[Any] = connection.reader.receive(connection.sock)
        except (PeerClosed, FrameError) as error:
            self._lose(replica, connection.reason or str(error))
            return
        complete = self.routing.complete
        for header, payload, _, t_done in frames:
            if header.kind != REPLY:
                self._answered(header, payload)
                continue
            if header.flags & PART:
                self._pass_part(replica, header, payload, t_done)
                continue
            request = complete(replica, header.id, header.status, t_done)
            if request is not None:
                self._pass_back(request, header, payload, t_done)
        if replica.state is not State.READY:
            replica.link.retry_at_ns = now_ns() + RETRY_MOST_NS
            self._forget_if_drained(replica)

    def _pass_back(self, request: Request, header: Any, payload: bytes, t_done: int) -> None:
        _, flags, stream, _, status, stamps, size, batch = header
        packed = pack_reply(REPLY, stream, request.header.id, status, stamps, size, batch, flags)
        request.client.send(packed, payload)
        if status == OK:
            self._latencies.append((t_done - request.received_ns) // 1000)
            if len(self._latencies) >= 2 * LATENCIES:
                del self._latencies[:LATENCIES]
                self._first_latency += LATENCIES

    def _pass_part(self, replica: Target, header: Any, payload: bytes, t_done: int) -> None:
        request = self.routing.part(replica, header.id, t_done)
        if request is not None:
            _, flags, stream, _, status, stamps, size, batch = header
            packed = pack_reply(REPLY, stream, request.header.id, status, stamps, size, batch, flags)
            request.client.send(packed, payload)

    def _forget_if_drained(self, replica: Target) -> None:
        if replica.state is State.DRAINING and not replica.outstanding:
            self.routing.remove(replica.name, now_ns())
            self._disconnect(replica)
            self._say(f"replica {replica.name} is drained")

    def _lose(self, replica: Target, reason: str) -> None:
        self._say(f"lost replica {replica.name} on {replica.link.address}: {reason}")
        self._disconnect(replica)
        replica.link.retry_at_ns = now_ns() + RETRY_FIRST_NS
        self.routing.fail(replica, now_ns())
        self._forget_if_drained(replica)

    def _disconnect(self, replica: Target) -> None:
        link = replica.link
        connection, link.connection = link.connection, None
        connecting, link.connecting = link.connecting, None
        if connection is not None:
            self._handlers.pop(connection.fd, None)
            connection.close()
        if connecting is not None:
            self._unwatch(connecting.fileno())
            connecting.close()
        for id in [id for id, (_, _, target) in self._asked.items() if target is replica]:
            client, header, _ = self._asked.pop(id)
            _answer(client, header, Status.FAILED, {"error": f"replica {replica.name} went away"})

    def _reconnect(self, replica: Target) -> None:
        """Begin a connection; one that is open although the replica turned requests away is made anew."""
        self._disconnect(replica)
        link = replica.link
        sock = socket.socket(link.address.family, socket.SOCK_STREAM)
        sock.setblocking(False)
        link.retry_at_ns = now_ns() + RETRY_MOST_NS
        code = sock.connect_ex(link.address.target)
        if code in (0, errno.EINPROGRESS):
            link.connecting = sock
            self._watch(sock.fileno(), EPOLLOUT, partial(self._connected, replica))
            return
        sock.close()
        self._failed(link)

    def _connected(self, replica: Target, _events: int) -> None:
        link = replica.link
        sock, link.connecting = link.connecting, None
        if sock is None:
            return
        self._unwatch(sock.fileno())
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or meets_itself(sock):
            sock.close()
            self._failed(link)
            return
        connection: Any = Connection(sock, self._epoll)
        connection.reader = ReplyReader()
        link.connection, link.failures = connection, 0
        self._handlers[connection.fd] = partial(self._serve_replica, replica)
        self.routing.ready(replica, now_ns())

    def _failed(self, link: Link) -> None:
        link.retry_at_ns = now_ns() + min(RETRY_FIRST_NS << min(link.failures, 10), RETRY_MOST_NS)
        link.failures += 1

    # Control socket

    def _accept_control(self, _events: int) -> None:
        assert self._control is not None
        while (sock := self._accepted(self._control)) is not None:
            sock.setblocking(False)
            self._commanders.add(sock)
            self._watch(sock.fileno(), EPOLLIN, partial(self._serve_control, sock, bytearray()))

    def _serve_control(self, sock: socket.socket, buffer: bytearray, _events: int) -> None:
        try:
            received = sock.recv(COMMAND_LIMIT)
            buffer += received
            while (end := buffer.find(b"\n")) >= 0:
                line = encode(self._told(bytes(buffer[:end]))) + b"\n"
                del buffer[: end + 1]
                if sock.send(line) < len(line):
                    raise ConnectionAbortedError("it does not read its answers")
            if received and len(buffer) < COMMAND_LIMIT:
                return
        except BlockingIOError:
            pass
        except OSError as error:
            self._say(f"closed a control connection: {error}")
        self._unwatch(sock.fileno())
        self._commanders.discard(sock)
        sock.close()

    def _told(self, line: bytes) -> Told:
        try:
            return self._do(decode_command(line))
        except CorunError as error:
            return Told(False, str(error))

    def _do(self, command: Command) -> Told:
        match command:
            case Add():
                self.add(command.name, Address.parse(command.address))
            case Drain():
                self.drain(command.name)
            case Remove():
                self.remove(command.name)
            case Finish():
                self._turning_away = True
            case Stats():
                return Told(True, stats=self.figures(command.since))
        return Told(True)

    def add(self, name: str, address: Address) -> None:
        """Begin to use a server; RunFault when the name is taken."""
        try:
            replica = self.routing.add(name, Link(address))
        except ValueError as error:
            raise RunFault(str(error)) from None
        self._reconnect(replica)

    def drain(self, name: str) -> None:
        """Send it nothing more; forgotten once it has answered everything. RunFault without such a replica."""
        self._known(name)
        self._forget_if_drained(self.routing.drain(name))

    def remove(self, name: str) -> None:
        """Forget it at once. RunFault without such a replica."""
        self._known(name)
        self._disconnect(self.routing.remove(name, now_ns()))

    def _known(self, name: str) -> None:
        if name not in self.routing.replicas:
            known = ", ".join(self.routing.replicas) or "none"
            raise RunFault(f'there is no replica "{name}"; there are: {known}')

    def figures(self, since: int = 0) -> RouterFigures:
        """Everything it counts, with the latencies numbered `since` and later."""
        routing, now = self.routing, now_ns()
        end = self._first_latency + len(self._latencies)
        first = max(since, self._first_latency, end - LATENCIES)
        return RouterFigures(
            now_ns=now,
            pid=os.getpid(),
            address=str(self.address),
            received=routing.received,
            answered=dict(routing.answered),
            retried=routing.retried,
            strays=routing.strays,
            waiting=len(routing.waiting),
            outstanding=routing.outstanding,
            payload_bytes=routing.payload_bytes,
            clients=len(self._clients),
            latencies_us=self._latencies[first - self._first_latency :].tolist() if first < end else [],
            next_latency=end,
            replicas=[_figures(replica, now) for replica in routing.replicas.values()],
        )


def _figures(replica: Target, now: int) -> ReplicaFigures:
    link = replica.link
    return ReplicaFigures(
        name=replica.name,
        address=str(link.address),
        state=replica.state.value,
        connected=link.connection is not None,
        outstanding=len(replica.outstanding),
        answered=replica.answered,
        lost=replica.lost,
        busy_ns=replica.busy_until(now),
    )


def _answer(client: Connection, header: RequestHeader, status: Status, body: dict[str, Any]) -> None:
    payload = msgspec.json.encode(body)
    client.send(pack_reply(header.kind, header.stream, header.id, status, NO_STAMPS, len(payload)), payload)


def _bound(asked: Address, listener: socket.socket) -> Address:
    """The address with the port the kernel chose, where 0 was asked."""
    return asked if asked.scheme == "unix" else Address("tcp", asked.host, int(listener.getsockname()[1]))


def _words(answered: dict[int, int]) -> str:
    """`118 ok, 2 rejected`"""
    return ", ".join(f"{count} {Status(status).name.lower()}" for status, count in sorted(answered.items())) or "none"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DEFAULT = Limits()


@app.command()
def main(
    listen: Annotated[str, typer.Option(help="where clients connect, e.g. 127.0.0.1:54100 or unix:/tmp/task.sock")],
    control: Annotated[str | None, typer.Option(help="control socket, e.g. unix:/tmp/router.sock")] = None,
    replica: Annotated[list[str] | None, typer.Option(help="a server to begin with; may be repeated")] = None,
    name: Annotated[str, typer.Option(help="for its messages")] = "router",
    limit: Annotated[int, typer.Option(min=1, help="open requests; more are rejected")] = DEFAULT.requests,
    window: Annotated[int, typer.Option(min=1, help="outstanding requests per replica")] = DEFAULT.window,
    answer_s: Annotated[float, typer.Option(min=0.1, help="longest wait for an answer")] = DEFAULT.answer_ns
    / NS_PER_S,
    hold_s: Annotated[float, typer.Option(min=0, help="longest wait for a ready replica")] = DEFAULT.hold_ns
    / NS_PER_S,
    parent: Annotated[int | None, typer.Option(help="end when this process ends")] = None,
) -> None:
    """Route requests to replicas; SIGTERM or Ctrl-C once finishes what is open, Ctrl-C twice kills."""
    with guard(), StopSignal() as stop:
        if parent:
            die_with_parent(parent)
        limits = Limits(
            requests=limit, window=window, answer_ns=round(answer_s * NS_PER_S), hold_ns=round(hold_s * NS_PER_S)
        )
        if control and not control.startswith("unix:"):
            raise InputError(
                f"--control {control}: commands are taken over a Unix socket only, e.g. unix:/tmp/r.sock"
            )
        options = RouterOptions(Address.parse(listen), Address.parse(control) if control else None, name, limits)
        router = Router(options)
        for place in replica or []:
            router.add(place, Address.parse(place))
        router.run(stop)


if __name__ == "__main__":
    app()
