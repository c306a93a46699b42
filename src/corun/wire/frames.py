"""Headers of protocol v1: 64 bytes for a request, 128 for a reply, little endian, raw payload behind them.

    request  magic u32 | version u16 | kind u16 | flags u32 | stream u32 | id u64 | payload_len u64
             | t_intended i64 | t_tx i64 | shape u64 | crc32 u32 | pad u32
    reply    magic u32 | version u16 | kind u16 | flags u32 | stream u32 | id u64 | status u32
             | 10 x stamp i64 | payload_len u64 | batch u32 | crc32 u32 | pad u32

Bit 31 of flags marks a reply, so one stream can carry both directions' requests and replies (control channels).
crc32 covers the header before it, not the payload: over 150 KB it would cost more than the round trip.

flags of a request   bit 0 STREAM: send each token of the answer as it is made; bits 8..30: its deadline in ms after
                     t_intended (after its first byte where the peer's clock is another), 0 = none
flags of a reply     bit 0 PART: more replies to this request follow, the last one has no PART; bits 8..30: tokens
                     made so far, all of them in the last one; 0 of a model that makes none

Who does not set STREAM gets one reply. A PART has status OK, and as stamp d2h when its token reached the host. CANCEL
names a request of its own connection by stream and id; it has no reply of its own: the request's says CANCELLED, or
how it ended if that was sooner.
Nothing on the wire is executable: no pickle, no eval.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple
from zlib import crc32

from corun.errors import FrameError

MAGIC = 0x4E555243  # b"CRUN"
VERSION = 1
MAX_PAYLOAD = 64 << 20
REPLY_FLAG = 1 << 31
STREAM = PART = 1
NUMBER_SHIFT = 8
MAX_NUMBER = (REPLY_FLAG >> NUMBER_SHIFT) - 1

STAMPS = (
    "rx_first",
    "rx_done",
    "picked",
    "batched",
    "decoded",
    "preprocessed",
    "h2d",
    "device",
    "d2h",
    "tx",
)
NO_STAMPS = (0,) * len(STAMPS)

REQUEST = struct.Struct("<IHHIIQQqqQII")
REPLY = struct.Struct("<IHHIIQI10qQIII")
_REQUEST_FIELDS = struct.Struct("<QIIQQqqQII")
_REPLY_FIELDS = struct.Struct("<QIIQI10qQIII")
REQUEST_SIZE = REQUEST.size
REPLY_SIZE = REPLY.size
_REQUEST_HEAD = struct.Struct("<IHHIIQQqqQ")
_REPLY_HEAD = struct.Struct("<IHHIIQI10qQI")
_PREFIX = struct.Struct("<IHHI")
PREFIX_SIZE = _PREFIX.size
_CRC = struct.Struct("<II")

Buffer = bytes | bytearray | memoryview

# Bound once: looking a method up costs as much as a third of these calls.
_new = tuple.__new__
_pack_request, _pack_request_into = _REQUEST_HEAD.pack, _REQUEST_HEAD.pack_into
_pack_reply, _pack_crc, _pack_crc_into = _REPLY_HEAD.pack, _CRC.pack, _CRC.pack_into
_unpack_request, _unpack_reply = _REQUEST_FIELDS.unpack_from, _REPLY_FIELDS.unpack_from


class Kind(IntEnum):
    """What a frame asks for."""

    INFER = 1
    REPLY = 2
    CANCEL = 3
    HELLO = 16
    LOAD = 17
    CLOCK = 18
    WARMUP = 19
    ARM = 20
    START = 21
    STATS = 22
    DRAIN = 23
    STOP = 24


KINDS = frozenset(int(kind) for kind in Kind)
_kind_of = {MAGIC | VERSION << 32 | kind << 48: kind for kind in KINDS}.get


class Status(IntEnum):
    """How a request ended; LOST exists only in client records (no reply came)."""

    OK = 0
    REJECTED = 1
    BAD_REQUEST = 2
    FAILED = 3
    NOT_LOADED = 4
    DRAINING = 5
    EXPIRED = 6
    CANCELLED = 7
    LOST = 100


class RequestHeader(NamedTuple):
    """A request header; times in ns of the sender's CLOCK_MONOTONIC."""

    kind: int
    flags: int
    stream: int
    id: int
    payload_len: int
    t_intended: int
    t_tx: int
    shape: int


class ReplyHeader(NamedTuple):
    """A reply header; stamps in ns of the server's CLOCK_MONOTONIC, in the order of STAMPS, 0 = not reached."""

    kind: int
    flags: int
    stream: int
    id: int
    status: int
    stamps: tuple[int, ...]
    payload_len: int
    batch: int


def request_flags(stream: bool = False, deadline_ms: int = 0) -> int:
    """Flags of a request; FrameError when the deadline is not 0 to MAX_NUMBER ms (2.3 hours)."""
    if not 0 <= deadline_ms <= MAX_NUMBER:
        raise FrameError(f"a deadline of {deadline_ms} ms: give 1 to {MAX_NUMBER}, or 0 for none")
    return (STREAM if stream else 0) | deadline_ms << NUMBER_SHIFT


