"""One client's connection: frames in, replies out without ever blocking, a bounded backlog between.

The model thread sends at once. What the kernel does not take waits here and leaves when the socket is writable
again, so a client that does not read its replies delays nobody else; past `BACKLOG_LIMIT` it is cut off.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections import deque
from itertools import islice

from corun.wire import RequestReader, tune

BACKLOG_LIMIT = 64 << 20
JOIN_BELOW = 16 << 10
MAX_PARTS = 64


class Connection:
    """A connected, non-blocking socket; `send` may be called from any thread, the rest from the io thread.

    local: the peer is on this host, so its stamps are on our clock. reason: why it was cut off, if it was.
    """

    def __init__(self, sock: socket.socket, epoll: select.epoll, backlog_limit: int = BACKLOG_LIMIT) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.buffers = tune(sock)
        self.reader = RequestReader()
        self.peer, self.local = _peer(sock)
        self.closed = False
        self.reason = ""
        self.backlog_bytes = 0
        self._backlog: deque[memoryview] = deque()
        self._backlog_limit = backlog_limit
        self._epoll = epoll
        self._lock = threading.Lock()
        sock.setblocking(False)
        epoll.register(self.fd, select.EPOLLIN)

    def send(self, header: bytes, payload: bytes | bytearray) -> None:
        """Hand a reply to the kernel, or to the backlog; a broken connection is left to the io thread."""
        size = len(header) + len(payload)
        with self._lock:
            if self.closed or self.reason:
                return
            sent = 0
            if not self._backlog:
                try:
                    if size < JOIN_BELOW:
                        sent = self.sock.send(header + payload)
                    else:
                        sent = self.sock.sendmsg((header, payload))
                except BlockingIOError:
                    pass
                except OSError as error:
                    self._cut_off(f"sending failed: {error.strerror or error}")
                    return
                if sent == size:
                    return
            self._keep(header, payload, sent)

    def _keep(self, header: bytes, payload: bytes | bytearray, sent: int) -> None:
        rest = len(header) + len(payload) - sent
        if self._backlog and self.backlog_bytes + rest > self._backlog_limit:
            self._cut_off(f"it does not read its replies: {self.backlog_bytes} bytes are waiting")
            return
        if not self._backlog:
            self._epoll.modify(self.fd, select.EPOLLIN | select.EPOLLOUT)
        parts = (memoryview(header)[sent:], memoryview(payload)[max(0, sent - len(header)) :])
        self._backlog.extend(part for part in parts if part)
        self.backlog_bytes += rest

    def _cut_off(self, reason: str) -> None:
        """Shut the socket down; the io thread sees its end and closes it."""
        self.reason = reason
        self._drop_backlog()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def _drop_backlog(self) -> None:
        self._backlog.clear()
        self.backlog_bytes = 0

    def flush(self) -> None:
        """Send as much of the backlog as the kernel takes."""
        with self._lock:
            while self._backlog and not self.closed:
                try:
                    sent = self.sock.sendmsg(list(islice(self._backlog, MAX_PARTS)))
                except BlockingIOError:
                    return
                except OSError as error:
                    self._cut_off(f"sending failed: {error.strerror or error}")
                    return
                self._forget(sent)
            if not self.closed:
                self._epoll.modify(self.fd, select.EPOLLIN)

    def _forget(self, sent: int) -> None:
        self.backlog_bytes -= sent
        while sent:
            first = self._backlog[0]
            if sent < len(first):
                self._backlog[0] = first[sent:]
                return
            sent -= len(first)
            self._backlog.popleft()

    def close(self) -> None:
        """Close the socket; later sends are dropped."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self._drop_backlog()
            self._epoll.unregister(self.fd)
            self.sock.close()


def _peer(sock: socket.socket) -> tuple[str, bool]:
    """Its name for the log, and whether it is on this host."""
    if sock.family == socket.AF_UNIX:
        return "a local client", True
    with contextlib.suppress(OSError):
        peer, own = sock.getpeername(), sock.getsockname()
        return f"{peer[0]}:{peer[1]}", peer[0] == own[0] or peer[0].startswith("127.")
    return "a client", False
