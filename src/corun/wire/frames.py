"""Headers of protocol v1: 64 bytes for a request, 128 for a reply, little endian, raw payload behind them.

    request  magic u32 | version u16 | kind u16 | flags u32 | stream u32 | id u64 | payload_len u64
             | t_intended i64 | t_tx i64 | shape u64 | crc32 u32 | pad u32
    reply    magic u32 | version u16 | kind u16 | flags u32 | stream u32 | id u64 | status u32
             | 10 x stamp i64 | payload_len u64 | batch u32 | crc32 u32 | pad u32

crc32 covers the header before it, not the payload: over 150 KB it would cost more than the round trip.
Nothing on the wire is executable: no pickle, no eval.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from corun.errors import FrameError

MAGIC = 0x4E555243  # b"CRUN"
VERSION = 1
MAX_PAYLOAD = 64 << 20

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
REQUEST_SIZE = REQUEST.size
REPLY_SIZE = REPLY.size
_REQUEST_HEAD = struct.Struct("<IHHIIQQqqQ")
_REPLY_HEAD = struct.Struct("<IHHIIQI10qQI")
_CRC = struct.Struct("<II")


class Kind(IntEnum):
    """What a frame asks for."""

    INFER = 1
    REPLY = 2
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
    head = _REQUEST_HEAD.pack(MAGIC, VERSION, kind, flags, stream, id, payload_len, t_intended, t_tx, shape)
    return head + _CRC.pack(zlib.crc32(head), 0)


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
    _REQUEST_HEAD.pack_into(buffer, 0, MAGIC, VERSION, kind, flags, stream, id, payload_len, t_intended, t_tx, shape)
    _CRC.pack_into(buffer, 56, zlib.crc32(memoryview(buffer)[:56]), 0)


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
    head = _REPLY_HEAD.pack(MAGIC, VERSION, kind, flags, stream, id, status, *stamps, payload_len, batch)
    return head + _CRC.pack(zlib.crc32(head), 0)


def _check(magic: int, version: int, kind: int, payload_len: int, max_payload: int) -> None:
    if magic != MAGIC:
        raise FrameError(f"not a corun frame: magic {magic:#010x} instead of {MAGIC:#010x}")
    if version != VERSION:
        raise FrameError(f"protocol version {version}; this side speaks version {VERSION}")
    if kind not in KINDS:
        raise FrameError(f"unknown frame kind {kind}")
    if payload_len > max_payload:
        raise FrameError(f"a payload of {payload_len} bytes is over the limit of {max_payload}")


def unpack_request(
    buffer: bytes | bytearray | memoryview, offset: int = 0, max_payload: int = MAX_PAYLOAD
) -> RequestHeader:
    """The request header at `offset`; FrameError names what is wrong with it."""
    (magic, version, kind, flags, stream, id, payload_len, t_intended, t_tx, shape, crc, _) = REQUEST.unpack_from(
        buffer, offset
    )
    _check(magic, version, kind, payload_len, max_payload)
    if crc != zlib.crc32(memoryview(buffer)[offset : offset + 56]):
        raise FrameError("the request header's checksum does not match its content")
    return RequestHeader(kind, flags, stream, id, payload_len, t_intended, t_tx, shape)


def unpack_reply(
    buffer: bytes | bytearray | memoryview, offset: int = 0, max_payload: int = MAX_PAYLOAD
) -> ReplyHeader:
    """The reply header at `offset`; FrameError names what is wrong with it."""
    fields = REPLY.unpack_from(buffer, offset)
    magic, version, kind, flags, stream, id, status = fields[:7]
    payload_len, batch, crc = fields[17], fields[18], fields[19]
    _check(magic, version, kind, payload_len, max_payload)
    if crc != zlib.crc32(memoryview(buffer)[offset : offset + 120]):
        raise FrameError("the reply header's checksum does not match its content")
    return ReplyHeader(kind, flags, stream, id, status, fields[7:17], payload_len, batch)
