"""Protocol v1 over real sockets, its layout as another implementation would read it, and damage to every byte."""

from __future__ import annotations

import random
import select
import socket
import struct
from collections.abc import Iterator
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import FrameError, InputError, PeerClosed
from corun.wire import (
    MAX_PAYLOAD,
    REPLY_SIZE,
    REQUEST_SIZE,
    STAMPS,
    Address,
    Frame,
    Kind,
    ReplyHeader,
    RequestHeader,
    RequestReader,
    Status,
    connect,
    listen,
    pack_reply,
    pack_request,
    unpack_reply,
    unpack_request,
)
from corun.wire.channel import Channel
from corun.wire.messages import (
    Drain,
    Stats,
    Stop,
    Warmup,
    encode,
)

REQUEST_CRC, REPLY_CRC = 56, 120
LOCALHOST = Address("tcp", "127.0.0.1", 0)

kinds = st.sampled_from(sorted(Kind))
u31, u32 = st.integers(0, 2**31 - 1), st.integers(0, 2**32 - 1)
u64, i64 = st.integers(0, 2**64 - 1), st.integers(-(2**63), 2**63 - 1)
lengths = st.integers(0, MAX_PAYLOAD)
requests = st.builds(RequestHeader, kinds.map(int), u31, u32, u64, lengths, i64, i64, u64)
replies = st.builds(ReplyHeader, kinds.map(int), u31, u32, u64, u32, st.tuples(*[i64] * len(STAMPS)), lengths, u32)


def packed_request(header: RequestHeader) -> bytes:
    kind, flags, stream, id, length, intended, tx, shape = header
    return pack_request(kind, stream, id, length, intended, tx, shape, flags)


def packed_reply(header: ReplyHeader) -> bytes:
    kind, flags, stream, id, status, stamps, length, batch = header
    return pack_reply(kind, stream, id, status, stamps, length, batch, flags)


