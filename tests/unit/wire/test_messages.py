"""Control messages: JSON that is validated, whatever arrives."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import FrameError
from corun.wire.frames import Kind
from corun.wire.messages import (
    Arm,
    Clock,
    Drain,
    Hello,
    Load,
    Message,
    Start,
    Stats,
    Stop,
    Warmup,
    decode,
    decode_body,
    encode,
    kind_of,
)

MESSAGES: list[Message] = [
    Hello("client", name="a", pid=3, shapes={"image_size": 224}, info={"threads": 1}),
    Load("resnet18", {"precision": "bf16"}),
    Clock(5),
    Warmup(2),
    Arm("corun", 1, 2, 3, 4, 5, 6),
    Start(7),
    Stats(),
    Drain(250),
    Stop("done"),
]
CONTROL = sorted(set(Kind) - {Kind.INFER, Kind.REPLY, Kind.CANCEL})


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was_sent(message: Message) -> None:
    """decode(encode(x)) == x, by the kind its frame carries."""
    assert decode(kind_of(message), encode(message)) == message


def test_every_control_kind_has_a_message() -> None:
    """No frame kind but INFER, REPLY and CANCEL is without a message, and no message without a kind."""
    assert sorted(kind_of(message) for message in MESSAGES) == CONTROL


@given(st.sampled_from(CONTROL), st.binary(max_size=100))
@settings(max_examples=120)
def test_garbage_raises_only_frame_errors(kind: int, body: bytes) -> None:
    """Whatever the body, the answer is a message or a FrameError."""
    with contextlib.suppress(FrameError):
        decode(kind, body)
    with contextlib.suppress(FrameError):
        assert isinstance(decode_body(body), dict)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(CONTROL), JSON)
@settings(max_examples=120)
def test_json_of_another_shape_raises_only_frame_errors(kind: int, value: object) -> None:
    """Well-formed JSON with wrong fields or types is refused the same way."""
    with contextlib.suppress(FrameError):
        decode(kind, msgspec.json.encode(value))


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"options":' * 50_000], ids=["arrays", "objects"])
def test_deep_nesting_cannot_break_the_server(body: bytes) -> None:
    """A body nested deeper than the interpreter's stack allows is a FrameError like any other."""
    for kind in (Kind.LOAD, Kind.HELLO):
        with pytest.raises(FrameError):
            decode(kind, body)
    with pytest.raises(FrameError):
        decode_body(body)


def test_the_error_names_message_and_field() -> None:
    """A wrong or unknown field is named with its message."""
    with pytest.raises(FrameError, match=r"ARM message: .*repeat"):
        decode(Kind.ARM, b'{"arm":"alone","repeat":"x","segment":0,"start_at_ns":0,"stop_at_ns":0}')
    with pytest.raises(FrameError, match=r"LOAD message: .*weight"):
        decode(Kind.LOAD, b'{"model":"a","weight":1}')
    with pytest.raises(FrameError, match="not a control message"):
        decode(Kind.INFER, b"{}")


def test_an_empty_body_is_a_message_without_fields() -> None:
    """STATS and the like may come without a body."""
    assert decode(Kind.STATS, b"") == Stats()
    assert decode(Kind.STOP, bytearray()) == Stop()
    assert decode_body(b"") == {}
