"""`python -m corun.serve.loop`: one model run back to back on its payloads, without a socket, a queue or a client.

    decode ── preprocess ── to device ── forward ── to host ── postprocess ── row ── decode ...

The stages are a service's own (`corun.serve.engine`), so the difference between a loop and a service under the same
model is what sockets and queueing cost. The next inference begins when the last one's row is written: a closed loop,
whose latency says how long an inference takes and nothing about how long a request would have waited.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, cast

import typer

from corun import __version__, registry
from corun.clock import NS_PER_MS, NS_PER_S, anchor, now_ns
from corun.errors import InputError, guard
from corun.process import StopSignal, die_with_parent, set_threads
from corun.registry import DataOptions, ModelOptions, Payload
from corun.run.commandline import json_object
from corun.run.records import INFER_SERVER, Column, Table
from corun.run.table import EventLog, TableWriter
from corun.serve.connection import Connection
from corun.serve.engine import Engine, load_engine
from corun.serve.queue import Request
from corun.serve.statistics import Segment
from corun.serve.worker import settle_memory
from corun.wire import STAMPS, Address, Kind, RequestHeader, Status, connect
from corun.wire.channel import Channel
from corun.wire.messages import Arm, Hello, Load
from corun.wire.session import Session, run_alone

ROLE = "loop"
WARM_UP = 3
STAGES = ("decoded", "preprocessed", "h2d", "device", "d2h")

_SERVER = {column.name: column for column in INFER_SERVER}

INFER_LOOP: Table = (
    Column("work_start", "s", "float", "wall clock at the start of the inference (seconds since the epoch)"),
    Column("infer_model_name", "", "str", "model of the loop"),
    Column("train_model_name", "", "str", "model that was being trained, or none"),
    Column("image_size", "px", "int", "side of the network's input"),
    Column("device", "", "str", "device of the loop"),
    Column("file_name", "", "str", "name of the first payload of the batch"),
    Column("latency", "ms", "float", "t_end - t_start: one inference, decoding and postprocessing included"),
    Column("loop", "", "str", "name of the loop"),
    *(_SERVER[name] for name in ("arm", "repeat", "segment")),
    Column("id", "", "int", "inference of the loop, from 0, unique within the run"),
    Column("status", "", "str", "OK, BAD_REQUEST (a payload could not be decoded) or FAILED"),
    Column("batch", "", "int", "pictures in the inference"),
    Column("reply_bytes", "B", "int", "size of all replies of the inference"),
    Column("t_start_ns", "ns", "int", "the inference began"),
    *(_SERVER[f"s_{stage}_ns"] for stage in STAGES),
    Column("t_end_ns", "ns", "int", "its replies are ready"),
    Column("detail", "", "str", "why it was not OK"),
)


class Rows(Protocol):
    """Where rows go: a TableWriter."""

    def row(self, values: Sequence[Any]) -> None: ...


@dataclass(frozen=True)
class LoopOptions:
    """One loop. batch_size: pictures per inference; beside: what is being trained meanwhile, for the table."""

    name: str
    batch_size: int = 1
    beside: str = "none"


@dataclass
class _Counters:
    """What one window has seen so far."""

    inferences: int = 0
    failed: int = 0
    last_ms: float | None = None
    detail: str = ""

    def body(self) -> dict[str, Any]:
        return {
            "inferences": self.inferences,
            "failed": self.failed,
            "last_ms": self.last_ms,
            **({"detail": self.detail} if self.detail else {}),
        }


class InferenceLoop:
    """The work of a loop (`corun.wire.session.Work`): a step is one inference of batch_size payloads, in turn."""

    def __init__(
        self, engine: Engine, payloads: Sequence[Payload], options: LoopOptions, rows: Rows | None = None
    ) -> None:
        if not payloads:
            raise InputError(f"loop {options.name} has no payloads: its data set is empty")
        self.engine = engine
        self.options = options
        self._payloads = payloads
        self._rows = rows
        self._wall = anchor()
        self._segment: Arm | None = None
        self._done = 0
        self._counters = _Counters()

    def check(self) -> None:
        """Run payloads until one is answered; InputError with the first one's reason when none is."""
        reasons = []
        for payload in self._payloads:
            request = _request(payload, now_ns())
            self.engine.run([request])
            if request.status == Status.OK:
                return
            reasons.append(f"{payload.name}: {request.detail}")
        raise InputError(f"{self.engine.info.model} cannot answer any payload of its data set", reasons[:1])

    def arm(self, arm: Arm) -> dict[str, Any]:
        """Count from zero; payloads begin with the first one again, so every window does the same work."""
        self._segment, self._counters = arm, _Counters()
        return {}

    def step(self) -> bool:
        """One inference and its row."""
        size, first = self.options.batch_size, self._counters.inferences * self.options.batch_size
        chosen = [self._payloads[(first + offset) % len(self._payloads)] for offset in range(size)]
        start_ns = now_ns()
        batch = [_request(payload, start_ns) for payload in chosen]
        self.engine.run(batch)
        end_ns = now_ns()
        self._count(batch, (end_ns - start_ns) / NS_PER_MS)
        if self._rows:
            self._rows.row(self._row(chosen[0].name, batch, start_ns, end_ns))
        self._done += 1
        return True

    def counts(self) -> dict[str, Any]:
        """Inferences and failures of the window, and how long the last one took."""
        return self._counters.body()

    def _count(self, batch: Sequence[Request], taken_ms: float) -> None:
        worst = _worst(batch)
        self._counters.inferences += 1
        self._counters.failed += worst.status != Status.OK
        self._counters.last_ms = taken_ms
        self._counters.detail = self._counters.detail or worst.detail

    def _row(self, file_name: str, batch: Sequence[Request], start_ns: int, end_ns: int) -> tuple[Any, ...]:
        info, segment, worst = self.engine.info, self._segment, _worst(batch)
        return (
            f"{self._wall.wall_at(start_ns) / NS_PER_S:.6f}",
            info.model,
            self.options.beside,
            info.image_size or None,
            info.device,
            file_name,
            f"{(end_ns - start_ns) / NS_PER_MS:.6f}",
            self.options.name,
            *((segment.arm, segment.repeat, segment.segment) if segment else (None, None, None)),
            self._done,
            Status(worst.status).name,
            len(batch),
            sum(len(request.reply) for request in batch),
            start_ns,
            *(batch[-1].stamps[STAMPS.index(stage)] or None for stage in STAGES),
            end_ns,
            worst.detail or None,
        )


