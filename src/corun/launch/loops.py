"""N inference loops in processes, without sockets, beside a training job or alone: one window, one run directory.

    start    loops, trainer, profiler ─ HELLO when the model is loaded and warm
    window   one instant for everybody; nothing between the loops but the hardware
    end      DRAIN ─ counts ─ STOP, manifest

A process that dies is a fault with its name; the others go on to the end of the window.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from corun.clock import NS_PER_S, now_ns
from corun.errors import CorunError
from corun.launch import commands, window
from corun.launch.children import PYTHON, Child, Family
from corun.launch.control import ControlSocket
from corun.launch.experiment import Outcome
from corun.launch.segments import Segment
from corun.process import StopSignal, available_cores, thread_environment
from corun.run.config import NONE, Arm, Train, digest
from corun.run.directory import RunDirectory
from corun.run.table import EventLog
from corun.wire.messages import Drain, Stop
from corun.wire.sockets import Address

START_S = 180.0
DRAIN_S = 60.0
PERIOD_S = 1.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Loop:
    """One loop: a model and how it runs (the options of `python -m corun.serve.loop`)."""

    arch: str
    name: str
    batch_size: int = 1
    image_size: int | None = None
    data: str = "sample"
    count: int = 64
    device: str = "auto"
    precision: str = "fp32"
    weights: str | None = None
    threads: int = 1

    @property
    def label(self) -> str:
        return self.name


@dataclass(frozen=True)
class LoopPlan:
    """Loops that run together for `seconds`, beside `train` when it is given."""

    loops: tuple[Loop, ...]
    seconds: float
    train: Train | None = None
    seed: int = 0

    @property
    def arm(self) -> Arm:
        if not self.loops:
            return "train"
        return "corun" if self.train else "alone"

    @property
    def train_label(self) -> str:
        """As in tables: resnet18_16, or none."""
        return f"{self.train.arch}_{self.train.batch_size}" if self.train else NONE

    @property
    def train_threads(self) -> int:
        """As configured, else the cores the loops leave, at least one."""
        given = self.train.threads if self.train else None
        return given or max(1, available_cores() - sum(loop.threads for loop in self.loops))

    def resolved(self) -> dict[str, Any]:
        """Everything that determines the measurement, as JSON values."""
        return {
            "loops": [asdict(loop) for loop in self.loops],
            "services": [],
            "train": self.train.model_dump(mode="json") if self.train else None,
            "arms": [self.arm],
            "duration_s": self.seconds,
            "seed": self.seed,
        }

    def digest(self) -> str:
        """sha256 of it: the end of the run's name."""
        return digest(self.resolved())


def named(models: Sequence[str]) -> list[tuple[str, str]]:
    """(model, name of its loop): a second resnet18 is resnet18-2."""
    return [
        (model, model if not (before := list(models[:place]).count(model)) else f"{model}-{before + 1}")
        for place, model in enumerate(models)
    ]


def loop_command(loop: Loop, plan: LoopPlan, out: Path, control: Address) -> commands.Command:
    """`python -m corun.serve.loop` for one loop."""
    given = {
        "--model": loop.arch,
        "--name": loop.name,
        "--batch-size": loop.batch_size,
        "--image-size": loop.image_size,
        "--data": loop.data,
        "--count": loop.count,
        "--seed": plan.seed,
        "--device": loop.device,
        "--precision": loop.precision,
        "--weights": loop.weights,
        "--threads": loop.threads,
        "--train-model": plan.train_label,
        "--out": out,
        "--control": control,
    }
    flags = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    return [PYTHON, "-m", "corun.serve.loop", *flags], thread_environment(loop.threads)


def run_loops(plan: LoopPlan, run: RunDirectory, stop: StopSignal, say: Say) -> Outcome:
    """Measure one window in `run`; faults are recorded and returned, never raised."""
    running = _Run(plan, run, stop, say)
    try:
        running.run()
    except (CorunError, OSError) as error:
        running.fault(str(error))
    faults = tuple(running.faults)
    if stop.requested:
        outcome = Outcome("interrupted", ("interrupted by the user", *faults))
    else:
        outcome = Outcome("failed" if faults else "complete", faults)
    run.finish(outcome.status, segments=running.segments, counts=running.counts, faults=list(faults))
    return outcome


@dataclass
class _Run:
    plan: LoopPlan
    directory: RunDirectory
    stop: StopSignal
    say: Say
    faults: list[str] = field(default_factory=list)
    segments: list[dict[str, Any]] = field(default_factory=list)
    counts: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._events = EventLog(self.directory.file("events.csv"))

    def fault(self, reason: str) -> None:
        """Record a fault once."""
        if reason not in self.faults:
            self.faults.append(reason)
            self._events.write("fault", "launcher", "", reason)

    def run(self) -> None:
        with ControlSocket() as control, Family(self.directory.path) as family:
            children = self._start(family, control.address)
            control.wait_for(children, family, START_S)
            self.directory.update(
                processes=[
                    {"role": child.role, "name": child.name, "pid": child.popen.pid, "hello": child.hello}
                    for child in children
                ],
                threads={child.label: self._threads(child) for child in children},
                sharing={"policy": "none"},
            )
            if not self.stop.requested:
                self._measure(children)
            self._finish(children)

    def _start(self, family: Family, control: Address) -> list[Child]:
        """Everything side by side; loops first, so that they are drained before the trainer is."""
        plan, out = self.plan, self.directory.path
        self.say(f"starting {len(plan.loops)} loops, training {plan.train_label}")
        children = [family.start("loop", loop.name, *loop_command(loop, plan, out, control)) for loop in plan.loops]
        if plan.train:
            command = commands.trainer(plan.train, plan.train_threads, plan.seed, out, control)
            children.append(family.start("trainer", plan.train_label, *command))
        command = commands.profiler(out, family.watch_file, PERIOD_S, control)
        return [*children, family.start("profiler", "profiler", *command)]

    def _threads(self, child: Child) -> int:
        if child.role == "trainer":
            return self.plan.train_threads
        return next((loop.threads for loop in self.plan.loops if child.role == "loop" and loop.name == child.name), 1)

    def _measure(self, children: Sequence[Child]) -> None:
        segment = Segment(0, self.plan.arm, 0, self.plan.seconds)
        start_ns = window.arm(children, segment)
        stop_ns = start_ns + round(segment.duration_s * NS_PER_S)
        self.say(f"{segment.arm}: {segment.duration_s:g} s")
        self._events.write("window_start", "launcher", segment.arm, "segment 0", start_ns)
        window.sleep_until(stop_ns, children, self.stop, self.fault)
        ended_ns = min(now_ns(), stop_ns)
        self._events.write("window_end", "launcher", segment.arm, "segment 0", ended_ns)
        self.segments.append({**asdict(segment), "start_ns": start_ns, "stop_ns": ended_ns})
        for child in children:
            body = window.ask(child, Drain(round(DRAIN_S * 1000)), DRAIN_S, self.fault)
            if body is not None:
                self.counts.append({"segment": segment.index, "role": child.role, "name": child.name, **body})

    def _finish(self, children: Sequence[Child]) -> None:
        for child in children:
            if child.alive:
                window.ask(child, Stop("the run is over"), window.ANSWER_S, self.fault)
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.popen.wait(window.ANSWER_S)
        self._events.write("stop", "launcher", "", "the run is over")
