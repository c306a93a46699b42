"""Replies without blocking: at once, or from a bounded backlog, or not at all."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.serve.connection import Connection


class Ends:
    """A connection and its client's socket, with small kernel buffers."""

    def __init__(self, limit: int = 1 << 20) -> None:
        self.near, self.far = socket.socketpair()
        self.epoll = select.epoll()
        self.connection = Connection(self.near, self.epoll, limit)
        self.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    def writable(self) -> bool:
        return any(events & select.EPOLLOUT for _, events in self.epoll.poll(0))

    def read(self, size: int) -> bytes:
        """As many bytes, flushing the backlog as an io thread would."""
        got = b""
        self.far.settimeout(60)
        while len(got) < size:
            if self.writable():
                self.connection.flush()
            got += self.far.recv(min(size - len(got), 1 << 16))
        return got

    def close(self) -> None:
        self.connection.close()
        self.far.close()
        self.epoll.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


@given(st.lists(st.tuples(st.integers(0, 200), st.sampled_from([0, 1, 100, 20_000, 70_000])), max_size=12))
@settings(max_examples=40, deadline=None)
def test_every_byte_arrives_in_order(parts: list[tuple[int, int]]) -> None:
    """Sent at once or from the backlog, replies leave whole and in the order they were sent."""
    ends = Ends(limit=64 << 20)
    expected = b""
    for index, (head, size) in enumerate(parts):
        header, payload = bytes([index]) * head, bytes([index + 100]) * size
        ends.connection.send(header, payload)
        expected += header + payload
    assert ends.read(len(expected)) == expected
    assert ends.connection.backlog_bytes == 0
    ends.close()


def test_a_client_that_does_not_read_is_cut_off_at_the_limit(ends: Ends) -> None:
    """Past the limit the connection gets a reason and its end; nothing blocks and later sends are dropped."""
    for _ in range(100):
        ends.connection.send(b"h" * 128, bytes(50_000))
    assert "does not read its replies" in ends.connection.reason
    assert ends.connection.backlog_bytes == 0
    assert any(events & select.EPOLLHUP for _, events in ends.epoll.poll(60))


def test_one_reply_larger_than_the_limit_is_allowed(ends: Ends) -> None:
    """The limit is on what piles up, not on a single reply."""
    reply = bytes(3 << 20)
    ends.connection.send(b"h" * 128, reply)
    assert ends.connection.reason == ""
    assert len(ends.read(128 + len(reply))) == 128 + len(reply)


def test_a_client_that_is_gone_breaks_nothing(ends: Ends) -> None:
    """Sending to a closed peer or after close raises nothing."""
    ends.far.close()
    for _ in range(3):
        ends.connection.send(b"header", b"payload")
    ends.connection.close()
    ends.connection.send(b"header", b"payload")
    ends.connection.flush()
    ends.connection.close()
    assert ends.connection.closed
