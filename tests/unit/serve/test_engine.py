"""The engine: stages in order, stamped; what a model raises is answered, never fatal."""

from __future__ import annotations

import struct
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.serve.tools import FakeServable, request

from corun import images
from corun.clock import now_ns
from corun.errors import InputError
from corun.registry import ModelOptions
from corun.serve.engine import (
    D2H,
    DECODED,
    DEVICE,
    H2D,
    PREPROCESSED,
    CudaStages,
    ServableEngine,
    load_engine,
    model_options,
)
from corun.serve.queue import Request
from corun.wire import MAX_PAYLOAD, Status
from corun.wire.messages import Load

STAGES = (DECODED, PREPROCESSED, H2D, DEVICE, D2H)
ORDERS = st.lists(st.sampled_from([b"a", b"bc", b"", b"bad", b"worse"]), min_size=1, max_size=10)


def run(payloads: list[bytes], servable: FakeServable | None = None) -> list[Request]:
    batch = [request(payload, id=index) for index, payload in enumerate(payloads)]
    ServableEngine(servable or FakeServable()).run(batch)
    return batch


@given(ORDERS)
@settings(max_examples=60)
def test_a_corrupt_payload_harms_nobody_else(payloads: list[bytes]) -> None:
    """ValueError is that request's BAD_REQUEST, another error its FAILED; its batch mates get their replies."""
    batch = run(payloads)
    good = [payload for payload in payloads if payload not in (b"bad", b"worse")]
    for payload, item in zip(payloads, batch, strict=True):
        if payload == b"bad":
            assert (item.status, item.batch) == (Status.BAD_REQUEST, 0)
            assert item.detail == "payload of 3 bytes is not a readable image"
        elif payload == b"worse":
            assert item.status == Status.FAILED
            assert "KeyError" in item.detail
        else:
            assert (item.status, item.reply, item.batch) == (Status.OK, b"reply to " + payload, len(good))


@given(ORDERS)
@settings(max_examples=40)
def test_stages_are_stamped_in_order(payloads: list[bytes]) -> None:
    """decoded <= preprocessed <= h2d <= device <= d2h, all after the call began; none where it did not get."""
    before = now_ns()
    for payload, item in zip(payloads, run(payloads), strict=True):
        stamps = [item.stamps[stage] for stage in STAGES]
        if payload in (b"bad", b"worse"):
            assert stamps == [0] * 5
        else:
            assert stamps == sorted(stamps)
            assert stamps[0] >= before


def test_the_payload_is_freed_once_it_is_decoded() -> None:
    """A waiting reply does not keep its request's bytes in memory."""
    assert [item.payload for item in run([b"abc", b"bad"])] == [b"", b""]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory"), MemoryError(), ZeroDivisionError("x")])
def test_an_exception_of_the_network_fails_the_batch_with_its_reason(error: Exception) -> None:
    """Every request of the batch is FAILED with the exception's name and text; the engine goes on."""
    servable = FakeServable()
    servable.error = error
    engine = ServableEngine(servable)
    batch = [request(b"a"), request(b"boom"), request(b"bad")]
    engine.run(batch)
    assert [item.status for item in batch] == [Status.FAILED, Status.FAILED, Status.BAD_REQUEST]
    assert type(error).__name__ in batch[0].detail
    assert str(error) in batch[1].detail
    after = [request(b"a")]
    engine.run(after)
    assert after[0].status == Status.OK


def test_a_long_reason_is_cut() -> None:
    """A traceback of a page does not become a reply of a page."""
    servable = FakeServable()
    servable.error = RuntimeError("x\n" * 10_000)
    (item,) = run([b"boom"], servable)
    assert len(item.detail) <= 500
    assert "\n" not in item.detail


