"""What a plug-in may do wrong at each stage without ending the server, and what is freed after it ran out of memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.serve.tools import FakeServable, Serving, request

from corun.errors import RunFault
from corun.serve.engine import D2H, DECODED, ServableEngine
from corun.wire import Status
from corun.wire.messages import Hello, Load

STAGES = ("preprocess", "to_device", "forward", "to_host", "postprocess")
ODD_TEXT = "cannot read /data/\udcff.jpg"


def failing(error: Exception) -> Callable[..., Any]:
    def stage(*arguments: object) -> Any:
        raise error

    return stage


@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_at_any_stage_is_the_batchs_and_not_the_engines(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request that was decoded is FAILED with the reason, has no reply, and the next batch is OK."""
    servable = FakeServable()
    engine, batch = ServableEngine(servable), [request(b"a"), request(b"bad"), request(b"b")]
    with monkeypatch.context() as patched:
        patched.setattr(servable, stage, failing(IndexError(f"in {stage}")))
        engine.run(batch)
    assert [item.status for item in batch] == [Status.FAILED, Status.BAD_REQUEST, Status.FAILED]
    assert batch[0].detail == batch[2].detail == f"IndexError: in {stage}"
    assert [item.batch for item in batch] == [0, 0, 0]
    after = [request(b"a"), request(b"b")]
    engine.run(after)
    assert [(item.status, item.reply, item.batch) for item in after] == [
        (Status.OK, b"reply to a", 2),
        (Status.OK, b"reply to b", 2),
    ]
    for item in after:
        stamps = item.stamps[DECODED : D2H + 1]
        assert stamps == sorted(stamps)


def test_after_out_of_memory_the_cache_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own out-of-memory error empties the device's cache, another error does not; both are FAILED."""

    class OutOfMemoryError(RuntimeError):
        pass

    emptied: list[int] = []
    cuda = SimpleNamespace(OutOfMemoryError=OutOfMemoryError, empty_cache=lambda: emptied.append(1))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    servable = FakeServable()
    engine = ServableEngine(servable)
    for error, count in ((RuntimeError("x"), 0), (MemoryError(), 0), (OutOfMemoryError("CUDA out of memory"), 1)):
        servable.error = error
        item = request(b"boom")
        engine.run([item])
        assert item.status == Status.FAILED
        assert item.detail.startswith(type(error).__name__)
        assert len(emptied) == count


@pytest.mark.parametrize(
    "reply", ["text", None, 3, memoryview(bytes(8)).cast("I")], ids=lambda reply: type(reply).__name__
)
def test_a_reply_that_is_not_bytes_is_a_failure(reply: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in that answers with another type gets FAILED; the client's stream of frames stays whole."""
    with Serving() as serving:
        client = serving.client()
        with monkeypatch.context() as patched:
            patched.setattr(serving.servable, "postprocess", lambda output, count: [reply] * count)
            frame = client.ask(b"x")
            assert frame.header.status == Status.FAILED  # type: ignore[union-attr]
            assert "instead of bytes" in json.loads(frame.payload)["error"]
        assert client.ask(b"x").payload == b"reply to x"


def test_a_reason_that_is_not_utf_8_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file name that is not UTF-8 inside an error message reaches the client with a replacement, from every side."""

    def load(message: Load) -> ServableEngine:
        if message.model == "odd":
            raise ValueError(ODD_TEXT)
        return ServableEngine(FakeServable(message.model))

    with Serving() as serving:
        client = serving.client()
        for stage, status in (("decode", Status.BAD_REQUEST), ("forward", Status.FAILED)):
            with monkeypatch.context() as patched:
                patched.setattr(serving.servable, stage, failing(ValueError(ODD_TEXT)))
                frame = client.ask(b"x")
                assert frame.header.status == status  # type: ignore[union-attr]
                assert "cannot read /data/?.jpg" in json.loads(frame.payload)["error"]
        assert client.ask(b"x").payload == b"reply to x"
    with Serving(load=load) as serving:
        with pytest.raises(RunFault, match=r"cannot read /data/\?\.jpg"):
            serving.ask(Load("odd"))
        assert serving.ask(Hello("test"))["model"] == "fake"
