"""The trainer: repeatable, resumable, and honest about what it cannot do."""

from __future__ import annotations

import multiprocessing
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from corun import registry
from corun.clock import NS_PER_MS
from corun.errors import InputError
from corun.process import StopSignal
from corun.run.read import read_table
from corun.run.records import TRAIN
from corun.train.loader import Batches
from corun.train.options import TrainOptions
from corun.train.session import Session, StepLog
from corun.train.trainer import Trainer
from corun.wire.channel import Channel
from corun.wire.messages import Arm, Drain, Hello, Start, Stats, Stop


class Points(torch.utils.data.Dataset[Any]):
    """Two clouds of points; num_classes 2."""

    num_classes = 2

    def __init__(self, count: int = 40) -> None:
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.arange(count) % 2
        self.points = torch.randn(count, 4, generator=generator) + 4 * self.labels[:, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.points[index], int(self.labels[index])


class Time:
    """A clock that moves only when it is told to, and by STEP_NS with every loss."""

    now_ns = 10**15

    def __call__(self) -> int:
        return Time.now_ns


STEP_NS = 10 * NS_PER_MS


class Linear:
    """A linear classifier with BatchNorm, as a Trainable."""

    min_batch = 2

    def __init__(self, options: registry.ModelOptions) -> None:
        torch.manual_seed(options.seed)
        self.module = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, options.num_classes or 2))
        self.info = registry.ServableInfo("linear", "classification", 18, 4, "random", "fp32", "cpu")

    def loss(self, batch: Any) -> torch.Tensor:
        points, labels = batch
        Time.now_ns += STEP_NS
        return torch.nn.functional.cross_entropy(self.module(points), labels)


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    model = registry.Model("linear", "test", "classification", 4, lambda o: None, Linear, "", "")  # type: ignore[arg-type,return-value]
    data = registry.Dataset("points", frozenset({"classification"}), "", lambda o: [], lambda o: Points())
    monkeypatch.setattr(registry, "model", lambda name: model)
    monkeypatch.setattr(registry, "resolve_data", lambda spec: (data, None))
    monkeypatch.setattr(registry, "datasets", lambda: {"points": data})
    torch.set_num_threads(1)


OPTIONS = TrainOptions("linear", data="points", batch_size=8, lr=0.1)


def _losses(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.step().loss for _ in range(steps)]


def test_the_loss_falls() -> None:
    """Training on separable data learns it."""
    losses = _losses(Trainer(OPTIONS), 40)
    assert sorted(losses[-5:])[2] < 0.5 * losses[0]


def test_the_same_seed_gives_the_same_losses() -> None:
    """Two jobs with one seed are bit-identical; another seed differs."""
    assert _losses(Trainer(OPTIONS), 12) == _losses(Trainer(OPTIONS), 12)
    assert _losses(Trainer(OPTIONS), 12) != _losses(Trainer(replace(OPTIONS, seed=1)), 12)


def test_warm_up_changes_nothing() -> None:
    """A warmed-up job makes the very steps of one that was not."""
    warmed = Trainer(OPTIONS)
    warmed.warm_up(3)
    assert _losses(warmed, 12) == _losses(Trainer(OPTIONS), 12)


@pytest.mark.parametrize("stop_at", [3, 5, 7])
def test_a_resumed_job_goes_on_exactly(tmp_path: Path, stop_at: int) -> None:
    """Stopped inside, at the end of and just after an epoch (5 batches), then resumed: the same losses."""
    options = replace(OPTIONS, checkpoint=tmp_path / "checkpoint.pt")
    first = Trainer(options)
    losses = _losses(first, stop_at)
    first.save(tmp_path / "checkpoint.pt")
    resumed = Trainer(replace(options, resume=True))
    assert resumed.steps_done == stop_at
    assert losses + _losses(resumed, 12 - stop_at) == _losses(Trainer(OPTIONS), 12)


def test_every_epoch_sees_every_sample_once() -> None:
    """The batches of an epoch are a permutation of the data; the next epoch's order differs."""
    batches = Batches(Points(40), 8, seed=3)
    epochs = [torch.cat([batches.next()[0][0] for _ in range(5)]) for _ in range(2)]
    everything = Points(40).points
    for epoch in epochs:
        assert torch.equal(epoch[:, 0].sort().values, everything[:, 0].sort().values)
    assert not torch.equal(epochs[0], epochs[1])


