"""Lanes and the training thread of one process, on a fake torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from corun.errors import RunFault
from corun.share.in_process import Lanes, TrainingThread, green_lanes, priority_lanes

SMS = 132


class FakeCuda:
    """torch.cuda as far as lanes need it; `log` tells which stream or context was entered."""

    def __init__(self, contexts: Any = None) -> None:
        self.log: list[str] = []
        if contexts is not None:
            self.green_contexts = contexts

    def Stream(self, device: str, priority: int = 0) -> Any:
        return SimpleNamespace(device=device, priority=max(-5, min(0, priority)), name=f"priority {priority}")

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.log.append(stream.name)
        yield

    def get_device_properties(self, device: int) -> Any:
        return SimpleNamespace(multi_processor_count=SMS)


def _torch(contexts: Any = None) -> Any:
    return SimpleNamespace(cuda=FakeCuda(contexts))


class Context:
    """A green context; how it is made and used differs by torch version."""

    def __init__(self, num_sms: int) -> None:
        self.num_sms = num_sms


def _since_2_15() -> Any:
    """Static `split`, a `Stream` method, and `sm_count`."""

    class Green(Context):
        @property
        def sm_count(self) -> int:
            return -(-self.num_sms // 8) * 8

        def Stream(self) -> Any:
            return SimpleNamespace(name=f"green {self.num_sms}")

        @staticmethod
        def split(*, num_sms: tuple[int, int], backfill: tuple[bool, bool], device_id: int) -> tuple[Any, Any]:
            assert (num_sms[1], backfill) == (0, (False, True))
            return Green(num_sms[0]), Green(SMS - num_sms[0])

    return SimpleNamespace(GreenContext=Green)


def _of_2_12() -> Any:
    """Keyword-only `create` and a `Stream` method."""

    class Green(Context):
        def Stream(self) -> Any:
            return SimpleNamespace(name=f"green {self.num_sms}")

        @staticmethod
        def create(*, num_sms: int, device_id: int) -> Any:
            return Green(num_sms)

    return SimpleNamespace(GreenContext=Green)


def _of_2_10(log: list[str]) -> Any:
    """`create(num_sms, device_id)` with contexts that are made current."""

    class Green(Context):
        def set_context(self) -> None:
            log.append(f"set {self.num_sms}")

        def pop_context(self) -> None:
            log.append(f"pop {self.num_sms}")

        @staticmethod
        def create(num_sms: int, device_id: int) -> Any:
            return Green(num_sms)

    return SimpleNamespace(GreenContext=Green, SUPPORTED=True)


def _enter(lanes: Lanes) -> None:
    with lanes.service():
        pass
    with lanes.trainer():
        pass


def test_priority_lanes_differ_in_priority_and_read_it_back() -> None:
    """The service's stream has the priority that CUDA really gave, the trainer's the least."""
    torch = _torch()
    lanes = priority_lanes(torch, "cuda:0", -9)
    _enter(lanes)
    assert lanes.in_force == {"service_priority": -5, "trainer_priority": 0}
    assert torch.cuda.log == ["priority -9", "priority 0"]


@pytest.mark.parametrize("version", ["2.15", "2.12", "2.10"])
def test_green_lanes_work_with_every_interface(version: str) -> None:
    """Whatever torch offers (split, create, current contexts), both sides get their SMs."""
    log: list[str] = []
    contexts = {"2.15": _since_2_15, "2.12": _of_2_12, "2.10": lambda: _of_2_10(log)}[version]()
    torch = _torch(contexts)
    lanes = green_lanes(torch, 0, 30)
    _enter(lanes)
    if version == "2.10":
        assert log == ["set 30", "pop 30", "set 102", "pop 102"]
    else:
        assert torch.cuda.log == ["green 30", "green 102"]
    assert lanes.in_force == (
        {"service_sms": 32, "trainer_sms": 104} if version == "2.15" else {"service_sms": 30, "trainer_sms": 102}
    )


def test_green_lanes_say_why_not() -> None:
    """No such torch, a build without support, an impossible number and a refusing driver are faults with reasons."""
    with pytest.raises(RunFault, match="no green contexts"):
        green_lanes(_torch(), 0, 30)
    unsupported = _of_2_10([])
    unsupported.SUPPORTED = False
    with pytest.raises(RunFault, match="no green contexts"):
        green_lanes(_torch(unsupported), 0, 30)
    with pytest.raises(RunFault, match="132 SMs to divide"):
        green_lanes(_torch(_of_2_12()), 0, SMS)

    def refuse(**_: Any) -> Any:
        raise RuntimeError("Green Context requires CUDA driver and cuda.bindings 12.8+")

    broken = SimpleNamespace(GreenContext=SimpleNamespace(create=refuse))
    with pytest.raises(RunFault, match=r"cuda\.bindings"):
        green_lanes(_torch(broken), 0, 30)


def test_the_installed_torch_has_the_interface_this_was_written_for() -> None:
    """GreenContext of the installed version offers `split` or `create`, and `Stream` or `set_context`."""
    torch = pytest.importorskip("torch")
    maker = torch.cuda.green_contexts.GreenContext
    assert hasattr(maker, "split") or hasattr(maker, "create")
    assert hasattr(maker, "Stream") or hasattr(maker, "set_context")


def test_a_training_thread_trains_in_its_lane_until_stopped() -> None:
    """Steps run in the lane, one after the other, and stop at a step's end."""
    torch, three = _torch(), threading.Event()
    lanes = priority_lanes(torch, "cuda:0", -5)

    def step() -> None:
        if thread.steps >= 3:
            three.set()

    thread = TrainingThread(step, lanes.trainer)
    thread.start()
    assert three.wait(60)
    thread.stop(60)
    assert thread.steps >= 3
    assert torch.cuda.log == ["priority 0"]


def test_what_ends_training_early_is_raised_at_the_stop() -> None:
    """An exception in the thread is not lost, and a thread that hangs is said to."""

    def fail() -> None:
        raise ValueError("shapes differ")

    lane = priority_lanes(_torch(), "cuda:0", 0).trainer
    thread = TrainingThread(fail, lane)
    thread.start()
    with pytest.raises(RunFault, match="shapes differ"):
        thread.stop(60)

    release, entered = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        release.wait(60)

    hanging = TrainingThread(hang, lane)
    hanging.start()
    assert entered.wait(60)
    with pytest.raises(RunFault, match="did not end its step"):
        hanging.stop(0.01)
    release.set()