def _request(payload: Payload, start_ns: int) -> Request:
    """A payload as the engine takes it; nobody waits for the reply."""
    header = RequestHeader(Kind.INFER, 0, 0, 0, len(payload.data), start_ns, start_ns, 0)
    return Request(cast(Connection, None), header, payload.data, start_ns, start_ns, Segment())


def _worst(batch: Sequence[Request]) -> Request:
    """The request that speaks for the inference: the first that is not OK, else the first."""
    return next((request for request in batch if request.status != Status.OK), batch[0])


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="model to run")],
    name: Annotated[str | None, typer.Option(help="name of the loop; default: the model's")] = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="by hand only: how long")] = 10.0,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures per inference")] = 1,
    image_size: Annotated[int | None, typer.Option(min=1, help="side of the input; default: the model's")] = None,
    data: Annotated[str, typer.Option(help="data set, name:/root or folder of images")] = "sample",
    count: Annotated[int, typer.Option(min=1, help="different payloads")] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    precision: Annotated[str, typer.Option(help=", ".join(registry.PRECISIONS))] = "fp32",
    channels_last: Annotated[bool, typer.Option("--channels-last")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile")] = False,
    weights: Annotated[str | None, typer.Option(help="default or a state dict file; else random")] = None,
    threads: Annotated[int, typer.Option(min=1, help="intra-op threads")] = 1,
    extra: Annotated[str, typer.Option(help="JSON object of options of one model family")] = "{}",
    train_model: Annotated[str, typer.Option(help="what is being trained meanwhile; only for the table")] = "none",
    out: Annotated[Path | None, typer.Option(help="directory for infer_loop/<name>.csv; default: no files")] = None,
    control: Annotated[str | None, typer.Option(help="launcher's address")] = None,
) -> None:
    """Run one model back to back; a killed loop keeps every row but that of its last inference."""
    with guard(), StopSignal() as stop:
        if control:
            die_with_parent()
        set_threads(threads)
        chosen = registry.model(model)
        placement = ModelOptions(device=device, precision=precision, channels_last=channels_last, compile=compile)
        given = {"weights": weights, "image_size": image_size, "seed": seed, "extra": json_object("--extra", extra)}
        load = Load(model, {key: value for key, value in given.items() if value is not None})
        engine = load_engine(load, placement, threads)
        side = image_size or chosen.image_size or DataOptions().image_size
        payloads = registry.request_payloads(
            registry.fitting_data(data, chosen.task), DataOptions(image_size=side, count=count, seed=seed)
        )
        options = LoopOptions(name or model, batch_size, train_model)
        table = TableWriter(out / "infer_loop" / f"{options.name}.csv", INFER_LOOP, append=True) if out else None
        loop = InferenceLoop(engine, payloads, options, table)
        loop.check()
        engine.warm_up(WARM_UP, batch_size)
        settle_memory()
        if out:
            EventLog(out / "events.csv").write("ready", ROLE, options.name, _ready(engine))
        if control:
            Session(Channel(connect(Address.parse(control))), _hello(loop, load, threads), loop, stop).run()
        else:
            print(f"{options.name}: {run_alone(loop, 'alone', seconds, stop)}", flush=True)
        if table:
            table.close()


def _ready(engine: Engine) -> str:
    info = engine.info
    return f"{info.model}, {info.device}, {info.precision}, {info.weights} weights, pid {os.getpid()}"


def _hello(loop: InferenceLoop, load: Load, threads: int) -> Hello:
    info = loop.engine.info
    return Hello(
        role=ROLE,
        name=loop.options.name,
        pid=os.getpid(),
        version=__version__,
        model=info.model,
        device=info.device,
        shapes={"image_size": info.image_size},
        clock_ns=now_ns(),
        host=socket.gethostname(),
        info={
            **{key: getattr(info, key) for key in ("task", "params", "weights", "precision", "notes")},
            "batch_size": loop.options.batch_size,
            "threads": threads,
            "options": load.options,
        },
    )


if __name__ == "__main__":
    app()
