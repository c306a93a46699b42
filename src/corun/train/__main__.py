"""`python -m corun.train`: one training job, by hand or under a launcher."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from corun.clock import now_ns
from corun.errors import InputError, RunFault, guard, suggest
from corun.process import StopSignal, available_cores, die_with_parent, set_threads
from corun.registry import PRECISIONS
from corun.train.options import OPTIMIZERS, PublishOptions, TrainOptions

if TYPE_CHECKING:
    from corun.train.micro import Gate
    from corun.train.session import StepLog
    from corun.train.trainer import Trainer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
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
) -> None:
    """Train one model, one CSV row per step."""
    with guard():
        threads = threads or available_cores()
        set_threads(threads)
        if control:
            die_with_parent()
        import torch

        from corun.torch_tools import resolve_device

        torch.set_num_threads(threads)
        options = TrainOptions(
            model=model,
            data=data,
            batch_size=batch_size,
            image_size=image_size,
            num_classes=num_classes,
            epochs=epochs,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            optimizer=optimizer,
            workers=workers,
            seed=seed,
            count=count,
            device=resolve_device(device),
            precision=precision,
            channels_last=channels_last,
            compile=compile,
            weights=weights,
            checkpoint=checkpoint,
            resume=resume,
            extra=_json_object("--extra", extra),
            micro=micro,
            frozen_statistics=freeze_statistics,
            layer_gate=layer_gate,
            run_ahead=run_ahead,
            publish=_publish_options(_json_object("--publish", publish)),
        )
        _limit_memory(options.device, memory_fraction)
        run(options, steps, out, control, gate, _json_object("--gate-options", gate_options))


def _json_object(flag: str, text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{flag} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{flag} must be a JSON object")
    return value


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
    options: TrainOptions,
    steps: int,
    out: Path | None,
    control: str | None,
    gate_spec: str = "",
    gate_options: dict[str, object] | None = None,
) -> None:
    """Build the job, then train under the launcher at `control` or alone."""
    from corun.train.micro import OpenGate, load_gate
    from corun.train.session import Session, StepLog
    from corun.wire.channel import Channel
    from corun.wire.sockets import Address, connect

    log = StepLog(out, options.model)
    with StopSignal() as stop:
        gate = load_gate(gate_spec, gate_options or {}) if gate_spec else OpenGate()
        gate.attend = lambda: stop.requested
        trainer = _build(options, gate)
        _publish(trainer, log)
        log.event("ready", f"pid {os.getpid()}, {options.model} on {options.device}")
        if control:
            Session(trainer, Channel(connect(Address.parse(control))), log, stop).run()
        else:
            _alone(trainer, log, stop, steps)
        gate.close()
    log.close()


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


def _alone(trainer: object, log: object, stop: StopSignal, steps: int) -> None:
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


if __name__ == "__main__":
    app()