def reply_flags(tokens: int, part: bool = False) -> int:
    """Flags of a reply with so many tokens, at most MAX_NUMBER of them counted."""
    return (PART if part else 0) | min(tokens, MAX_NUMBER) << NUMBER_SHIFT


def number_in(flags: int) -> int:
    """The deadline in ms of a request's flags, the tokens of a reply's."""
    return flags >> NUMBER_SHIFT & MAX_NUMBER


def pack_request(
    kind: int,
    stream: int,
    id: int,
    payload_len: int,
    t_intended: int = 0,
    t_tx: int = 0,
    shape: int = 0,
    flags: int = 0,
) -> bytes:
    """A request header; raises FrameError when the payload is over MAX_PAYLOAD."""
    if payload_len > MAX_PAYLOAD:
        raise FrameError(f"a payload of {payload_len} bytes is over the limit of {MAX_PAYLOAD}")
    head = _pack_request(MAGIC, VERSION, kind, flags, stream, id, payload_len, t_intended, t_tx, shape)
    return head + _pack_crc(crc32(head), 0)


def pack_request_into(
    buffer: bytearray,
    kind: int,
    stream: int,
    id: int,
    payload_len: int,
    t_intended: int,
    t_tx: int,
    shape: int = 0,
    flags: int = 0,
) -> None:
    """Write a request header over the first 64 bytes of `buffer` (the sender's hot path: no allocation kept)."""
    _pack_request_into(buffer, 0, MAGIC, VERSION, kind, flags, stream, id, payload_len, t_intended, t_tx, shape)
    _pack_crc_into(buffer, 56, crc32(buffer[:56]), 0)


def pack_reply(
    kind: int,
    stream: int,
    id: int,
    status: int,
    stamps: Sequence[int],
    payload_len: int,
    batch: int = 1,
    flags: int = 0,
) -> bytes:
    """A reply header with ten stamps; raises FrameError when the payload is over MAX_PAYLOAD."""
    if payload_len > MAX_PAYLOAD:
        raise FrameError(f"a reply of {payload_len} bytes is over the limit of {MAX_PAYLOAD}")
    head = _pack_reply(MAGIC, VERSION, kind, flags | REPLY_FLAG, stream, id, status, *stamps, payload_len, batch)
    return head + _pack_crc(crc32(head), 0)


def _explain(buffer: Buffer, offset: int, payload_len: int, max_payload: int, reply: bool) -> FrameError:
    magic, version, kind, flags = _PREFIX.unpack_from(buffer, offset)
    if magic != MAGIC:
        return FrameError(f"not a corun frame: magic {magic:#010x} instead of {MAGIC:#010x}")
    if version != VERSION:
        return FrameError(f"protocol version {version}; this side speaks version {VERSION}")
    if kind not in KINDS:
        return FrameError(f"unknown frame kind {kind}")
    if payload_len > max_payload:
        return FrameError(f"a payload of {payload_len} bytes is over the limit of {max_payload}")
    if bool(flags & REPLY_FLAG) != reply:
        return FrameError(
            "a request header where a reply was expected" if reply else "a reply header instead of a request"
        )
    return FrameError("the header's checksum does not match its content")


def is_reply(buffer: Buffer) -> bool:
    """Whether the header at the start of `buffer` (PREFIX_SIZE bytes or more) is a reply's; FrameError on garbage."""
    magic, version, _, flags = _PREFIX.unpack_from(buffer)
    if magic != MAGIC or version != VERSION:
        raise _explain(buffer, 0, 0, 0, reply=False)
    return bool(flags & REPLY_FLAG)


def unpack_request(buffer: Buffer, offset: int = 0, max_payload: int = MAX_PAYLOAD) -> RequestHeader:
    """The request header at `offset`; FrameError names what is wrong with it."""
    try:
        fields = _unpack_request(buffer, offset)
    except struct.error:
        raise FrameError(f"a header of {len(buffer) - offset} bytes; it has {REQUEST_SIZE}") from None
    kind = _kind_of(fields[0])
    if (
        kind is None
        or fields[1] >= REPLY_FLAG
        or fields[4] > max_payload
        or fields[8] != crc32(buffer[offset : offset + 56])
    ):
        raise _explain(buffer, offset, fields[4], max_payload, reply=False)
    return _new(RequestHeader, (kind, *fields[1:8]))


def unpack_reply(buffer: Buffer, offset: int = 0, max_payload: int = MAX_PAYLOAD) -> ReplyHeader:
    """The reply header at `offset`; FrameError names what is wrong with it."""
    try:
        fields = _unpack_reply(buffer, offset)
    except struct.error:
        raise FrameError(f"a header of {len(buffer) - offset} bytes; it has {REPLY_SIZE}") from None
    kind, flags = _kind_of(fields[0]), fields[1]
    if (
        kind is None
        or flags < REPLY_FLAG
        or fields[15] > max_payload
        or fields[17] != crc32(buffer[offset : offset + 120])
    ):
        raise _explain(buffer, offset, fields[15], max_payload, reply=True)
    return _new(
        ReplyHeader, (kind, flags ^ REPLY_FLAG, fields[2], fields[3], fields[4], fields[5:15], fields[15], fields[16])
    )