def test_decode_time_travels_with_the_batch() -> None:
    """The time the data set took for the batch is measured apart from waiting for it."""
    step = Trainer(OPTIONS).step()
    assert step.decode_ns > 0
    assert step.t_start_ns < step.t_end_ns
    assert step.data_wait_ns <= step.t_end_ns - step.t_start_ns


def test_a_job_of_n_epochs_finishes() -> None:
    """`finished` is true exactly after epochs x batches steps."""
    trainer = Trainer(replace(OPTIONS, epochs=2))
    for _ in range(10):
        assert not trainer.finished
        trainer.step()
    assert trainer.finished


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_size": 1}, "BatchNorm needs at least 2"),
        ({"batch_size": 41}, "fewer than one batch"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"optimizer": "sgdd"}, 'optimizer is "sgdd"'),
        ({"resume": True}, "there is no checkpoint"),
    ],
)
def test_what_cannot_be_trained_is_explained(change: dict[str, Any], sentence: str) -> None:
    """A job that cannot start says why and what to do."""
    with pytest.raises(InputError, match=sentence):
        Trainer(replace(OPTIONS, **change))


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    """Garbage in place of a checkpoint is bad input with the file's name."""
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"garbage" * 100)
    with pytest.raises(InputError, match="cannot resume from"):
        Trainer(replace(OPTIONS, checkpoint=path, resume=True))


@pytest.fixture
def virtual_time(monkeypatch: pytest.MonkeyPatch) -> Time:
    """The clock of session and trainer."""
    time = Time()
    monkeypatch.setattr("corun.train.session.now_ns", time)
    monkeypatch.setattr("corun.train.trainer.now_ns", time)
    return time


@pytest.fixture
def session(tmp_path: Path) -> Iterator[tuple[Channel, Path]]:
    """A trainer's session in a thread, and the launcher's end of its channel."""
    ours, theirs = socket.socketpair()
    launcher = Channel(ours)
    with StopSignal() as stop:
        log = StepLog(tmp_path, "linear")
        channel = Channel(theirs)
        runner = Session(Trainer(OPTIONS), channel, log, stop)
        thread = threading.Thread(target=runner.run)
        thread.start()
        received = launcher.receive(60)
        assert received is not None
        header, hello = received
        assert isinstance(hello, Hello)
        assert hello.role == "trainer"
        launcher.reply(header)
        yield launcher, tmp_path
        launcher.close()
        thread.join(60)
        assert not thread.is_alive()
        channel.close()
        log.close()


def test_a_session_trains_only_inside_its_windows(virtual_time: Time, session: tuple[Channel, Path]) -> None:
    """No step starts before start_at or after stop_at, and none is left out; rows carry the window's arm and repeat.

    In virtual time, in which nothing but a step takes any.
    """
    channel, out = session
    windows = []
    for segment, arm in enumerate(("train", "corun")):
        start = virtual_time() + 10 * STEP_NS
        stop = start + 20 * STEP_NS
        windows.append((start, stop))
        assert channel.request(Arm(arm, segment, segment, start, stop), 60) == {"ready": True}
        channel.request(Start(segment), 60)
        assert channel.request(Stats(), 60)["steps"] == 0
        Time.now_ns = start
        while virtual_time() < stop:
            channel.request(Stats(), 60)
        assert channel.request(Drain(), 60)["steps"] == 20
    channel.request(Stop(), 60)
    steps = read_table(out / "train.csv", TRAIN)
    for segment, (start, stop) in enumerate(windows):
        mine = steps["segment"] == segment
        assert steps["t_start_ns"][mine].tolist() == list(range(start, stop, STEP_NS))
    assert list(dict.fromkeys(steps["arm"])) == ["train", "corun"]
    assert list(dict.fromkeys(steps["repeat"])) == [0, 1]
    assert "epoch" in (out / "events.csv").read_text()


def test_a_session_ends_when_the_launcher_goes_away(session: tuple[Channel, Path]) -> None:
    """A trainer whose launcher vanished saves and returns instead of waiting for ever."""
    channel, _ = session
    channel.close()


def test_workers_give_the_same_batches() -> None:
    """Loader processes change who decodes, not what is trained."""
    if "spawn" not in multiprocessing.get_all_start_methods():
        pytest.skip("no spawn start method")
    alone, helped = Batches(Points(16), 8, seed=3), Batches(Points(16), 8, seed=3, workers=1)
    assert torch.equal(alone.next()[0][0], helped.next()[0][0])
