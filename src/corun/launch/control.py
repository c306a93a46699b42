"""Where children report: one Unix socket in a private directory, or a port for another machine; a channel per child."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from corun.errors import PeerClosed, RunFault
from corun.launch.children import Child
from corun.wire.channel import Channel
from corun.wire.messages import Hello
from corun.wire.sockets import Address, connect, listen

POLL_S = 0.05
HELLO_S = 30.0
"""A process that has connected says HELLO at once, or once a busy machine lets it."""


class Watched(Protocol):
    """Processes none of which may end while others are waited for: a Family or a Crew."""

    def require_alive(self) -> None: ...


class ControlSocket:
    """The launcher's listening socket; a Unix path has to be short, so it does not live in the run directory.

    host: an address of this machine that another one reaches, instead: a port of it that is free.
    """

    def __init__(self, host: str | None = None) -> None:
        self._directory = None if host else Path(tempfile.mkdtemp(prefix="corun-"))
        self._socket = listen(Address("tcp", host) if host else Address("unix", f"{self._directory}/control.sock"))
        self._socket.settimeout(POLL_S)
        port = self._socket.getsockname()[1] if host else 0
        self.address = Address("tcp", host, port) if host else Address("unix", f"{self._directory}/control.sock")

    def __enter__(self) -> ControlSocket:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)

    def wait_for(self, children: Sequence[Child], family: Watched, timeout_s: float) -> None:
        """Accept until each of `children` said HELLO; RunFault when one dies first or time runs out."""
        waiting = {child.popen.pid: child for child in children}
        deadline = time.monotonic() + timeout_s
        while waiting:
            family.require_alive()
            if time.monotonic() > deadline:
                names = ", ".join(child.label for child in waiting.values())
                raise RunFault(f"{names} did not get ready within {timeout_s:.0f} s; see the logs directory")
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            channel = Channel(connection)
            received = channel.receive(HELLO_S)
            header, hello = received or (None, None)
            if header is None or not isinstance(hello, Hello) or hello.pid not in waiting:
                channel.close()
                continue
            child = waiting.pop(hello.pid)
            child.channel = channel
            child.hello = {"model": hello.model, "device": hello.device, "version": hello.version, **hello.info}
            channel.reply(header)


def wait_for_server(child: Child, address: Address, family: Watched, timeout_s: float) -> None:
    """Connect to a starting server and wait until its model is loaded."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        family.require_alive()
        try:
            channel = Channel(connect(address, timeout_s=1.0))
        except PeerClosed:
            time.sleep(POLL_S)
            continue
        try:
            body = channel.request(Hello(role="launcher"), HELLO_S)
        except PeerClosed:
            channel.close()
            time.sleep(POLL_S)
            continue
        if body.get("pid") not in (None, child.popen.pid):
            channel.close()
            raise RunFault(f"{address} is held by another server (pid {body['pid']}); choose another port")
        if body.get("model"):
            child.channel = channel
            child.hello = body
            return
        channel.close()
        time.sleep(POLL_S)
    raise RunFault(f"{child.label} did not get ready within {timeout_s:.0f} s: {child.log_tail()}")


def hold(child: Child, address: Address, family: Watched) -> None:
    """Connect to a server as soon as it listens: the connection's end will show the server's. RunFault when it ends."""
    while child.channel is None:
        family.require_alive()
        with suppress(PeerClosed):
            child.channel = Channel(connect(address, timeout_s=1.0))
        time.sleep(POLL_S)
