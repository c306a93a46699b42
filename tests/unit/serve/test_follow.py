"""Published weights taken up while serving: only whole and fitting ones, only between batches, each refusal with its reason."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from corun import registry
from corun.errors import InputError
from corun.registry import ModelOptions, ServableInfo
from corun.serve.engine import ServableEngine
from corun.serve.follow import Follower, followed
from corun.weights import Versions

WAIT_S = 60.0


class Network:
    """A servable around a small module; `unserved` is what a training side has more."""

    unserved = ("aux.",)

    def __init__(self, **placement: Any) -> None:
        self.module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        self.module.to(**placement)
        self.info = ServableInfo("small", "classification", 1, 8, "random", "fp32", "cpu")


class FakeServer:
    """Runs posted tasks when `release` is called, as a model thread does between two batches."""

    def __init__(self, engine: Any) -> None:
        self.worker: Any = SimpleNamespace(engine=engine)
        self.queue = self
        self.tasks: list[Callable[[], None]] = []
        self.events: list[tuple[str, str]] = []
        self.said: list[str] = []
        self.changed = threading.Condition()

    def post(self, task: Callable[[], None]) -> None:
        with self.changed:
            self.tasks.append(task)
            self.changed.notify_all()

    def event(self, kind: str, detail: str) -> None:
        with self.changed:
            self.events.append((kind, detail))
            self.changed.notify_all()

    def say(self, line: str) -> None:
        self.said.append(line)

    def release(self, count: int = 1) -> None:
        """Wait for the count-th task and run it."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.tasks) >= count, WAIT_S)
        self.tasks[count - 1]()

    def told(self, count: int = 1) -> tuple[str, str]:
        """Wait for the count-th event."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.events) >= count, WAIT_S)
        return self.events[count - 1]


def state(value: float, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """A state of Network with every floating tensor at `value`."""
    own = Network().module.state_dict()
    filled = {
        name: torch.full_like(tensor, value) if tensor.is_floating_point() else tensor for name, tensor in own.items()
    }
    return {**filled, **more}


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def server(network: Network, tmp_path: Path) -> Iterator[FakeServer]:
    """A server whose follower runs."""
    fake = FakeServer(ServableEngine(network))  # type: ignore[arg-type]
    with Follower(fake, tmp_path, period_s=0.005):
        yield fake


def first(network: Network) -> float:
    return float(network.module.state_dict()["0.weight"].flatten()[0])


def test_weights_change_in_a_task_of_the_model_thread(server: FakeServer, network: Network, tmp_path: Path) -> None:
    """Nothing changes before the model thread comes to it; then all tensors and the version do, and it is an event."""
    before = first(network)
    Versions(tmp_path).publish(state(3.0), "small", 10, 0.5, 64)
    with server.changed:
        assert server.changed.wait_for(lambda: server.tasks, WAIT_S)
    assert first(network) == before
    assert network.info.version is None
    server.release()
    assert first(network) == 3.0
    assert float(network.module[1].running_mean[0]) == 3.0
    assert network.info.version == 1
    assert network.info.weights.startswith("sha256:")
    kind, detail = server.told()
    assert kind == "swap"
    assert "version 1 after the loaded weights, accuracy 0.500 on 64" in detail


def test_a_rollback_is_followed_and_told_as_one(server: FakeServer, network: Network, tmp_path: Path) -> None:
    """The pointer going back puts the earlier tensors in place again."""
    versions = Versions(tmp_path)
    for value in (1.0, 2.0):
        number = int(value)
        versions.publish(state(value), "small", 0)
        server.release(number)
        server.told(number)
    versions.roll_back(1)
    server.release(3)
    assert server.told(3)[0] == "rollback"
    assert (first(network), network.info.version) == (1.0, 1)


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda v: v.tensors_path(1).write_bytes(v.tensors_path(1).read_bytes()[:-9]), "cut short"),
        (lambda v: v.tensors_path(1).write_bytes(bytes(v.card(1).size)), "damaged"),
        (lambda v: v.card_path(1).unlink(), "v0001.json"),
        (lambda v: v.pointer_path.write_text("{"), "current.json"),
        (lambda v: v.publish(state(1.0), "vgg16", 0), "it is of vgg16, this service has small"),
        (lambda v: v.publish({**state(1.0), "0.bias": torch.zeros(7)}, "small", 0), "shape of 0.bias"),
        (lambda v: v.publish(state(1.0, extra=torch.zeros(1)), "small", 0), "unknown: extra"),
        (lambda v: v.publish({"0.bias": torch.zeros(4)}, "small", 0), "missing: 0.weight"),
    ],
)
def test_what_is_wrong_is_refused_once_with_its_reason(
    network: Network, tmp_path: Path, break_it: Callable[[Versions], object], reason: str
) -> None:
    """Cut, damaged, incomplete, of another model or other shapes: the weights in service stay, and one event says why."""
    before, versions = first(network), Versions(tmp_path)
    versions.publish(state(1.0), "small", 0)
    break_it(versions)
    fake = FakeServer(ServableEngine(network))  # type: ignore[arg-type]
    with Follower(fake, tmp_path, period_s=0.005):
        kind, detail = fake.told()
        assert kind == "refused"
        assert reason in detail
        versions.publish(state(4.0), "small", 0)
        fake.release()
        assert fake.told(2)[0] == "swap", "a refused pointer is not tried again, the next one is"
    assert len(fake.events) == 2
    assert before != first(network) == 4.0


def test_what_a_service_does_not_need_is_left_out(network: Network) -> None:
    """Auxiliary heads of the training side are named by the servable and ignored."""
    ServableEngine(network).successor(state(5.0, **{"aux.weight": torch.zeros(3)}), "w", 1)()  # type: ignore[arg-type]
    assert first(network) == 5.0


def test_precision_and_layout_in_use_are_kept() -> None:
    """float32 weights become what the service runs in; the swap replaces data, not parameters."""
    network = Network(dtype=torch.bfloat16, memory_format=torch.channels_last)
    weight = network.module[0].weight
    ServableEngine(network).successor(state(0.1), "w", 1)()  # type: ignore[arg-type]
    assert network.module[0].weight is weight
    assert weight.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert float(weight.detach().flatten()[0]) == float(torch.tensor(0.1, dtype=torch.bfloat16))


def test_a_model_without_a_module_cannot_follow() -> None:
    """It is said when the service starts, with the model's name."""
    engine = ServableEngine(registry.model("null").serve(ModelOptions()))
    load = followed(lambda message, placement, threads: engine)
    with pytest.raises(InputError, match="null cannot follow"):
        load(SimpleNamespace(), ModelOptions(), 1)  # type: ignore[arg-type]
