"""Addresses and sockets: parsed, tuned, refused with a sentence."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import InputError, PeerClosed
from corun.wire import Address, connect, listen, tune


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:54100", Address("tcp", "127.0.0.1", 54100)),
        ("tcp://host:1", Address("tcp", "host", 1)),
        ("[::1]:80", Address("tcp", "::1", 80)),
        ("unix:/tmp/a.sock", Address("unix", "/tmp/a.sock")),
        ("unix:///tmp/a.sock", Address("unix", "/tmp/a.sock")),
    ],
)
def test_addresses_are_read_and_written(text: str, address: Address) -> None:
    """The three forms are read, and what is printed is read back."""
    assert Address.parse(text) == address
    assert Address.parse(str(address)) == address


@given(st.text(max_size=30))
@settings(max_examples=150)
def test_any_text_is_an_address_or_an_input_error(text: str) -> None:
    """Parsing raises InputError and nothing else, and an address it gives can be parsed again."""
    try:
        address = Address.parse(text)
    except InputError:
        return
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize("text", ["", ":1", "host", "host:", "host:x", "host:70000", "host:²", "unix:", "host:-1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    """Missing parts and ports that are no ports are named."""
    with pytest.raises(InputError, match="bad address"):
        Address.parse(text)


def test_tuning_sets_no_delay_on_both_ends() -> None:
    """TCP_NODELAY is on after tune, and the granted buffers are reported."""
    listener = listen(Address("tcp", "127.0.0.1", 0))
    with listener, connect(Address("tcp", *listener.getsockname())) as near:
        far, _ = listener.accept()
        with far:
            granted = tune(far)
            for sock in (near, far):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert granted["rcvbuf"] > 0
            assert granted["sndbuf"] > 0


def test_a_port_in_use_is_an_input_error() -> None:
    """The message says which port and what to do."""
    with listen(Address("tcp", "127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(InputError, match=rf"{port}.*choose another --port"):
            listen(Address("tcp", "127.0.0.1", port))


def test_a_stale_unix_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    """The file a killed server left does not keep the next one from starting; a running server's does."""
    address = Address("unix", str(tmp_path / "a.sock"))
    listen(address).close()
    with listen(address), pytest.raises(InputError, match="choose another"):
        listen(address)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    """A mistyped path never removes a file."""
    path = tmp_path / "notes.txt"
    path.write_text("keep me")
    with pytest.raises(InputError, match="cannot listen"):
        listen(Address("unix", str(path)))
    assert path.read_text() == "keep me"


def test_connecting_to_nobody_says_where() -> None:
    """PeerClosed names the address and asks whether the server runs."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        with pytest.raises(PeerClosed, match=f"127.0.0.1:{port}.*is the server running"):
            connect(Address("tcp", "127.0.0.1", port), timeout_s=0.2)


class _FromThePortItself(socket.socket):
    """Is given the very port it connects to, as the kernel does once in some thousand times."""

    def connect(self, address: Any) -> None:
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.bind(address)
        super().connect(address)


def test_a_socket_never_meets_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to a port nobody listens on from that port is nobody there, and the port is free again."""
    with listen(Address("tcp", "127.0.0.1", 0)) as listener:
        address = Address("tcp", *listener.getsockname())
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", _FromThePortItself)
        with pytest.raises(PeerClosed, match="refused; is the server running"):
            connect(address, timeout_s=5.0)
    listen(address).close()


def test_connecting_with_retry_waits_for_a_server_that_is_starting(tmp_path: Path) -> None:
    """retry=True connects to a socket that appears later."""
    address = Address("unix", str(tmp_path / "late.sock"))
    listeners: list[socket.socket] = []

    def start() -> None:
        time.sleep(0.1)
        listeners.append(listen(address))

    thread = threading.Thread(target=start)
    thread.start()
    with connect(address, timeout_s=60.0, retry=True) as sock:
        assert sock.getpeername() == address.host
    thread.join()
    listeners[0].close()
