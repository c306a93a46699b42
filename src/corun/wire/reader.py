"""Incremental frame readers: bytes in whatever pieces the socket gives, whole frames out.

Small frames are parsed in place from one buffer, several per system call. A payload larger than the buffer is
received straight into its own memory; a connection whose last payload was large reads the next header by itself
first, so that a stream of images is copied once, from the kernel to where it stays.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from corun.clock import now_ns
from corun.errors import PeerClosed
from corun.wire.frames import (
    MAX_PAYLOAD,
    REPLY_SIZE,
    REQUEST_SIZE,
    ReplyHeader,
    RequestHeader,
    unpack_reply,
    unpack_request,
)

BUFFER_SIZE = 64 << 10

HeaderT = TypeVar("HeaderT", RequestHeader, ReplyHeader)
_new = tuple.__new__


class Frame(NamedTuple):
    """One whole frame; t_first_ns: its first byte was here, t_done_ns: its last byte was here."""

    header: RequestHeader | ReplyHeader
    payload: bytes | bytearray
    t_first_ns: int
    t_done_ns: int


class _Reader(Generic[HeaderT]):
    """Frames from one connection; works on blocking and non-blocking sockets."""

    _header_size: int
    _unpack: Callable[..., HeaderT]

    def __init__(self, max_payload: int = MAX_PAYLOAD) -> None:
        self._max_payload = max_payload
        self._buffer = bytearray(BUFFER_SIZE)
        self._view = memoryview(self._buffer)
        self._room = self._view
        self._end = 0
        self._t_first = 0
        self._header: HeaderT | None = None
        self._payload = bytearray()
        self._filled = 0

    @property
    def mid_frame(self) -> bool:
        """True while part of a frame has arrived (a close now truncates it)."""
        return self._end > 0 or self._header is not None

    def receive(self, sock: socket.socket) -> list[Frame]:
        """Receive once and return the frames that are whole now, oldest first.

        Raises PeerClosed at the end of the stream and FrameError on bytes that are not protocol v1;
        after either the connection is of no further use, and whole frames that came in the same piece
        as the garbage are dropped with it. A non-blocking socket with nothing to read gives an empty list.
        """
        try:
            if self._header is not None:
                return self._receive_payload(sock)
            count = sock.recv_into(self._room)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as error:
            raise PeerClosed(f"the connection broke: {error.strerror or error}") from error
        now = now_ns()
        if not count:
            raise PeerClosed("the peer closed in the middle of a frame" if self._end else "the peer closed")
        frames: list[Frame] = []
        view, size, start, end = self._view, self._header_size, 0, self._end + count
        t_first = self._t_first if self._end else now
        while end - start >= size:
            header = self._unpack(view, start, self._max_payload)
            body = start + size
            stop = body + header.payload_len
            if stop > end:
                if stop - start > BUFFER_SIZE:
                    self._begin_payload(header, body, end, t_first)
                    return frames or self.receive(sock)
                break
            frames.append(_new(Frame, (header, bytes(view[body:stop]), t_first, now)))
            t_first = now
            start = stop
        if start == end:
            self._end, self._room = 0, view
        else:
            self._keep(start, end, t_first)
        return frames

    def _keep(self, start: int, end: int, t_first: int) -> None:
        """The beginning of a frame stays at the front of the buffer."""
        if start:
            self._buffer[: end - start] = self._buffer[start:end]
        self._end = end - start
        self._t_first = t_first
        self._room = self._view[self._end :]

    def _begin_payload(self, header: HeaderT, start: int, end: int, t_first: int) -> None:
        """A payload gets memory of its own; the next header is then read by itself."""
        self._header = header
        self._t_first = t_first
        self._end = 0
        self._room = self._view[: self._header_size]
        self._payload = bytearray(header.payload_len)
        self._filled = end - start
        self._payload[: self._filled] = self._view[start:end]

    def _receive_payload(self, sock: socket.socket) -> list[Frame]:
        header = self._header
        assert header is not None
        room = memoryview(self._payload)[self._filled :]
        while room:
            count = sock.recv_into(room)
            if not count:
                raise PeerClosed("the peer closed in the middle of a frame")
            self._filled += count
            room = room[count:]
        frame = _new(Frame, (header, self._payload, self._t_first, now_ns()))
        self._header = None
        self._payload = bytearray()
        return [frame]


class RequestReader(_Reader[RequestHeader]):
    """The server's side."""

    _header_size = REQUEST_SIZE
    _unpack = staticmethod(unpack_request)


class ReplyReader(_Reader[ReplyHeader]):
    """The client's side."""

    _header_size = REPLY_SIZE
    _unpack = staticmethod(unpack_reply)