def with_field(packed: bytes, form: str, offset: int, value: int, crc_at: int) -> bytes:
    """A header with one field overwritten and a checksum that fits."""
    raw = bytearray(packed)
    struct.pack_into(form, raw, offset, value)
    struct.pack_into("<I", raw, crc_at, crc32(raw[:crc_at]))
    return bytes(raw)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets."""
    with_both = socket.socketpair()
    yield with_both
    for end in with_both:
        end.close()


# Headers


@settings(max_examples=30)
@given(requests, st.integers(1, 255))
def test_no_corrupt_byte_of_a_request_header_goes_unseen(header: RequestHeader, flip: int) -> None:
    """Whichever byte is damaged, the header is refused or (in the padding) says exactly the same."""
    packed = packed_request(header)
    for position in range(REQUEST_SIZE):
        raw = bytearray(packed)
        raw[position] ^= flip
        if position < REQUEST_CRC + 4:
            with pytest.raises(FrameError):
                unpack_request(raw)
        else:
            assert unpack_request(raw) == header


@settings(max_examples=20)
@given(replies, st.integers(1, 255))
def test_no_corrupt_byte_of_a_reply_header_goes_unseen(header: ReplyHeader, flip: int) -> None:
    """Whichever byte is damaged, the header is refused or (in the padding) says exactly the same."""
    packed = packed_reply(header)
    for position in range(REPLY_SIZE):
        raw = bytearray(packed)
        raw[position] ^= flip
        if position < REPLY_CRC + 4:
            with pytest.raises(FrameError):
                unpack_reply(raw)
        else:
            assert unpack_reply(raw) == header


def test_the_layout_is_that_of_the_specification() -> None:
    """Little endian, fields in the documented places: another implementation can be written from the docs alone."""
    raw = pack_request(Kind.INFER, 7, 9, 150_000, -3, 5, 11, 2)
    fields = struct.unpack("<IHHIIQQqqQII", raw)
    assert raw[:4] == b"CRUN"
    assert fields == (0x4E555243, 1, 1, 2, 7, 9, 150_000, -3, 5, 11, crc32(raw[:56]), 0)
    raw = pack_reply(Kind.REPLY, 7, 9, Status.REJECTED, range(1, 11), 40, 4)
    fields = struct.unpack("<IHHIIQI10qQIII", raw)
    assert fields == (0x4E555243, 1, 2, 1 << 31, 7, 9, 1, *range(1, 11), 40, 4, crc32(raw[:120]), 0)


@pytest.mark.parametrize(
    ("form", "offset", "value", "words"),
    [
        ("<I", 0, 0x47455420, "not a corun frame"),
        ("<H", 4, 2, "protocol version 2; this side speaks version 1"),
        ("<H", 6, 9, "unknown frame kind 9"),
        ("<Q", 24, MAX_PAYLOAD + 1, "over the limit"),
        ("<I", 8, 1 << 31, "a reply header instead of a request"),
    ],
    ids=["magic", "version", "kind", "length", "direction"],
)
def test_what_is_wrong_with_a_request_header_is_named(form: str, offset: int, value: int, words: str) -> None:
    """With a checksum that fits, the field itself is checked and the error names it."""
    raw = with_field(pack_request(Kind.INFER, 0, 1, 10), form, offset, value, REQUEST_CRC)
    with pytest.raises(FrameError, match=words):
        unpack_request(raw)


@pytest.mark.parametrize(
    ("form", "offset", "value", "words"),
    [
        ("<I", 0, 0, "not a corun frame"),
        ("<H", 4, 0, "protocol version 0"),
        ("<H", 6, 99, "unknown frame kind 99"),
        ("<Q", 108, 2**63, "over the limit"),
        ("<I", 8, 0, "a request header where a reply was expected"),
    ],
    ids=["magic", "version", "kind", "length", "direction"],
)
def test_what_is_wrong_with_a_reply_header_is_named(form: str, offset: int, value: int, words: str) -> None:
    """The same for replies."""
    raw = with_field(pack_reply(Kind.REPLY, 0, 1, 0, range(10), 10), form, offset, value, REPLY_CRC)
    with pytest.raises(FrameError, match=words):
        unpack_reply(raw)


# Readers


def a_frame(number: int, size: int, reply: bool) -> tuple[bytes, bytes]:
    payload = random.Random(number).randbytes(size)
    if reply:
        return pack_reply(Kind.REPLY, 1, number, 0, range(10), size), payload
    return pack_request(Kind.INFER, 1, number, size, number), payload


def test_byte_by_byte(pair: tuple[socket.socket, socket.socket]) -> None:
    """Nothing is assumed about the size of a piece, one byte included; frames end with their last byte."""
    near, far = pair
    reader, stream = RequestReader(), b"".join(sum((a_frame(number, 3, False) for number in range(3)), ()))
    seen = []
    for index in range(len(stream)):
        near.sendall(stream[index : index + 1])
        seen += [(index, frame.header.id) for frame in reader.receive(far)]
        assert reader.mid_frame == ((index + 1) % 67 != 0)
    assert seen == [(66, 0), (133, 1), (200, 2)]


def test_several_frames_in_one_receive(pair: tuple[socket.socket, socket.socket]) -> None:
    """Small frames that are here together come together: one system call, not one per frame."""
    near, far = pair
    near.sendall(b"".join(sum((a_frame(number, 100, False) for number in range(50)), ())))
    frames = RequestReader().receive(far)
    assert [frame.header.id for frame in frames] == list(range(50))


@pytest.mark.parametrize("piece", [100, 8192, 65536], ids=str)
def test_a_large_payload_in_pieces(piece: int, pair: tuple[socket.socket, socket.socket]) -> None:
    """150 KB between two small frames comes whole, whatever the pieces, through a socket that never blocks."""
    near, far = pair
    far.setblocking(False)
    sent = [a_frame(number, size, False) for number, size in enumerate((10, 150_000, 10))]
    stream, reader = b"".join(header + payload for header, payload in sent), RequestReader()
    frames: list[Frame] = []
    for start in range(0, len(stream), piece):
        near.sendall(stream[start : start + piece])
        while select.select([far], [], [], 0)[0]:
            frames += reader.receive(far)
    assert [(frame.header, bytes(frame.payload)) for frame in frames] == [
        (unpack_request(header), payload) for header, payload in sent
    ]
    assert not reader.mid_frame


# Addresses and sockets


@pytest.mark.parametrize("host", ["192.0.2.1", "a..b", "x" * 70])
def test_an_address_that_is_not_ours_is_bad_input(host: str) -> None:
    """No such interface, no possible host name: InputError with the address."""
    with pytest.raises(InputError, match="cannot listen on"):
        listen(Address("tcp", host, 0))


@pytest.mark.parametrize("host", ["127.0.0.1", "a..b"])
def test_nobody_there_is_said_with_the_address(host: str) -> None:
    """A refused connection and an impossible host name are PeerClosed that ask whether the server runs."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(PeerClosed, match=r"cannot connect to .*; is the server running there"):
            connect(Address("tcp", host, silent.getsockname()[1]))


