"""A server that is starting may be slow to answer: it is asked again while its process lives and there is time."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from corun.errors import RunFault, WireError
from corun.launch import control
from corun.launch.control import wait_for_server
from corun.wire import Address, listen
from corun.wire.channel import Channel
from corun.wire.messages import Hello

PID = 4711


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with listen(Address("tcp", "127.0.0.1", 0)) as made:
        yield made


def _child() -> Any:
    return SimpleNamespace(popen=SimpleNamespace(pid=PID), label="server a", log_tail=lambda: "nothing", channel=None)


def _family() -> Any:
    return SimpleNamespace(require_alive=lambda: None)


def _serve(listener: socket.socket, held: list[socket.socket]) -> None:
    """The first connection is kept and not answered, the second closed, later ones are answered."""
    held.append(listener.accept()[0])
    listener.accept()[0].close()
    with suppress(OSError):
        while True:
            channel = Channel(listener.accept()[0])
            held.append(channel.sock)
            with suppress(WireError):
                received = channel.receive(60.0)
                assert received
                assert isinstance(received[1], Hello)
                channel.reply(received[0], {"pid": PID, "model": "null"})


def test_a_server_that_is_busy_starting_is_asked_again(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer, or a connection that ends, is no fault of a process that lives; its first answer counts."""
    monkeypatch.setattr(control, "HELLO_S", 0.05)
    held: list[socket.socket] = []
    thread = threading.Thread(target=_serve, args=(listener, held))
    thread.start()
    child = _child()
    wait_for_server(child, Address("tcp", *listener.getsockname()), _family(), 60.0)
    listener.shutdown(socket.SHUT_RDWR)
    thread.join(60)
    assert child.hello["model"] == "null"
    child.channel.close()
    for sock in held:
        sock.close()


def test_a_server_that_never_answers_is_named(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the time is over the fault says which server, and what it printed."""
    monkeypatch.setattr(control, "HELLO_S", 0.01)
    with pytest.raises(RunFault, match="server a did not get ready within 0 s: nothing"):
        wait_for_server(_child(), Address("tcp", *listener.getsockname()), _family(), 0.1)
