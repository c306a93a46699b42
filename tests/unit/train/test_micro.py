"""Micro-steps: the same update as the whole batch, stops where they should be, and memory that ran out."""

from __future__ import annotations

import socket
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corun import registry
from corun.clock import now_ns
from corun.errors import InputError, RunFault
from corun.process import StopSignal
from corun.train.micro import (
    Fixed,
    OpenGate,
    RunAhead,
    freeze_statistics,
    gate_layers,
    load_gate,
    part_sizes,
    split,
)
from corun.train.options import TrainOptions
from corun.train.session import Session, StepLog
from corun.train.trainer import Trainer
from corun.wire.channel import Channel
from corun.wire.messages import Arm, Clock, Drain, Start, Stats, Stop


class Points(torch.utils.data.Dataset[Any]):
    """Random points with labels; num_classes 3."""

    num_classes = 3

    def __init__(self, count: int = 64) -> None:
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.arange(count) % 3
        self.points = torch.randn(count, 6, generator=generator, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.points[index], int(self.labels[index])


class Network:
    """A small network in double precision, with or without BatchNorm, as a Trainable."""

    min_batch = 2
    batch_norm = False
    losses: Callable[[Any], None] | None = None

    def __init__(self, options: registry.ModelOptions) -> None:
        torch.manual_seed(options.seed)
        norm = [torch.nn.BatchNorm1d(8)] if self.batch_norm else []
        layers = [torch.nn.Linear(6, 8), *norm, torch.nn.ReLU(inplace=True), torch.nn.Linear(8, 3)]
        self.module = torch.nn.Sequential(*layers).double()
        self.info = registry.ServableInfo("net", "classification", 0, 4, "random", "fp32", "cpu")

    def loss(self, batch: Any) -> torch.Tensor:
        points, labels = batch
        if Network.losses:
            Network.losses(batch)
        return torch.nn.functional.cross_entropy(self.module(points), labels)


class RecordingGate(OpenGate):
    """An open gate that writes down where it was asked, and has the knobs it is given."""

    def __init__(self, micro: int = 1, threads: int = 0) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.now = Fixed(micro, threads)

    def wait(self, boundary: str) -> None:
        self.asked.append(boundary)

    def knobs(self) -> Fixed:
        return self.now


OPTIONS = TrainOptions("net", data="points", batch_size=16, lr=0.1)


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    model = registry.Model("net", "test", "classification", 4, lambda o: None, Network, "", "")  # type: ignore[arg-type,return-value]
    data = registry.Dataset("points", frozenset({"classification"}), "", lambda o: [], lambda o: Points())
    monkeypatch.setattr(registry, "model", lambda name: model)
    monkeypatch.setattr(registry, "resolve_data", lambda spec: (data, None))
    monkeypatch.setattr(Network, "losses", None)
    monkeypatch.setattr(Network, "batch_norm", False)
    torch.set_num_threads(1)


def _weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in trainer.trainable.module.state_dict().values()])


def _trained(options: TrainOptions, steps: int = 6, gate: Any = None) -> torch.Tensor:
    trainer = Trainer(options, gate)
    for _ in range(steps):
        trainer.step()
    return _weights(trainer)


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 8))
def test_parts_cover_the_batch_evenly(batch: int, micro: int, least: int) -> None:
    """Parts add up to the batch, differ by one at most, are never too small, and never more than asked for."""
    sizes = part_sizes(batch, micro, least)
    assert sum(sizes) == batch
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) <= micro
    assert len(sizes) == 1 or min(sizes) >= least


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12))
def test_parts_put_together_are_the_batch(count: int, micro: int) -> None:
    """Tensors, per-sample lists and what they are nested in are cut so that nothing is lost or doubled."""
    pair = namedtuple("pair", "left right")
    batch = [
        torch.arange(3 * count).reshape(count, 3),
        {"targets": [{"boxes": torch.full((index, 4), index)} for index in range(count)], "scale": 2.0},
        pair(torch.arange(count), torch.tensor(7)),
    ]
    parts = split(batch, part_sizes(count, micro))
    assert torch.equal(torch.cat([part[0] for part in parts]), batch[0])
    assert [len(target["boxes"]) for part in parts for target in part[1]["targets"]] == list(range(count))
    assert torch.equal(torch.cat([part[2].left for part in parts]), batch[2].left)
    assert all(part[1]["scale"] == 2.0 and part[2].right == 7 and type(part[2]) is pair for part in parts)


def test_a_batch_without_samples_is_refused() -> None:
    """What cannot be cut is bad input that says what to do."""
    with pytest.raises(InputError, match="cannot be cut"):
        split([torch.zeros(3), {"a": 1}], [2, 2])


@pytest.mark.parametrize("micro", [2, 3, 5, 8, 100])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_update_of_parts_is_that_of_the_whole(micro: int, optimizer: str) -> None:
    """Without BatchNorm the weights after several steps agree to rounding, uneven parts included."""
    whole = _trained(replace(OPTIONS, optimizer=optimizer))
    parts = _trained(replace(OPTIONS, optimizer=optimizer, micro=micro))
    assert torch.allclose(whole, parts, rtol=1e-9, atol=1e-11)


