"""What `python -m corun.train` does: its flags as a value, and the job they ask for, in any thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corun.clock import now_ns
from corun.errors import InputError, RunFault, suggest
from corun.process import StopFlag, StopSignal, available_cores, die_with_parent, set_threads
from corun.registry import PRECISIONS
from corun.run.commandline import json_object, program
from corun.train.options import OPTIMIZERS, PublishOptions, TrainOptions

if TYPE_CHECKING:
    from corun.train.micro import Gate
    from corun.train.session import StepLog
    from corun.train.trainer import Trainer


@dataclass(frozen=True)
class Training:
    """One job and how it is run. options.device may be "auto" still. threads: 0 = all cores. memory_fraction: 0 = all.

    steps: stop after so many, by hand only. control: the launcher's address. gate: MODULE:FUNCTION.
    """

    options: TrainOptions
    threads: int = 0
    steps: int = 0
    out: Path | None = None
    control: str | None = None
    gate: str = ""
    gate_options: Mapping[str, Any] = field(default_factory=dict)
    memory_fraction: float = 0.0

    @property
    def label(self) -> str:
        """Name of the job in messages."""
        return self.options.model


def flags(
    model: Annotated[str, typer.Option(help="model to train")],
    data: Annotated[str, typer.Option(help="data set, name:/root or folder")] = "digits",
    batch_size: Annotated[int, typer.Option(help="samples per step")] = 16,
    image_size: Annotated[int | None, typer.Option(help="side of the input; default: the model's")] = None,
    num_classes: Annotated[int | None, typer.Option(help="default: the data set's")] = None,
    epochs: Annotated[int, typer.Option(help="0 = until stopped")] = 1,
    steps: Annotated[int, typer.Option(help="stop after so many steps; 0 = no limit (by hand only)")] = 0,
    lr: Annotated[float, typer.Option(help="learning rate")] = 0.01,
    momentum: Annotated[float, typer.Option(help="of SGD")] = 0.9,
    weight_decay: Annotated[float, typer.Option()] = 0.0,
    optimizer: Annotated[str, typer.Option(help=", ".join(OPTIMIZERS))] = "sgd",
    workers: Annotated[int, typer.Option(help="loader processes; 0 = in the trainer")] = 0,
    count: Annotated[int, typer.Option(help="samples of a made data set")] = 1024,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    precision: Annotated[str, typer.Option(help=", ".join(PRECISIONS))] = "fp32",
    channels_last: Annotated[bool, typer.Option()] = False,
    compile: Annotated[bool, typer.Option(help="torch.compile")] = False,
    weights: Annotated[str | None, typer.Option(help="default or a state dict file; none = random")] = None,
    threads: Annotated[int, typer.Option(help="intra-op threads; 0 = all cores")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="written at every epoch's end and at the stop")] = None,
    resume: Annotated[bool, typer.Option(help="go on from --checkpoint")] = False,
    micro: Annotated[int, typer.Option(min=1, help="micro-batches a step is cut into, at least")] = 1,
    freeze_statistics: Annotated[
        bool, typer.Option("--freeze-statistics", help="BatchNorm keeps its running statistics")
    ] = False,
    gate: Annotated[str, typer.Option(help="MODULE:FUNCTION that makes the gate before each micro-step")] = "",
    gate_options: Annotated[str, typer.Option(help="JSON object for that function")] = "{}",
    layer_gate: Annotated[bool, typer.Option("--layer-gate", help="the gate also stands between layers")] = False,
    run_ahead: Annotated[int, typer.Option(min=1, help="micro-steps in flight on a GPU")] = 1,
    memory_fraction: Annotated[float, typer.Option(min=0, max=1, help="of the GPU's memory; 0 = no limit")] = 0.0,
    extra: Annotated[str, typer.Option(help="model options as JSON")] = "{}",
    publish: Annotated[str, typer.Option(help="JSON: directory, arrivals, ...: see docs/drift.md")] = "{}",
    out: Annotated[Path | None, typer.Option(help="directory for train.csv and events.csv")] = None,
    control: Annotated[str | None, typer.Option(help="launcher's address")] = None,
) -> Training:
    """Train one model, one CSV row per step."""
    known = {item.name for item in fields(TrainOptions)}
    job: dict[str, Any] = {name: value for name, value in locals().items() if name in known}
    job |= {
        "extra": json_object("--extra", extra),
        "frozen_statistics": freeze_statistics,
        "publish": _publish_options(json_object("--publish", publish)),
    }
    gating = json_object("--gate-options", gate_options)
    return Training(TrainOptions(**job), threads, steps, out, control, gate, gating, memory_fraction)


def main(training: Training) -> None:
    """Train in this process."""
    set_threads(training.threads or available_cores())
    if training.control:
        die_with_parent()
    with StopSignal() as stop:
        run(training, stop)


def _publish_options(given: dict[str, object]) -> PublishOptions | None:
    if not given:
        return None
    import msgspec

    known = [item.name for item in fields(PublishOptions)]
    problems = [f'"{name}" is unknown{suggest(name, known)}' for name in given if name not in known]
    try:
        options = msgspec.convert(given, PublishOptions)
    except msgspec.ValidationError as error:
        problems.append(str(error))
    if problems:
        raise InputError("--publish is wrong", problems)
    return options


def _limit_memory(device: str, fraction: float) -> None:
    """Bound torch's caching allocator on a GPU."""
    if fraction and device != "cpu":
        import torch

        torch.cuda.set_per_process_memory_fraction(fraction, torch.device(device))


