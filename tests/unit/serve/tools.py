"""A servable without a model, requests without a socket, a server in a thread, a client of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corun.clock import now_ns
from corun.registry import ServableInfo
from corun.serve import Request, Segment, ServableEngine, Server, ServerOptions, Statistics
from corun.wire import Address, Frame, Kind, ReplyReader, RequestHeader, connect, pack_request
from corun.wire.channel import Channel
from corun.wire.messages import Load, Message, Stop


class FakeServable:
    """Answers `payload` with "reply to payload"; payloads are also orders.

    b"bad": cannot be decoded. b"boom": the forward pass of its batch raises. `gate`: forward waits for it.
    """

    def __init__(self, name: str = "fake", device: str = "cpu") -> None:
        self.info = ServableInfo(name, "test", 3, 0, "random", "fp32", device)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[list[bytes]] = []
        self.error: Exception = RuntimeError("the network exploded")

    def decode(self, payload: bytes) -> bytes:
        if bytes(payload) == b"bad":
            raise ValueError("payload of 3 bytes is not a readable image")
        if bytes(payload) == b"worse":
            raise KeyError("worse")
        return bytes(payload)

    def preprocess(self, samples: list[bytes]) -> list[bytes]:
        return samples

    def to_device(self, batch: list[bytes]) -> list[bytes]:
        return batch

    def forward(self, batch: list[bytes]) -> list[bytes]:
        self.entered.set()
        self.gate.wait(120)
        self.batches.append(batch)
        if b"boom" in batch:
            raise self.error
        return batch

    def to_host(self, output: list[bytes]) -> list[bytes]:
        return output

    def postprocess(self, output: list[bytes], count: int) -> list[bytes]:
        return [b"reply to " + payload for payload in output]

    def example(self) -> bytes:
        return b"example"


class FakeConnection:
    """Keeps what is sent to it."""

    def __init__(self) -> None:
        self.closed = False
        self.local = True
        self.sent: list[tuple[bytes, bytes]] = []

    def send(self, header: bytes, payload: bytes) -> None:
        self.sent.append((header, payload))


def request(payload: bytes = b"x", id: int = 0, t_done: int | None = None, intended: int = 0) -> Request:
    """A request that has just arrived."""
    header = RequestHeader(Kind.INFER, 0, 0, id, len(payload), intended, 0, 0)
    arrived = now_ns() if t_done is None else t_done
    connection: Any = FakeConnection()
    return Request(connection, header, payload, arrived, arrived, Segment())


class Serving:
    """A server in a thread of this process, serving a FakeServable unless told otherwise."""

    def __init__(
        self,
        load: Callable[[Load], Any] | None = None,
        model: str = "fake",
        observer: Any = None,
        **options: Any,
    ) -> None:
        self.servable = FakeServable()
        self.lines: list[str] = []
        options.setdefault("address", Address("tcp", "127.0.0.1", 0))
        options.setdefault("warmup", 0)
        self.server = Server(
            ServerOptions(name="svc", **options),
            load or (lambda message: ServableEngine(self.servable)),
            self.lines.append,
            observer,
        )
        self.final: Statistics | None = None
        self.error: BaseException | None = None
        initial = Load(model) if model else None
        self._thread = threading.Thread(target=self._serve, args=(initial,), daemon=True)
        self._clients: list[Client] = []
        self._channels: list[Channel] = []

    def _serve(self, initial: Load | None) -> None:
        try:
            self.final = self.server.serve(initial)
        except BaseException as error:  # noqa: BLE001 - handed to the test
            self.error = error

    def __enter__(self) -> Serving:
        self._thread.start()
        until(lambda: any(" ready on " in line or "ready on" in line for line in self.lines) or self.error)
        return self

    def __exit__(self, *exc: object) -> None:
        self.servable.gate.set()
        if self._thread.is_alive():
            self.stop()
        for client in self._clients:
            client.sock.close()
        for channel in self._channels:
            channel.close()

    def stop(self) -> dict[str, Any]:
        """STOP it and wait for its end; the body of its answer."""
        body = self.channel().request(Stop(), 60.0)
        self.join()
        return body

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    def channel(self) -> Channel:
        """A control connection of its own."""
        channel = Channel(connect(self.server.address))
        self._channels.append(channel)
        return channel

    def ask(self, message: Message) -> dict[str, Any]:
        """One control message, on a connection kept for such."""
        if not self._channels:
            self.channel()
        return self._channels[0].request(message, 60.0)

    def client(self) -> Client:
        client = Client(connect(self.server.address))
        self._clients.append(client)
        return client


class Client:
    """Sends INFER frames and collects replies by id."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._reader = ReplyReader()
        self._next = 0

    def send(self, *payloads: bytes, stream: int = 0) -> list[int]:
        """All of them in one write; their ids."""
        ids = list(range(self._next, self._next + len(payloads)))
        self._next += len(payloads)
        now = now_ns()
        self.sock.sendall(
            b"".join(
                pack_request(Kind.INFER, stream, id, len(payload), now, now) + payload
                for id, payload in zip(ids, payloads, strict=True)
            )
        )
        return ids

    def receive(self, count: int) -> dict[int, Frame]:
        """The next `count` replies."""
        frames: dict[int, Frame] = {}
        self.sock.settimeout(60)
        while len(frames) < count:
            for frame in self._reader.receive(self.sock):
                frames[frame.header.id] = frame
        return frames

    def ask(self, payload: bytes) -> Frame:
        """One request, one reply."""
        (id,) = self.send(payload)
        return self.receive(1)[id]


def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """Poll until it is true; fails the test when it never is."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.002)
    raise AssertionError("it never came true")


def csv_rows(directory: Path, service: str = "svc") -> list[dict[str, str]]:
    """The server's rows."""
    import csv

    with open(directory / "infer_server" / f"{service}.csv", newline="") as file:
        return list(csv.DictReader(file))
