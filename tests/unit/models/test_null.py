"""The null model: no torch, a reply of known length, a service time by the clock it is given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corun import registry
from corun.errors import InputError
from corun.registry import ModelOptions

null = registry.load_plugin("models", "null")


class FakeTime:
    """A clock that only moves when it is asked or slept on; sleep may wake early or late."""

    def __init__(self, wake: float = 1.0, tick_ns: int = 1) -> None:
        self.now, self.slept_s, self.wake, self.tick_ns = 0, 0.0, wake, tick_ns

    def clock(self) -> int:
        self.now += self.tick_ns
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds
        self.now += max(1, round(seconds * self.wake * 1e9))


def answer(model: object, payloads: list[bytes]) -> list[bytes]:
    batch = model.preprocess([model.decode(payload) for payload in payloads])
    return model.postprocess(model.to_host(model.forward(model.to_device(batch))), len(payloads))


@given(st.lists(st.binary(max_size=20), max_size=9), st.integers(0, 200))
def test_one_reply_per_sample_of_the_length_asked_for(payloads: list[bytes], length: int) -> None:
    """Any payloads are accepted; each gets one reply of exactly `reply_bytes` bytes."""
    model = null.Null(ModelOptions(extra={"reply_bytes": length}))
    replies = answer(model, payloads)
    assert [len(reply) for reply in replies] == [length] * len(payloads)


def test_the_default_reply_is_four_bytes_at_once() -> None:
    """Without options nothing is waited for and the reply has 4 bytes."""
    fake = FakeTime()
    model = null.Null(ModelOptions(), fake.clock, fake.sleep)
    assert answer(model, [model.example()]) == [bytes(4)]
    assert (fake.now, fake.slept_s) == (0, 0.0)


@given(st.floats(0.001, 1000), st.floats(0.1, 1.5), st.integers(1, 8))
def test_forward_ends_no_earlier_than_the_service_time(ms: float, wake: float, batch: int) -> None:
    """`forward` returns at or after service_ms on the clock, for any batch, however early sleep wakes."""
    fake = FakeTime(wake)
    model = null.Null(ModelOptions(extra={"service_ms": ms}), fake.clock, fake.sleep)
    model.forward(batch)
    assert fake.now >= round(ms * 1e6)
    assert fake.slept_s > 0


def test_busy_never_sleeps() -> None:
    """With busy the time is spent reading the clock, and ends within one reading of the deadline."""
    fake = FakeTime(tick_ns=1000)
    model = null.Null(ModelOptions(extra={"service_ms": 1, "busy": True}), fake.clock, fake.sleep)
    model.forward(1)
    assert fake.slept_s == 0
    assert 1_000_000 <= fake.now <= 1_002_000


def test_every_bad_option_is_named() -> None:
    """Unknown and ill-typed options are listed together, with a suggestion for a near miss."""
    extra = {"reply_byte": 1, "reply_bytes": -1, "service_ms": float("nan"), "busy": 1}
    with pytest.raises(InputError) as caught:
        null.Null(ModelOptions(extra=extra))
    text = str(caught.value)
    assert 'did you mean "reply_bytes"' in text
    assert len(caught.value.problems) == 4


def test_it_cannot_be_trained() -> None:
    """The model table says that null has no training."""
    assert registry.models()["null"].train is None


def test_torch_is_not_imported() -> None:
    """Loading and running the null model leaves torch, torchvision and PIL out of the process."""
    root = Path(__file__).resolve().parents[3]
    code = (
        "import sys; sys.path.insert(0, 'src')\n"
        "from corun import registry\n"
        "m = registry.load_plugin('models', 'null').MODELS[0].serve(registry.ModelOptions())\n"
        "m.postprocess(m.forward(m.preprocess([b''])), 1)\n"
        "sys.exit(bool({'torch', 'torchvision', 'PIL', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