def run(
    training: Training,
    stop: StopFlag,
    ready: Callable[[], object] = lambda: None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Build the job, then train under its launcher or alone, in the caller's thread.

    ready: called once the job is built and warmed up. facts: what HELLO says besides.
    """
    from corun.torch_tools import compute_with, resolve_device
    from corun.train.micro import OpenGate, load_gate
    from corun.train.session import Session, StepLog
    from corun.wire.channel import Channel
    from corun.wire.sockets import Address, connect

    compute_with(training.threads or available_cores())
    options = replace(training.options, device=resolve_device(training.options.device))
    _limit_memory(options.device, training.memory_fraction)
    with closing(StepLog(training.out, options.model)) as log:
        gate = load_gate(training.gate, training.gate_options) if training.gate else OpenGate()
        gate.attend = lambda: stop.requested
        trainer = _build(options, gate)
        _publish(trainer, log)
        log.event("ready", f"pid {os.getpid()}, {options.model} on {options.device}")
        ready()
        if training.control:
            with closing(Channel(connect(Address.parse(training.control)))) as channel:
                Session(trainer, channel, log, stop, facts).run()
        else:
            _alone(trainer, log, stop, training.steps)
        gate.close()


def _publish(trainer: Trainer, log: StepLog) -> None:
    """Have the trainer publish after its steps, if it was asked to."""
    if trainer.options.publish:
        from corun.train.publish import Publisher

        trainer.after_step = Publisher(trainer, trainer.options.publish, log.event).after_step


def _build(options: TrainOptions, gate: Gate) -> Trainer:
    """The job, warmed up; RunFault when it does not even fit into memory."""
    from corun.train.micro import out_of_memory
    from corun.train.trainer import Trainer

    try:
        trainer = Trainer(options, gate)
        trainer.warm_up()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        raise RunFault(f"{options.model} does not fit into the memory of this process: {reason}") from error
    return trainer


def _alone(trainer: object, log: object, stop: StopFlag, steps: int) -> None:
    from corun.train.session import StepLog, one_step, save
    from corun.train.trainer import Trainer

    assert isinstance(trainer, Trainer)
    assert isinstance(log, StepLog)
    trainer.begin(now_ns())
    while not stop.requested and not trainer.finished and not (steps and trainer.steps_done >= steps):
        step = one_step(trainer, log)
        if step.step % 10 == 0 or trainer.at_epoch_end:
            print(
                f"epoch {step.epoch} step {step.step}: loss {step.loss:.4f}, {step.samples_per_s:.1f} samples/s",
                flush=True,
            )
    save(trainer, log)
    print(f"{trainer.steps_done} steps done")


app = program(flags, main)
