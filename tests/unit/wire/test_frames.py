"""The two headers of protocol v1: what is packed comes back, and nothing else is believed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import FrameError
from corun.wire.frames import (
    KINDS,
    MAGIC,
    MAX_NUMBER,
    MAX_PAYLOAD,
    NO_STAMPS,
    PART,
    REPLY_SIZE,
    REQUEST_SIZE,
    STAMPS,
    STREAM,
    Kind,
    Status,
    is_reply,
    number_in,
    pack_reply,
    pack_request,
    pack_request_into,
    reply_flags,
    request_flags,
    unpack_reply,
    unpack_request,
)

U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
FLAGS = st.integers(0, 2**31 - 1)
I64 = st.integers(-(2**63), 2**63 - 1)
KIND = st.sampled_from(sorted(KINDS))
LENGTH = st.integers(0, MAX_PAYLOAD)
STAMP_LIST = st.lists(I64, min_size=len(STAMPS), max_size=len(STAMPS))


def test_the_sizes_are_those_of_the_specification() -> None:
    """A request header has 64 bytes, a reply header 128, and both begin with b"CRUN"."""
    assert (REQUEST_SIZE, REPLY_SIZE) == (64, 128)
    assert len(pack_request(Kind.INFER, 0, 0, 0)) == 64
    assert len(pack_reply(Kind.REPLY, 0, 0, Status.OK, NO_STAMPS, 0)) == 128
    assert MAGIC.to_bytes(4, "little") == b"CRUN" == pack_request(Kind.INFER, 0, 0, 0)[:4]


@given(KIND, U32, U64, LENGTH, I64, I64, U64, FLAGS)
@settings(max_examples=60)
def test_a_request_comes_back_as_it_was_packed(
    kind: int, stream: int, id: int, length: int, intended: int, tx: int, shape: int, flags: int
) -> None:
    """unpack(pack(x)) == x for every field, at every offset, and packing in place gives the same bytes."""
    packed = pack_request(kind, stream, id, length, intended, tx, shape, flags)
    assert unpack_request(packed) == (kind, flags, stream, id, length, intended, tx, shape)
    assert unpack_request(memoryview(b"abc" + packed), 3) == unpack_request(packed)
    buffer = bytearray(64)
    pack_request_into(buffer, kind, stream, id, length, intended, tx, shape, flags)
    assert bytes(buffer) == packed
    assert not is_reply(packed)


@given(KIND, U32, U64, st.integers(0, 100), STAMP_LIST, LENGTH, U32, FLAGS)
@settings(max_examples=60)
def test_a_reply_comes_back_as_it_was_packed(
    kind: int, stream: int, id: int, status: int, stamps: list[int], length: int, batch: int, flags: int
) -> None:
    """unpack(pack(x)) == x for every field and all ten stamps, and a reply is told from a request."""
    packed = pack_reply(kind, stream, id, status, stamps, length, batch, flags)
    assert unpack_reply(packed) == (kind, flags, stream, id, status, tuple(stamps), length, batch)
    assert unpack_reply(bytearray(b"x" + packed), 1) == unpack_reply(packed)
    assert is_reply(packed)


@given(st.integers(0, 59), st.integers(0, 7))
@settings(max_examples=80)
def test_one_flipped_bit_of_a_request_is_refused(byte: int, bit: int) -> None:
    """No single bit before the padding can change without a FrameError."""
    packed = bytearray(pack_request(Kind.INFER, 7, 11, 4096, 1, 2, 3))
    packed[byte] ^= 1 << bit
    with pytest.raises(FrameError):
        unpack_request(packed)


@given(st.integers(0, 123), st.integers(0, 7))
@settings(max_examples=80)
def test_one_flipped_bit_of_a_reply_is_refused(byte: int, bit: int) -> None:
    """No single bit before the padding can change without a FrameError."""
    packed = bytearray(pack_reply(Kind.REPLY, 7, 11, Status.OK, range(10), 4096))
    packed[byte] ^= 1 << bit
    with pytest.raises(FrameError):
        unpack_reply(packed)


@given(st.binary(min_size=0, max_size=200))
@settings(max_examples=120)
def test_garbage_raises_only_frame_errors(data: bytes) -> None:
    """Whatever the bytes, unpacking gives a FrameError and never another exception."""
    for unpack in (unpack_request, unpack_reply):
        with pytest.raises(FrameError):
            unpack(data)


def test_each_defect_has_its_own_sentence() -> None:
    """The error names what is wrong: magic, version, kind, length, direction, checksum, truncation."""
    good = pack_request(Kind.INFER, 0, 0, 100)
    reply = pack_reply(Kind.REPLY, 0, 0, Status.OK, NO_STAMPS, 0)
    cases = {
        "magic": b"HTTP" + good[4:],
        "version 9": good[:4] + struct.pack("<H", 9) + good[6:],
        "kind 999": good[:6] + struct.pack("<H", 999) + good[8:],
        "over the limit": good[:24] + struct.pack("<Q", MAX_PAYLOAD + 1) + good[32:],
        "a reply header instead": reply,
        "checksum": good[:40] + b"\x01" + good[41:],
        "a header of 63 bytes": good[:63],
    }
    for sentence, header in cases.items():
        with pytest.raises(FrameError, match=sentence):
            unpack_request(header)
    with pytest.raises(FrameError, match="a request header where a reply"):
        unpack_reply(good + bytes(64))


def test_an_oversized_payload_cannot_be_announced() -> None:
    """Neither end packs a length over MAX_PAYLOAD, and a reader may have a lower limit."""
    with pytest.raises(FrameError, match="over the limit"):
        pack_request(Kind.INFER, 0, 0, MAX_PAYLOAD + 1)
    with pytest.raises(FrameError, match="over the limit"):
        pack_reply(Kind.REPLY, 0, 0, Status.OK, NO_STAMPS, MAX_PAYLOAD + 1)
    with pytest.raises(FrameError, match="over the limit of 10"):
        unpack_request(pack_request(Kind.INFER, 0, 0, 11), max_payload=10)


@given(stream=st.booleans(), deadline_ms=st.integers(0, MAX_NUMBER), tokens=st.integers(0, 2 * MAX_NUMBER))
def test_flags_carry_what_was_put_in(stream: bool, deadline_ms: int, tokens: int) -> None:
    """Stream bit and deadline of a request, part bit and tokens of a reply survive packing; tokens are capped."""
    asked = unpack_request(pack_request(Kind.INFER, 1, 2, 0, flags=request_flags(stream, deadline_ms)))
    assert (bool(asked.flags & STREAM), number_in(asked.flags)) == (stream, deadline_ms)
    given = unpack_reply(pack_reply(Kind.REPLY, 1, 2, 0, NO_STAMPS, 0, flags=reply_flags(tokens, stream)))
    assert (bool(given.flags & PART), number_in(given.flags)) == (stream, min(tokens, MAX_NUMBER))


@pytest.mark.parametrize("deadline_ms", [-1, MAX_NUMBER + 1])
def test_a_deadline_that_does_not_fit_is_refused(deadline_ms: int) -> None:
    """Nothing is cut to 23 bits silently."""
    with pytest.raises(FrameError, match="a deadline of"):
        request_flags(True, deadline_ms)
