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
        self._end = 0
        self._limit = BUFFER_SIZE
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
            return self._receive(sock)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as error:
            raise PeerClosed(f"the connection broke: {error.strerror or error}") from error

    def _receive(self, sock: socket.socket) -> list[Frame]:
        if self._header is not None:
            return self._receive_payload(sock)
        count = sock.recv_into(self._view[self._end : self._limit])
        if count == 0:
            raise PeerClosed("the peer closed in the middle of a frame" if self._end else "the peer closed")
        now = now_ns()
        if self._end == 0:
            self._t_first = now
        self._end += count
        return self._parse(sock, now)

    def _parse(self, sock: socket.socket, now: int) -> list[Frame]:
        frames: list[Frame] = []
        size, view, start, end = self._header_size, self._view, 0, self._end
        unpack = type(self)._unpack
        while end - start >= size:
            header = unpack(view, start, self._max_payload)
            stop = start + size + header.payload_len
            if stop > end:
                if header.payload_len + size > BUFFER_SIZE:
                    self._begin_payload(header, start + size, end)
                    start = end
                break
            frames.append(Frame(header, bytes(view[start + size : stop]), self._t_first, now))
            self._t_first = now
            start = stop
        if start and start < end:
            self._buffer[: end - start] = self._buffer[start:end]
        self._end = end - start
        if self._header is None:
            self._limit = BUFFER_SIZE
            return frames
        return frames or self._receive_payload(sock)

    def _begin_payload(self, header: HeaderT, start: int, end: int) -> None:
        self._limit = self._header_size
        self._header = header
        self._payload = bytearray(header.payload_len)
        self._filled = end - start
        self._payload[: self._filled] = self._view[start:end]

    def _receive_payload(self, sock: socket.socket) -> list[Frame]:
        header = self._header
        assert header is not None
        view = memoryview(self._payload)
        while self._filled < header.payload_len:
            count = sock.recv_into(view[self._filled :])
            if count == 0:
                raise PeerClosed("the peer closed in the middle of a frame")
            self._filled += count
        frame = Frame(header, self._payload, self._t_first, now_ns())
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
