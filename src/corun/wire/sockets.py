"""Addresses and sockets: TCP and Unix, tuned alike on both ends.

Without TCP_NODELAY on both ends, Nagle's algorithm and delayed acknowledgements add 44 ms to an exchange.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from corun.errors import InputError, PeerClosed

SOCKET_BUFFER = 4 << 20
RETRY_EVERY_S = 0.05


@dataclass(frozen=True)
class Address:
    """Where a server listens: ("tcp", host, port) or ("unix", path, 0)."""

    scheme: str
    host: str
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Address:
        """`tcp://host:port`, `host:port` or `unix:/path`; InputError otherwise."""
        if text.startswith("unix:"):
            path = text.removeprefix("unix:").removeprefix("//")
            if path.startswith("//"):
                path = "/" + path.lstrip("/")
            if not path:
                raise InputError(f'bad address "{text}": a Unix address needs a path, e.g. unix:/tmp/a.sock')
            return cls("unix", path)
        host, _, port = text.removeprefix("tcp://").rpartition(":")
        host = host.strip("[]")
        if not host or not (port.isascii() and port.isdigit() and len(port) <= 5) or int(port) > 65535:
            raise InputError(f'bad address "{text}": use host:port or unix:/path')
        return cls("tcp", host, int(port))

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix:{self.host}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def family(self) -> socket.AddressFamily:
        if self.scheme == "unix":
            return socket.AF_UNIX
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    @property
    def target(self) -> str | tuple[str, int]:
        """What socket.connect and socket.bind take."""
        return self.host if self.scheme == "unix" else (self.host, self.port)


def tune(sock: socket.socket) -> dict[str, int]:
    """No delay, quick acknowledgements, 4 MiB buffers; returns what the kernel granted, for the manifest."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        quick_ack(sock)
    return {
        "sndbuf": sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF),
        "rcvbuf": sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
    }


def quick_ack(sock: socket.socket) -> None:
    """Ask for quick acknowledgements; the kernel may fall back to delayed ones later."""
    if hasattr(socket, "TCP_QUICKACK"):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def listen(address: Address, backlog: int = 128) -> socket.socket:
    """A listening socket; InputError when the address cannot be had (port in use, no such host, no right)."""
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        if address.scheme == "unix":
            _remove_stale(address.host)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address.target)
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        hint = "; choose another --port or stop the process that holds it" * (error.errno == errno.EADDRINUSE)
        raise InputError(f"cannot listen on {address}: {error.strerror or error}{hint}") from error
    return sock


def _remove_stale(path: str) -> None:
    """Remove a Unix socket file nobody listens on; leave one in use to fail in bind."""
    if not Path(path).is_socket():
        return
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.connect(path)
    except OSError:
        os.unlink(path)
    finally:
        probe.close()


def connect(address: Address, timeout_s: float = 5.0, retry: bool = False) -> socket.socket:
    """A tuned, blocking connection; with `retry` it waits up to timeout_s for a server that is starting.

    Raises PeerClosed with the address and what to check.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        sock = socket.socket(address.family, socket.SOCK_STREAM)
        sock.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            sock.connect(address.target)
            if meets_itself(sock):
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        except OSError as error:
            sock.close()
            if retry and time.monotonic() + RETRY_EVERY_S < deadline:
                time.sleep(RETRY_EVERY_S)
                continue
            raise PeerClosed(
                f"cannot connect to {address}: {error.strerror or error}; is the server running there?"
            ) from error
        sock.settimeout(None)
        tune(sock)
        return sock


def meets_itself(sock: socket.socket) -> bool:
    """Whether a connected socket is its own peer.

    A port of the ephemeral range that nobody listens on may be the very one this socket was given; the kernel then
    connects the two, and while that lasts no server can have the port.
    """
    with contextlib.suppress(OSError):
        return sock.family != socket.AF_UNIX and sock.getsockname() == sock.getpeername()
    return False