def test_the_loss_of_parts_is_that_of_the_whole() -> None:
    """A step reports the mean over its samples however it was cut."""
    whole, parts = Trainer(OPTIONS).step(), Trainer(replace(OPTIONS, micro=3)).step()
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
    assert (whole.micro, parts.micro) == (1, 3)


def test_batch_norm_makes_parts_differ_and_frozen_statistics_make_them_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch statistics are those of a part; with frozen ones the update is that of the whole batch again."""
    monkeypatch.setattr(Network, "batch_norm", True)
    whole, parts = _trained(OPTIONS), _trained(replace(OPTIONS, micro=4))
    assert not torch.allclose(whole, parts, rtol=1e-4)
    frozen = replace(OPTIONS, frozen_statistics=True)
    assert torch.allclose(_trained(frozen), _trained(replace(frozen, micro=4)), rtol=1e-9, atol=1e-11)


def test_frozen_statistics_survive_train() -> None:
    """A frozen layer stays in evaluation mode and keeps its buffers when the module is set to train."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    assert freeze_statistics(module) == 1
    module.train()
    module(torch.randn(8, 4))
    assert torch.equal(module[1].running_mean, torch.zeros(4))
    assert module[0].training


def test_a_step_stops_where_it_should() -> None:
    """The gate is asked once before the step and once before each micro-step."""
    gate = RecordingGate(micro=3)
    step = Trainer(OPTIONS, gate).step()
    assert gate.asked == ["step", "micro", "micro", "micro"]
    assert step.gate_wait_ns >= 0


def test_layer_stops_stand_before_each_forward_and_backward() -> None:
    """A layer gate is asked for every leaf layer on the way there and back, in-place activations included."""
    gate = RecordingGate()
    trainer = Trainer(replace(OPTIONS, layer_gate=True), gate)
    trainer.step()
    layers = 3
    assert gate.asked.count("layer") == 2 * layers


def test_layer_stops_change_nothing() -> None:
    """Weights are bit-identical with and without layer stops."""
    assert torch.equal(_trained(OPTIONS), _trained(replace(OPTIONS, layer_gate=True), gate=RecordingGate()))


def test_layer_stops_count_layers_only() -> None:
    """Containers are no stops of their own."""
    stops: list[int] = []
    module = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))
    assert gate_layers(module, lambda: stops.append(1)) == 2
    module(torch.ones(1, 2)).sum().backward()
    assert len(stops) == 4


def test_the_gates_knobs_are_followed_from_step_to_step() -> None:
    """More micro-steps and another thread count take effect at the next step; 0 threads = as started."""
    gate = RecordingGate()
    trainer = Trainer(OPTIONS, gate)
    assert trainer.step().micro == 1
    gate.now = Fixed(4, 2)
    assert trainer.step().micro == 4
    assert torch.get_num_threads() == 2
    gate.now = Fixed(1, 0)
    assert trainer.step().micro == 1
    assert torch.get_num_threads() == 1


class WaveringGate(RecordingGate):
    """Another number of threads at every stop."""

    def wait(self, boundary: str) -> None:
        super().wait(boundary)
        self.now = Fixed(1, 1 + len(self.asked) % 2)


def test_threads_change_between_layers_and_the_update_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """With layer stops the number of threads is followed inside a step, backward included; weights agree to rounding."""
    seen: list[int] = []
    monkeypatch.setattr(
        torch, "set_num_threads", lambda threads, really=torch.set_num_threads: _note(threads, seen, really)
    )
    gate = WaveringGate()
    weights = _trained(replace(OPTIONS, layer_gate=True), steps=2, gate=gate)
    assert len(seen) >= len(gate.asked) - 1
    assert set(seen) == {1, 2}
    torch.testing.assert_close(weights, _trained(OPTIONS, steps=2))


def _note(threads: int, seen: list[int], really: Callable[[int], None]) -> None:
    seen.append(threads)
    really(threads)


def test_the_options_micro_is_the_least() -> None:
    """A gate can ask for finer steps than the job was started with, never for coarser ones."""
    assert Trainer(replace(OPTIONS, micro=4), RecordingGate(micro=2)).step().micro == 4


def test_warming_up_asks_no_gate() -> None:
    """A trainer that warms up is not held."""
    gate = RecordingGate(micro=2)
    Trainer(OPTIONS, gate).warm_up()
    assert gate.asked == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 4),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), 4),
        (RuntimeError("could not create a primitive"), 4),
        (MemoryError(), 4),
    ],
)
def test_out_of_memory_cuts_the_parts_in_half(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: int
) -> None:
    """The step is made again in twice as many parts until they fit, with the very same update."""

    def refuse_large(batch: Any) -> None:
        if len(batch[0]) > 4:
            raise error if str(error) else MemoryError("no memory")

    plain = _trained(replace(OPTIONS, micro=expected), steps=3)
    monkeypatch.setattr(Network, "losses", staticmethod(refuse_large))
    trainer = Trainer(OPTIONS)
    steps = [trainer.step() for _ in range(3)]
    assert [step.micro for step in steps] == [expected] * 3
    assert torch.equal(_weights(trainer), plain)