@pytest.mark.parametrize(
    ("replies", "words"), [([b"one"], "1 replies to 2 requests"), ([b"", bytes(MAX_PAYLOAD + 1)], "more than")]
)
def test_a_plug_in_that_breaks_its_contract_is_named(
    replies: list[bytes], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too few replies, or one that no frame can carry, are FAILED with a sentence."""
    servable = FakeServable()
    monkeypatch.setattr(servable, "postprocess", lambda output, count: replies)
    for item in run([b"a", b"b"], servable):
        assert item.status == Status.FAILED
        assert words in item.detail


def test_warm_up_runs_single_requests_and_full_batches() -> None:
    """count examples at batch size 1 and count at the largest batch, each with its milliseconds."""
    servable = FakeServable()
    assert len(ServableEngine(servable).warm_up(2, 4)) == 4
    assert [len(batch) for batch in servable.batches] == [1, 1, 4, 4]
    servable.batches.clear()
    assert len(ServableEngine(servable).warm_up(3, 1)) == 3


class FakeCuda:
    """torch.cuda in virtual device time: each event happens `late` ms after the one before."""

    def __init__(self, late_ms: list[float]) -> None:
        self.calls: list[str] = []
        self.current = ""
        self.late = iter(late_ms)
        self.clock_ms = 0.0
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                fake.clock_ms += next(fake.late)
                self.at_ms = fake.clock_ms
                fake.calls.append("record")

            def synchronize(self) -> None:
                fake.calls.append("event.synchronize")

            def elapsed_time(self, end: Event) -> float:
                return end.at_ms - self.at_ms

        class Stream:
            def __init__(self, device: str) -> None:
                fake.calls.append(f"stream on {device}")

            def wait_stream(self, other: Any) -> None:
                fake.calls.append(f"waits for {other}")

        class Entered:
            def __init__(self, stream: Any) -> None:
                self.name = stream if isinstance(stream, str) else "enter"

            def __enter__(self) -> None:
                fake.calls.append(self.name)

            def __exit__(self, *exc: object) -> None:
                fake.calls.append("leave")

        self.module = SimpleNamespace(
            cuda=SimpleNamespace(
                Event=Event,
                Stream=Stream,
                stream=Entered,
                current_stream=lambda device: self.current or f"default of {device}",
                default_stream=lambda device: f"default of {device}",
            )
        )


@given(st.lists(st.floats(0, 1e4), min_size=6, max_size=6))
@settings(max_examples=60)
def test_event_times_become_ordered_stamps_of_our_clock(late_ms: list[float]) -> None:
    """However long the device took by its own clock, begin <= h2d <= device <= d2h <= now on ours."""
    cuda = FakeCuda(late_ms)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", cuda.module)
        stages = CudaStages("cuda:1")
        for _ in range(2):
            begun = now_ns()
            result, h2d, device, d2h = stages(FakeServable(), [b"a"])
            assert result == [b"a"]
            assert begun <= h2d <= device <= d2h <= now_ns()


def test_the_device_is_waited_for_on_our_own_stream_only() -> None:
    """A stream of our own after what the model's loading did, and one event's synchronise per batch."""
    cuda = FakeCuda([1.0] * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", cuda.module)
        CudaStages("cuda:1")(FakeServable(), [b"a"])
    assert cuda.calls == [
        "stream on cuda:1",
        "waits for default of cuda:1",
        "enter",
        "record",
        "record",
        "record",
        "leave",
        "event.synchronize",
    ]


def test_in_a_lane_the_stages_run_on_the_lanes_stream() -> None:
    """Where the thread's current stream is not the default one no other is made: priority and SMs are the lane's."""
    cuda = FakeCuda([1.0] * 3)
    cuda.current = "high priority"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", cuda.module)
        CudaStages("cuda:1")(FakeServable(), [b"a"])
    assert cuda.calls == ["high priority", "record", "record", "record", "leave", "event.synchronize"]


def test_options_of_a_load_message_are_checked() -> None:
    """Unknown names get a suggestion, wrong types are named; nothing reaches a model unchecked."""
    assert model_options({"image_size": 64, "extra": {"conf": 0.3}}) == ModelOptions(
        image_size=64, extra={"conf": 0.3}
    )
    with pytest.raises(InputError, match=r'"image_sise" is unknown; did you mean "image_size"'):
        model_options({"image_sise": 64})
    with pytest.raises(InputError, match="image_size"):
        model_options({"image_size": "big"})


def test_a_load_message_overrides_only_what_it_says() -> None:
    """Device and precision of the server stay in force for a model loaded later."""
    engine = load_engine(Load("null", {"extra": {"reply_bytes": 7}}), ModelOptions(device="auto", precision="bf16"))
    assert (engine.info.model, engine.info.precision, engine.info.device) == ("null", "bf16", "cpu")
    batch = [request(b"anything")]
    engine.run(batch)
    assert batch[0].reply == bytes(7)


def test_an_unknown_model_is_bad_input() -> None:
    """With a suggestion."""
    with pytest.raises(InputError, match='did you mean "null"'):
        load_engine(Load("nul"), ModelOptions())


def test_a_real_classifier_answers_and_refuses_corrupt_images() -> None:
    """squeezenet1_1 at 64 px: five (class, probability) pairs for a JPEG, BAD_REQUEST for half of one."""
    options = ModelOptions(device="cpu", image_size=64)
    engine = load_engine(Load("squeezenet1_1"), options)
    jpeg = images.encode_jpeg(images.made_image(1, 80, 80))
    batch = [request(jpeg), request(jpeg[: len(jpeg) // 2]), request(b"GIF89a"), request(jpeg)]
    engine.run(batch)
    assert [item.status for item in batch] == [Status.OK, Status.BAD_REQUEST, Status.BAD_REQUEST, Status.OK]
    assert "not a readable image" in batch[1].detail
    pairs = list(struct.iter_unpack("<if", batch[0].reply))
    assert len(pairs) == 5
    assert [probability for _, probability in pairs] == sorted((p for _, p in pairs), reverse=True)
    assert batch[0].reply == batch[3].reply
