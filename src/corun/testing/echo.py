"""A server without a model, for tests and benchmarks of clients: it echoes at once, or misbehaves as told.

    with EchoServer(Behaviour(stall_at=150)) as server:        # a thread of this process
        connect(server.address)

    python -m corun.testing.echo --port 0 --delay-ms 5         # a process; prints its address

One thread per connection answers in order, so a delay or a stall makes a queue, as one model worker would.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from corun.clock import now_ns
from corun.errors import WireError
from corun.wire import STAMPS, Address, Frame, Kind, RequestHeader, RequestReader, Status, listen, pack_reply, tune
from corun.wire.frames import NO_STAMPS
from corun.wire.messages import Hello, Load, decode, encode


@dataclass(frozen=True)
class Behaviour:
    """What the server does to requests; counts are per connection, from 1, and 0 means never.

    delay_s: work per request. stall_at, stall_s: before answering that request it stands still once, for so long
    or until `go_on` of the server is set.
    never_reads: accepts and reads nothing. close_at: closes in the middle of that reply. garbage_at: sends
    bytes that are no frame instead of that reply. mute_at: swallows that request. reject_every: every n-th
    is answered REJECTED. shuffle: replies are held and sent in reversed groups of that size.
    clock_offset_ns: its clock minus the machine's. models: what LOAD accepts. host: as HELLO tells it.
    """

    delay_s: float = 0.0
    reply_bytes: int = 40
    stall_at: int = 0
    stall_s: float = 1.0
    never_reads: bool = False
    close_at: int = 0
    garbage_at: int = 0
    mute_at: int = 0
    repeat_at: int = 0
    reject_every: int = 0
    shuffle: int = 0
    clock_offset_ns: int = 0
    model: str = "null"
    models: tuple[str, ...] = ("null", "other")
    host: str = ""


class EchoServer:
    """Listens on `address` until the context is left; `loads` are the models clients asked for.

    go_on: ends a stall. stood_still: begin and end (CLOCK_MONOTONIC ns) of the stall that was.
    """

    def __init__(self, behaviour: Behaviour | None = None, address: Address | None = None) -> None:
        self.behaviour = behaviour or Behaviour()
        self.model = self.behaviour.model
        self.loads: list[str] = []
        self.infers = 0
        self.go_on = threading.Event()
        self.stood_still = (0, 0)
        self._listener = listen(address or Address("tcp", "127.0.0.1", 0))
        name = self._listener.getsockname()
        self.address = Address("unix", name) if isinstance(name, str) else Address("tcp", name[0], name[1])
        self._connections: list[socket.socket] = []
        self._over = False
        self._thread = threading.Thread(target=self.serve, daemon=True)

    def __enter__(self) -> EchoServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """End the accepting thread, then close what it used: its blocked accept would go on with another's descriptor."""
        self._over = True
        self.go_on.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for sock in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def serve(self) -> None:
        """Accept until the listener is closed."""
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(sock)
            if self._over:
                sock.close()
                return
            tune(sock)
            threading.Thread(target=_Connection(self, sock).serve, daemon=True).start()


@dataclass
class _Connection:
    server: EchoServer
    sock: socket.socket
    count: int = 0
    held: list[bytes] = field(default_factory=list)

    def serve(self) -> None:
        if self.server.behaviour.never_reads:
            return
        reader = RequestReader()
        with contextlib.suppress(WireError, OSError), self.sock:
            while True:
                for frame in reader.receive(self.sock):
                    self._answer(frame)

    def _answer(self, frame: Frame) -> None:
        header = frame.header
        assert isinstance(header, RequestHeader)
        if header.kind == Kind.INFER:
            self.count += 1
            self.server.infers += 1
            self._infer(header, frame)
        else:
            status, body = self._control(header, frame)
            payload = encode(body)
            reply = pack_reply(header.kind, header.stream, header.id, status, NO_STAMPS, len(payload))
            self.sock.sendall(reply + payload)

    def _infer(self, header: RequestHeader, frame: Frame) -> None:
        behaviour, count = self.server.behaviour, self.count
        if count == behaviour.stall_at:
            begin_ns = now_ns()
            self.server.go_on.wait(behaviour.stall_s)
            self.server.stood_still = (begin_ns, now_ns())
        if behaviour.delay_s:
            time.sleep(behaviour.delay_s)
        reply = self._reply(header, frame)
        if count == behaviour.mute_at:
            return
        if count == behaviour.garbage_at:
            reply = b"HTTP/1.1 400 Bad Request\r\n".ljust(len(reply), b"\n")
        if count == behaviour.close_at:
            self.sock.sendall(reply[: len(reply) // 2])
            raise OSError("closed on purpose")
        self._send(reply)
        if count == behaviour.repeat_at:
            for other in (header, header._replace(id=header.id + 1000), header._replace(stream=header.stream + 1)):
                self.sock.sendall(self._reply(other, frame))

    def _reply(self, header: RequestHeader, frame: Frame) -> bytes:
        behaviour = self.server.behaviour
        rejected = behaviour.reject_every and self.count % behaviour.reject_every == 0
        size = 0 if rejected else behaviour.reply_bytes
        offset = behaviour.clock_offset_ns
        middle = (frame.t_done_ns + offset,) * (len(STAMPS) - 2)
        stamps = (frame.t_first_ns + offset, *middle, now_ns() + offset)
        status = Status.REJECTED if rejected else Status.OK
        return pack_reply(Kind.REPLY, header.stream, header.id, status, stamps, size) + bytes(size)

    def _send(self, reply: bytes) -> None:
        self.held.append(reply)
        if len(self.held) >= self.server.behaviour.shuffle:
            for held in reversed(self.held):
                self.sock.sendall(held)
            self.held.clear()

    def _control(self, header: RequestHeader, frame: Frame) -> tuple[Status, dict[str, Any]]:
        behaviour = self.server.behaviour
        message = decode(header.kind, frame.payload)
        if isinstance(message, Load):
            if message.model not in behaviour.models:
                return Status.FAILED, {"error": f'unknown model "{message.model}"'}
            self.server.loads.append(message.model)
            self.server.model = message.model
        if header.kind == Kind.CLOCK:
            offset = behaviour.clock_offset_ns
            return Status.OK, {"t1_ns": frame.t_done_ns + offset, "t2_ns": now_ns() + offset}
        host = behaviour.host or socket.gethostname()
        hello = Hello(role="server", name="echo", model=self.server.model, device="cpu", host=host)
        return Status.OK, {name: getattr(hello, name) for name in hello.__struct_fields__}


def main(arguments: list[str]) -> None:
    """`--port N` (or `--unix PATH`) and any number field of Behaviour, e.g. `--delay-ms 5 --reply-bytes 40`."""
    given = {
        key.lstrip("-").replace("-", "_"): value for key, value in zip(arguments[::2], arguments[1::2], strict=True)
    }
    address = (
        Address("unix", given.pop("unix"))
        if "unix" in given
        else Address("tcp", "127.0.0.1", int(given.pop("port", "0")))
    )
    delay_s = float(given.pop("delay_ms", "0")) / 1000
    known = {item.name: type(asdict(Behaviour())[item.name]) for item in fields(Behaviour)}
    server = EchoServer(
        Behaviour(delay_s=delay_s, **{key: known[key](value) for key, value in given.items()}), address
    )
    print(server.address, flush=True)
    server.serve()


if __name__ == "__main__":
    main(sys.argv[1:])