def test_memory_that_never_suffices_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the smallest parts do not fit the job ends with a sentence; other errors are not hidden."""

    def refuse(_batch: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Network, "losses", staticmethod(refuse))
    with pytest.raises(RunFault, match="does not fit into memory even in 8 micro-batches"):
        Trainer(OPTIONS).step()

    def other(_batch: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Network, "losses", staticmethod(other))
    with pytest.raises(RuntimeError, match="shapes differ"):
        Trainer(OPTIONS).step()


def test_an_optimiser_that_runs_out_of_memory_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-made update is never made again: the job ends with a sentence."""
    trainer = Trainer(OPTIONS)

    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer._optimizer, "step", refuse)
    with pytest.raises(RunFault, match="the state of sgd for net does not fit"):
        trainer.step()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_run_ahead_is_bounded(depth: int) -> None:
    """Never more than `depth` marked pieces are unsynchronised once `mark` has returned and one more is issued."""
    in_flight: list[int] = []
    log: list[int] = []

    class Event:
        def __init__(self) -> None:
            self.number = len(log)

        def record(self) -> None:
            log.append(self.number)
            in_flight.append(self.number)
            assert len(in_flight) <= depth

        def synchronize(self) -> None:
            assert in_flight.pop(0) == self.number

    ahead = RunAhead(depth, Event)
    for _ in range(10):
        ahead.mark()
    assert len(in_flight) == depth - 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"micro": 0}, "micro is 0"),
        ({"run_ahead": 0}, "run_ahead 0"),
        ({"layer_gate": True, "compile": True}, "exclude each other"),
    ],
)
def test_impossible_options_are_explained(change: dict[str, Any], sentence: str) -> None:
    """A job that cannot be cut or gated as asked says why."""
    with pytest.raises(InputError, match=sentence):
        Trainer(replace(OPTIONS, **change))


@pytest.mark.parametrize("spec", ["nowhere", "no.such.module:f", "corun.train.micro:nothing"])
def test_a_gate_that_cannot_be_loaded_is_bad_input(spec: str) -> None:
    """--gate names the module and function; anything else is explained."""
    with pytest.raises(InputError, match="--gate"):
        load_gate(spec, {})


class HoldingGate(OpenGate):
    """Holds every micro-step until `free` is set or the session says that the step must end."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()
        self.entered = threading.Event()
        self.let_go = 0

    def wait(self, boundary: str) -> None:
        if boundary != "micro":
            return
        self.entered.set()
        while not self.free.wait(0.005):
            if self.attend():
                self.let_go += 1
                return

    def report(self) -> dict[str, Any]:
        return {"let_go": self.let_go}


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Channel, HoldingGate]]:
    """A session whose trainer is held at its gate, and the launcher's end of its channel."""
    ours, theirs = socket.socketpair()
    launcher, gate = Channel(ours), HoldingGate()
    with StopSignal() as stop:
        log = StepLog(tmp_path, "net")
        channel = Channel(theirs)
        session = Session(Trainer(OPTIONS, gate), channel, log, stop)
        thread = threading.Thread(target=session.run)
        thread.start()
        received = launcher.receive(60)
        assert received is not None
        launcher.reply(received[0])
        now = now_ns()
        launcher.request(Arm("corun", 0, 0, now, now + 600_000_000_000), 60)
        launcher.request(Start(0), 60)
        assert gate.entered.wait(60)
        yield launcher, gate
        launcher.close()
        thread.join(60)
        assert not thread.is_alive()
        channel.close()
        log.close()


def test_a_held_trainer_answers_questions_without_going_on(held: tuple[Channel, HoldingGate]) -> None:
    """STATS and CLOCK are answered in the middle of a step, and the gate stays shut."""
    launcher, _ = held
    assert launcher.request(Stats(), 60)["steps"] == 0
    assert "t1_ns" in launcher.request(Clock(), 60)
    assert launcher.request(Stats(), 60) == {**launcher.request(Stats(), 60), "let_go": 0}


def test_draining_a_held_trainer_ends_its_step(held: tuple[Channel, HoldingGate]) -> None:
    """DRAIN opens the gate: the step is finished, counted and answered, and no further step begins."""
    launcher, gate = held
    counts = launcher.request(Drain(), 60)
    assert counts["steps"] == 1
    assert gate.let_go == 1
    assert launcher.request(Stats(), 60)["steps"] == 1


def test_stopping_a_held_trainer_ends_the_session(held: tuple[Channel, HoldingGate]) -> None:
    """STOP reaches a trainer that is held."""
    launcher, _ = held
    assert launcher.request(Stop(), 60)["steps"] == 1


def test_a_launcher_that_goes_away_frees_a_held_trainer(held: tuple[Channel, HoldingGate]) -> None:
    """The session of a held trainer ends when its launcher is gone."""
    held[0].close()
