"""Whether a server's stamps are on this process' clock."""

from __future__ import annotations

import socket

import pytest

from corun.load.target import _same_clock
from corun.process import clock_id
from corun.wire import Address

NEAR, FAR = Address("tcp", "127.0.0.1", 1), Address("tcp", "10.0.0.2", 1)


@pytest.mark.parametrize("address", [NEAR, FAR])
def test_a_clock_that_is_named_decides(address: Address) -> None:
    """Two machines that were cloned with one host name have two clocks; one machine's two addresses have one."""
    host = socket.gethostname()
    assert _same_clock(address, {"host": "other", "info": {"clock": clock_id()}})
    assert not _same_clock(address, {"host": host, "info": {"clock": "another boot"}})


def test_without_a_name_address_and_host_decide() -> None:
    """A server that names no clock is on ours when it is on the loopback or has our host's name."""
    assert _same_clock(NEAR, {"host": "other"})
    assert _same_clock(FAR, {"host": socket.gethostname(), "info": {}})
    assert not _same_clock(FAR, {"host": "other"})


def test_the_clock_of_a_process_has_one_name() -> None:
    """The name does not change while the machine runs."""
    assert clock_id() == clock_id() != ""
