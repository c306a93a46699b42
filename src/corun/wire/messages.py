"""Control messages: JSON bodies of the frames that are not INFER, validated by msgspec."""

from __future__ import annotations

from typing import Any

import msgspec

from corun.errors import FrameError
from corun.wire.frames import Kind


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who is on this end; a server answers with its own as the reply body."""

    role: str
    name: str = ""
    pid: int = 0
    version: str = ""
    model: str = ""
    device: str = ""
    shapes: dict[str, Any] = {}
    clock_ns: int = 0
    host: str = ""
    info: dict[str, Any] = {}


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Load another model into a running server; `options` are the fields of registry.ModelOptions."""

    model: str
    options: dict[str, Any] = {}


class Clock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One probe of the four-stamp handshake; the reply body has t1_ns and t2_ns."""

    t0_ns: int = 0


class Warmup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Run the model `count` times on its own example, unrecorded."""

    count: int = 3


class Arm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prepare one segment; answered when ready.

    start_at_ns and stop_at_ns are CLOCK_MONOTONIC of the receiver's host. rows first..last-1 of the schedule
    belong to this segment (clients only).
    """

    arm: str
    repeat: int
    segment: int
    start_at_ns: int
    stop_at_ns: int
    first: int = 0
    last: int = 0


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The armed instant stands."""

    segment: int = 0


class Stats(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Counters so far, as the reply body."""


class Drain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Finish what is outstanding, then answer with the counts of the segment."""

    timeout_ms: int = 10_000


class Stop(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Save and exit."""

    reason: str = ""


Message = Hello | Load | Clock | Warmup | Arm | Start | Stats | Drain | Stop

_BY_KIND: dict[int, type[Message]] = {
    Kind.HELLO: Hello,
    Kind.LOAD: Load,
    Kind.CLOCK: Clock,
    Kind.WARMUP: Warmup,
    Kind.ARM: Arm,
    Kind.START: Start,
    Kind.STATS: Stats,
    Kind.DRAIN: Drain,
    Kind.STOP: Stop,
}
_KIND_OF = {message: Kind(kind) for kind, message in _BY_KIND.items()}

encode = msgspec.json.encode


def kind_of(message: Message) -> Kind:
    """The frame kind that carries this message."""
    return _KIND_OF[type(message)]


def decode(kind: int, payload: bytes | bytearray) -> Message:
    """The message of a control frame; FrameError says which field is wrong."""
    if kind not in _BY_KIND:
        raise FrameError(f"frame kind {kind} is not a control message")
    try:
        return msgspec.json.decode(payload or b"{}", type=_BY_KIND[kind])
    except (msgspec.DecodeError, RecursionError) as error:
        raise FrameError(f"bad {Kind(kind).name} message: {error}") from error


def decode_body(payload: bytes | bytearray) -> dict[str, Any]:
    """The body of a control reply as a dict."""
    try:
        return msgspec.json.decode(payload or b"{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise FrameError(f"bad control reply: {error}") from error
