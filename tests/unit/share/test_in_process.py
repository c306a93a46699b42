"""The lanes of one process on a fake torch: which thread issues its work on which stream."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corun.errors import InputError, RunFault
from corun.share.in_process import NO_LANES, Lanes, check_lanes, green_lanes, make_lanes, priority_lanes
from corun.share.policies import POLICIES

SMS = 132


class FakeCuda:
    """torch.cuda as far as lanes need it; `log` tells which stream was entered in which thread."""

    def __init__(self, contexts: Any = None) -> None:
        self.log: list[str] = []
        self.made: list[Any] = []
        self.current: dict[str, Any] = {}
        if contexts is not None:
            self.green_contexts = contexts

    def Stream(self, device: str, priority: int = 0) -> Any:
        clipped = max(-5, min(0, priority))
        self.made.append(SimpleNamespace(device=device, priority=clipped, name=f"priority {clipped}"))
        return self.made[-1]

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        thread = threading.current_thread().name
        self.log.append(stream.name)
        before = self.current.pop(thread, None)
        self.current[thread] = stream
        yield
        del self.current[thread]
        if before:
            self.current[thread] = before

    def synchronize(self, device: int) -> None:
        self.log.append(f"synchronise {device}")

    def get_device_properties(self, device: int) -> Any:
        return SimpleNamespace(multi_processor_count=SMS)


def _torch(contexts: Any = None) -> Any:
    device = lambda name: SimpleNamespace(index=int(name[5:]) if ":" in name else None)  # noqa: E731
    return SimpleNamespace(cuda=FakeCuda(contexts), device=device)


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


def _of_2_10() -> Any:
    """`create(num_sms, device_id)` with contexts that are made current: no streams of their own."""

    class Green(Context):
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
    assert torch.cuda.log == ["priority -5", "priority 0"]


def test_each_thread_in_a_lane_has_a_stream_of_its_own() -> None:
    """Two services share a priority and not a stream: one's work does not wait for the other's."""
    torch = _torch()
    lanes = priority_lanes(torch, "cuda:0", -5)
    with lanes.service(), lanes.service(), lanes.trainer():
        pass
    entered = torch.cuda.made[2:]
    assert [stream.priority for stream in entered] == [-5, -5, 0]
    assert len({id(stream) for stream in entered}) == 3


def test_a_lane_is_current_in_the_thread_that_entered_it_and_in_no_other() -> None:
    """What the main thread or another part does meanwhile is not on the lane's stream."""
    torch, entered, leave = _torch(), threading.Event(), threading.Event()
    lanes = priority_lanes(torch, "cuda:0", -5)

    def work() -> None:
        with lanes.service():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=work, name="model")
    thread.start()
    assert entered.wait(10)
    assert set(torch.cuda.current) == {"model"}
    leave.set()
    thread.join()
    assert torch.cuda.current == {}


@pytest.mark.parametrize("version", ["2.15", "2.12"])
def test_green_lanes_work_with_every_interface(version: str) -> None:
    """Whatever torch offers (split, create), both sides get streams on their SMs, after the primary context is there."""
    torch = _torch({"2.15": _since_2_15, "2.12": _of_2_12}[version]())
    lanes = make_lanes(torch, "cuda:1", {"kind": "green", "service_sms": 30})
    _enter(lanes)
    assert torch.cuda.log == ["synchronise 1", "green 30", "green 102"]
    assert lanes.in_force == (
        {"service_sms": 32, "trainer_sms": 104} if version == "2.15" else {"service_sms": 30, "trainer_sms": 102}
    )


def test_green_lanes_say_why_not() -> None:
    """No such torch, contexts without streams, a build without support, an impossible number, a refusing driver."""
    for contexts in (None, _of_2_10()):
        with pytest.raises(RunFault, match="no green contexts"):
            green_lanes(_torch(contexts), 0, 30)
    unsupported = _of_2_12()
    unsupported.SUPPORTED = False
    with pytest.raises(RunFault, match="no green contexts"):
        green_lanes(_torch(unsupported), 0, 30)
    with pytest.raises(RunFault, match="132 SMs to divide"):
        green_lanes(_torch(_of_2_12()), 0, SMS)

    def refuse(**_: Any) -> Any:
        raise RuntimeError("Green Context requires CUDA driver and cuda.bindings 12.8+")

    broken = SimpleNamespace(GreenContext=SimpleNamespace(create=refuse, Stream=None))
    with pytest.raises(RunFault, match=r"cuda\.bindings"):
        green_lanes(_torch(broken), 0, 30)


def test_the_installed_torch_has_the_interface_this_was_written_for() -> None:
    """GreenContext of the installed version offers `split` or `create`, and `Stream`."""
    torch = pytest.importorskip("torch")
    maker = torch.cuda.green_contexts.GreenContext
    assert hasattr(maker, "split") or hasattr(maker, "create")
    assert hasattr(maker, "Stream")


def test_without_lanes_nothing_is_entered() -> None:
    """An empty description makes no stream and asks torch nothing."""
    assert make_lanes(None, "cpu", {}) is NO_LANES
    _enter(NO_LANES)


def test_what_a_policy_asks_for_is_what_lanes_are_made_of() -> None:
    """Policies that act inside one process describe their lanes in words make_lanes takes; the others ask for none."""
    for policy in (cls() for cls in POLICIES.values() if cls.name != "slo"):
        check_lanes(policy.lanes())
        assert bool(policy.lanes()) == policy.one_process


@given(
    st.dictionaries(
        st.sampled_from(["kind", "service_priority", "service_sms", "else"]),
        st.sampled_from(["priority", "green", "", -5, 3, 0.5, True, None]),
        min_size=1,
    )
)
def test_a_description_of_lanes_is_one_of_two_forms(asked: dict[str, Any]) -> None:
    """A kind with its one whole number passes; everything else is refused with both forms."""
    names = {"priority": "service_priority", "green": "service_sms"}
    option = names.get(str(asked.get("kind")))
    good = option is not None and set(asked) == {"kind", option} and type(asked[option]) is int
    if good:
        check_lanes(asked)
    else:
        with pytest.raises(InputError, match=r"service_priority.* or .*service_sms"):
            check_lanes(asked)
