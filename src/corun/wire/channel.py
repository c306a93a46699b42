"""A blocking channel for control messages: one request, one reply.

The same class serves both ends: the launcher calls `request`, a child that connected back to the launcher
calls `receive` and `reply`. Nothing here is on the path of an inference request.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any

from corun.clock import Offset, Probe, estimate_offset, now_ns
from corun.errors import FrameError, PeerClosed, RunFault
from corun.wire.frames import (
    NO_STAMPS,
    PREFIX_SIZE,
    REPLY_SIZE,
    REQUEST_SIZE,
    Kind,
    ReplyHeader,
    RequestHeader,
    Status,
    is_reply,
    pack_reply,
    pack_request,
    unpack_reply,
    unpack_request,
)
from corun.wire.messages import Clock, Hello, Message, decode, decode_body, encode, kind_of

CLOCK_PROBES = 16

RECEIVE_SIZE = 64 << 10


class Channel:
    """Control messages over one connected socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = bytearray()
        self._requests: list[tuple[RequestHeader, bytes]] = []
        self._replies: list[tuple[ReplyHeader, bytes]] = []
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
            for index, (header, payload) in enumerate(self._replies):
                if header.id == id:
                    del self._replies[index]
                    return _checked(header, payload)
            if not self._receive_some(deadline):
                raise PeerClosed(f"no answer within {timeout_s:g} s")

    def request(self, message: Message, timeout_s: float | None = 30.0) -> dict[str, Any]:
        """Send and wait for the answer's body.

        Raises PeerClosed (gone, or no answer in timeout_s) or RunFault (the peer answered with an error).
        """
        return self.wait_reply(self.send(message), timeout_s)

    def introduce(self, hello: Hello) -> None:
        """Say HELLO to the launcher and wait for its answer, however long that takes.

        It accepts its processes when the slowest of them has loaded its model. Raises PeerClosed when it has gone.
        """
        self.request(hello, None)

    def receive(self, timeout_s: float | None = None) -> tuple[RequestHeader, Message] | None:
        """The next request, or None when none came within timeout_s (0 = only look)."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._requests:
            if not self._receive_some(deadline):
                return None
        header, payload = self._requests.pop(0)
        return header, decode(header.kind, payload)

    def reply(self, header: RequestHeader, body: dict[str, Any] | None = None, status: int = Status.OK) -> None:
        """Answer a request."""
        payload = encode(body or {})
        self._send(pack_reply(header.kind, header.stream, header.id, status, NO_STAMPS, len(payload)), payload)

    def fail(self, header: RequestHeader, error: str) -> None:
        """Answer a request with a sentence about what went wrong."""
        self.reply(header, {"error": error}, Status.FAILED)

    def clock_offset(self, probes: int = CLOCK_PROBES, timeout_s: float = 30.0) -> Offset:
        """Peer clock minus own clock by the four-stamp handshake; PeerClosed when a probe waits timeout_s."""
        taken = []
        for _ in range(probes):
            t0 = now_ns()
            body = self.request(Clock(t0), timeout_s)
            taken.append(Probe(t0, int(body["t1_ns"]), int(body["t2_ns"]), now_ns()))
        return estimate_offset(taken)

    def _send(self, header: bytes, body: bytes) -> None:
        try:
            self.sock.settimeout(None)
            self.sock.sendall(header + body)
        except OSError as error:
            raise PeerClosed(f"the connection broke: {error.strerror or error}") from error

    def _receive_some(self, deadline: float | None) -> bool:
        """Wait for bytes until the deadline and sort whole frames; False when none came in time."""
        try:
            self.sock.settimeout(None if deadline is None else max(0.0, deadline - time.monotonic()))
            received = self.sock.recv(RECEIVE_SIZE)
        except (BlockingIOError, TimeoutError):
            return False
        except OSError as error:
            raise PeerClosed(f"the connection broke: {error.strerror or error}") from error
        if not received:
            raise PeerClosed("the peer closed" + " in the middle of a frame" * bool(self._buffer))
        self._buffer += received
        while self._take_frame():
            pass
        return True

    def _take_frame(self) -> bool:
        """Move one whole frame from the buffer to its queue."""
        buffer = self._buffer
        if len(buffer) < PREFIX_SIZE:
            return False
        reply = is_reply(buffer)
        size = REPLY_SIZE if reply else REQUEST_SIZE
        if len(buffer) < size:
            return False
        header = unpack_reply(buffer) if reply else unpack_request(buffer)
        end = size + header.payload_len
        if len(buffer) < end:
            return False
        payload = bytes(buffer[size:end])
        del buffer[:end]
        if isinstance(header, ReplyHeader):
            self._replies.append((header, payload))
        else:
            self._requests.append((header, payload))
        return True


def _checked(header: ReplyHeader, payload: bytes) -> dict[str, Any]:
    body = decode_body(payload)
    if header.status != Status.OK:
        known = {int(status): status.name for status in Status}
        raise RunFault(str(body.get("error") or f"the peer answered {known.get(header.status, header.status)}"))
    return body


def answer_clock(channel: Channel, header: RequestHeader, received_ns: int) -> None:
    """Answer a CLOCK probe with both of this side's stamps."""
    channel.reply(header, {"t1_ns": received_ns, "t2_ns": now_ns()})


__all__ = ["Channel", "FrameError", "Kind", "answer_clock"]
