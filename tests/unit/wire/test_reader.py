"""Incremental readers: the pieces in which bytes arrive never change what is read."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import FrameError, PeerClosed
from corun.wire import Frame, Kind, ReplyReader, RequestReader, Status, pack_reply, pack_request
from corun.wire.frames import NO_STAMPS
from corun.wire.reader import BUFFER_SIZE


class Pieces:
    """A socket that gives its bytes in the sizes asked for, then nothing, then the end."""

    def __init__(self, data: bytes, sizes: list[int], end: bool = False) -> None:
        self._data = data
        self._sizes = sizes
        self._end = end
        self._turn = 0

    @property
    def empty(self) -> bool:
        return not self._data

    def recv_into(self, buffer: memoryview) -> int:
        if not self._data:
            if self._end:
                return 0
            raise BlockingIOError
        self._turn += 1
        if self._turn % 3 == 0:
            raise BlockingIOError
        count = min(self._sizes[self._turn % len(self._sizes)], len(buffer), len(self._data))
        buffer[:count] = self._data[:count]
        self._data = self._data[count:]
        return count


def frames_of(payloads: list[bytes]) -> bytes:
    return b"".join(pack_request(Kind.INFER, 3, id, len(p), id, id) + p for id, p in enumerate(payloads))


def read_all(reader: RequestReader, source: Pieces) -> list[Frame]:
    frames: list[Frame] = []
    for _ in range(200_000):
        frames += reader.receive(source)  # type: ignore[arg-type]
        if source.empty:
            return frames
    raise AssertionError("the reader does not consume what it is given")


PAYLOADS = st.lists(
    st.one_of(
        st.binary(max_size=200),
        st.sampled_from([0, 1, 63, 64, 65, BUFFER_SIZE - 64, BUFFER_SIZE - 63, BUFFER_SIZE, 200_000]).map(
            lambda size: bytes([size % 251]) * size
        ),
    ),
    max_size=8,
)
SIZES = st.lists(st.sampled_from([1, 5, 63, 64, 65, 1000, 65_536, 10**6]), min_size=1, max_size=6).filter(
    lambda sizes: max(sizes) >= 1000
)


@given(PAYLOADS, SIZES)
@settings(max_examples=80, deadline=None)
def test_frames_do_not_depend_on_the_pieces_they_come_in(payloads: list[bytes], sizes: list[int]) -> None:
    """Any cut of a stream of any frames gives exactly those frames, in order, once each."""
    frames = read_all(RequestReader(), Pieces(frames_of(payloads), sizes))
    assert [bytes(frame.payload) for frame in frames] == payloads
    assert [frame.header.id for frame in frames] == list(range(len(payloads)))


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=5), SIZES)
@settings(max_examples=40, deadline=None)
def test_the_reply_reader_reads_replies(payloads: list[bytes], sizes: list[int]) -> None:
    """The client's side obeys the same rule."""
    data = b"".join(pack_reply(Kind.REPLY, 0, id, Status.OK, range(10), len(p)) + p for id, p in enumerate(payloads))
    frames = read_all(ReplyReader(), Pieces(data, sizes))  # type: ignore[arg-type]
    assert [bytes(frame.payload) for frame in frames] == payloads
    assert [frame.header.id for frame in frames] == list(range(len(payloads)))


@given(PAYLOADS.filter(bool), SIZES)
@settings(max_examples=40, deadline=None)
def test_stamps_are_in_order(payloads: list[bytes], sizes: list[int]) -> None:
    """Of each frame the first byte is not later than the last, and frames follow one another."""
    frames = read_all(RequestReader(), Pieces(frames_of(payloads), sizes))
    for frame in frames:
        assert 0 < frame.t_first_ns <= frame.t_done_ns
    for earlier, later in itertools.pairwise(frames):
        assert earlier.t_done_ns <= later.t_done_ns


@given(st.binary(min_size=1, max_size=500), st.lists(st.binary(max_size=50), max_size=3), SIZES)
@settings(max_examples=60, deadline=None)
def test_garbage_ends_in_an_error_or_in_waiting(garbage: bytes, before: list[bytes], sizes: list[int]) -> None:
    """Bytes that are no frame raise FrameError or wait for more; no other exception, no invented frame."""
    reader = RequestReader()
    frames: list[Frame] = []
    try:
        frames = read_all(reader, Pieces(frames_of(before) + b"\x00" + garbage, sizes))
    except FrameError:
        return
    assert len(frames) == len(before)
    assert reader.mid_frame


@given(PAYLOADS.filter(bool), st.data())
@settings(max_examples=40, deadline=None)
def test_a_truncated_stream_is_told_from_a_finished_one(payloads: list[bytes], data: st.DataObject) -> None:
    """The end between two frames is a close; inside a frame it is a close "in the middle of a frame"."""
    stream = frames_of(payloads)
    cut = data.draw(st.integers(0, len(stream)))
    whole, ends = 0, [0]
    for payload in payloads:
        ends.append(ends[-1] + 64 + len(payload))
        whole += ends[-1] <= cut
    source, reader, seen = Pieces(stream[:cut], [10**6], end=True), RequestReader(), []

    def read_on() -> None:
        while True:
            seen.extend(reader.receive(source))  # type: ignore[arg-type]

    with pytest.raises(PeerClosed) as closed:
        read_on()
    assert len(seen) == whole
    assert ("middle of a frame" in str(closed.value)) == (cut not in ends)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def test_an_oversized_length_is_refused_before_memory_is_taken(pair: tuple[socket.socket, socket.socket]) -> None:
    """A header that announces more than the reader's limit is a FrameError at once."""
    pair[0].sendall(pack_request(Kind.INFER, 0, 0, 1_000_000))
    with pytest.raises(FrameError, match="over the limit of 1000"):
        RequestReader(max_payload=1000).receive(pair[1])


def test_a_reset_connection_is_a_closed_peer() -> None:
    """An error of the socket becomes PeerClosed with the system's reason."""

    class Broken:
        def recv_into(self, buffer: memoryview) -> int:
            raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(PeerClosed, match="reset by peer"):
        RequestReader().receive(Broken())  # type: ignore[arg-type]


def test_a_small_frame_after_a_large_one_is_read(pair: tuple[socket.socket, socket.socket]) -> None:
    """Reading the header by itself after a large payload does not lose what follows."""
    reader = RequestReader()
    pair[0].setblocking(False)
    pair[1].setblocking(False)
    for size in (100_000, 10, 0, 100_000, 64_000, 3):
        data = pack_request(Kind.INFER, 0, size, size) + bytes(size)
        frames: list[Frame] = []
        while not frames:
            if data:
                data = data[pair[0].send(data) :]
            frames = reader.receive(pair[1])
        assert [len(frame.payload) for frame in frames] == [size]
    assert not reader.mid_frame


def test_nothing_to_read_is_no_frame(pair: tuple[socket.socket, socket.socket]) -> None:
    """A non-blocking socket without data gives an empty list."""
    pair[1].setblocking(False)
    assert RequestReader().receive(pair[1]) == []


def test_a_reply_where_requests_are_read_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    """A peer that mixes up the directions is told so."""
    pair[0].sendall(pack_reply(Kind.REPLY, 0, 0, Status.OK, NO_STAMPS, 0))
    with pytest.raises(FrameError, match="instead of a request"):
        RequestReader().receive(pair[1])
