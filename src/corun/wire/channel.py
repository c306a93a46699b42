"""A blocking channel for control messages: one request, one reply.

The same class serves both ends: the launcher calls `request`, a child that connected back to the launcher
calls `receive` and `reply`. Nothing here is on the path of an inference request.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

from corun.clock import Offset, Probe, estimate_offset, now_ns
from corun.errors import FrameError, PeerClosed, RunFault
from corun.wire.frames import NO_STAMPS, Kind, ReplyHeader, RequestHeader, Status, pack_reply, pack_request
from corun.wire.messages import Clock, Message, decode, decode_body, encode, kind_of
from corun.wire.reader import Frame, ReplyReader, RequestReader

CLOCK_PROBES = 16

T = TypeVar("T")


class Channel:
    """Control messages over one connected socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._requests = RequestReader()
        self._replies = ReplyReader()
        self._queued_requests: list[Frame] = []
        self._queued_replies: list[Frame] = []
        self._next_id = 1

    def fileno(self) -> int:
        return self.sock.fileno()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()

    def send(self, message: Message) -> int:
        """Send a request without waiting; returns its id."""
        body = encode(message)
        id = self._next_id
        self._next_id += 1
        self._send(pack_request(kind_of(message), 0, id, len(body), 0, now_ns()), body)
        return id

    def wait_reply(self, id: int, timeout_s: float | None = None) -> dict[str, Any]:
        """The body of the reply to `id`; RunFault when the peer answered with an error status."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            for index, frame in enumerate(self._queued_replies):
                if frame.header.id == id:
                    del self._queued_replies[index]
                    return _checked(frame)
            self._queued_replies += self._within(deadline, lambda: self._replies.receive(self.sock))

    def request(self, message: Message, timeout_s: float | None = 30.0) -> dict[str, Any]:
        """Send and wait for the answer's body.

        Raises PeerClosed (gone, or no answer in timeout_s) or RunFault (the peer answered with an error).
        """
        return self.wait_reply(self.send(message), timeout_s)

    def receive(self, timeout_s: float | None = None) -> tuple[RequestHeader, Message] | None:
        """The next request, or None when none came within timeout_s (0 = only look)."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._queued_requests:
            try:
                frames = self._within(deadline, lambda: self._requests.receive(self.sock))
            except TimeoutError:
                return None
            self._queued_requests += frames
        frame = self._queued_requests.pop(0)
        header = frame.header
        assert isinstance(header, RequestHeader)
        return header, decode(header.kind, frame.payload)

    def reply(self, header: RequestHeader, body: dict[str, Any] | None = None, status: int = Status.OK) -> None:
        """Answer a request."""
        payload = encode(body or {})
        self._send(pack_reply(header.kind, header.stream, header.id, status, NO_STAMPS, len(payload)), payload)

    def fail(self, header: RequestHeader, error: str) -> None:
        """Answer a request with a sentence about what went wrong."""
        self.reply(header, {"error": error}, Status.FAILED)

    def clock_offset(self, probes: int = CLOCK_PROBES) -> Offset:
        """Peer clock minus own clock by the four-stamp handshake."""
        taken = []
        for _ in range(probes):
            t0 = now_ns()
            body = self.request(Clock(t0))
            taken.append(Probe(t0, int(body["t1_ns"]), int(body["t2_ns"]), now_ns()))
        return estimate_offset(taken)

    def _send(self, header: bytes, body: bytes) -> None:
        try:
            self.sock.settimeout(None)
            self.sock.sendall(header + body)
        except OSError as error:
            raise PeerClosed(f"the connection broke: {error.strerror or error}") from error

    def _within(self, deadline: float | None, receive: Callable[[], T]) -> T:
        if deadline is None:
            self.sock.settimeout(None)
            return receive()
        remaining = deadline - time.monotonic()
        self.sock.settimeout(max(remaining, 0.0))
        try:
            frames = receive()
        except PeerClosed as error:
            if isinstance(error.__cause__, TimeoutError):
                raise TimeoutError("no answer in time") from error
            raise
        if not frames and time.monotonic() >= deadline:
            raise TimeoutError("no answer in time")
        return frames


def _checked(frame: Frame) -> dict[str, Any]:
    header = frame.header
    assert isinstance(header, ReplyHeader)
    body = decode_body(frame.payload)
    if header.status != Status.OK:
        raise RunFault(str(body.get("error") or f"the peer answered {Status(header.status).name}"))
    return body


def answer_clock(channel: Channel, header: RequestHeader, received_ns: int) -> None:
    """Answer a CLOCK probe with both of this side's stamps."""
    channel.reply(header, {"t1_ns": received_ns, "t2_ns": now_ns()})


__all__ = ["Channel", "FrameError", "Kind", "answer_clock"]