# Channels


def test_a_request_right_behind_a_reply_is_not_lost(pair: tuple[socket.socket, socket.socket]) -> None:
    """A peer that answers and asks in one piece is understood: the request waits until it is received."""
    near, channel = pair[0], Channel(pair[1])
    id = channel.send(Stats())
    body, ask = b'{"received": 3}', encode(Drain(5))
    near.sendall(
        pack_reply(Kind.STATS, 0, id, 0, range(10), len(body))
        + body
        + pack_request(Kind.DRAIN, 0, 4, len(ask))
        + ask
        + pack_request(Kind.STOP, 0, 5, 0)
    )
    assert channel.wait_reply(id, 10) == {"received": 3}
    assert [message for _, message in (channel.receive(0), channel.receive(0)) if message] == [Drain(5), Stop()]


def test_waiting_ends_with_the_timeout(pair: tuple[socket.socket, socket.socket]) -> None:
    """Nothing came: receive gives None, request raises PeerClosed, and the channel still works afterwards."""
    here, there = Channel(pair[0]), Channel(pair[1])
    assert here.receive(0) is None
    assert here.receive(0.01) is None
    with pytest.raises(PeerClosed, match=r"no answer within 0.01 s"):
        here.request(Stats(), 0.01)
    there.reply((there.receive(10) or (None,))[0], {"late": 1})
    id = here.send(Stats())
    there.reply((there.receive(10) or (None,))[0], {"right": 1})
    assert here.wait_reply(id, 10) == {"right": 1}


def test_a_slow_peer_is_understood(pair: tuple[socket.socket, socket.socket]) -> None:
    """Half a message within the timeout is kept; the rest completes it later."""
    near, channel = pair[0], Channel(pair[1])
    raw = pack_request(Kind.WARMUP, 0, 1, 11) + b'{"count":7}'
    for begin, end in ((0, 5), (5, 64), (64, 70)):
        near.sendall(raw[begin:end])
        assert channel.receive(0) is None
    near.sendall(raw[70:])
    received = channel.receive(10)
    assert received is not None
    assert received[1] == Warmup(7)


def test_garbage_on_a_channel_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    """Bytes that are no frame, or a frame that is no control message, raise FrameError."""
    near, channel = pair[0], Channel(pair[1])
    near.sendall(pack_request(Kind.INFER, 0, 1, 0))
    with pytest.raises(FrameError, match="not a control message"):
        channel.receive(10)
    near.sendall(b"HTTP/1.1 200 OK\r\n".ljust(128))
    with pytest.raises(FrameError, match="not a corun frame"):
        channel.receive(10)
