"""Wire protocol v1: framing, control messages, addresses and channels."""

from corun.wire.frames import (
    MAX_PAYLOAD,
    REPLY_SIZE,
    REQUEST_SIZE,
    STAMPS,
    Kind,
    ReplyHeader,
    RequestHeader,
    Status,
    pack_reply,
    pack_request,
    pack_request_into,
    unpack_reply,
    unpack_request,
)
from corun.wire.reader import Frame, ReplyReader, RequestReader
from corun.wire.sockets import Address, connect, listen, tune

__all__ = [
    "MAX_PAYLOAD",
    "REPLY_SIZE",
    "REQUEST_SIZE",
    "STAMPS",
    "Address",
    "Frame",
    "Kind",
    "ReplyHeader",
    "ReplyReader",
    "RequestHeader",
    "RequestReader",
    "Status",
    "connect",
    "listen",
    "pack_reply",
    "pack_request",
    "pack_request_into",
    "tune",
    "unpack_reply",
    "unpack_request",
]
