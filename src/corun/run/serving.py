"""The flags of src/server.py: what one service is asked to be, before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from corun import registry
from corun.flags import takes
from corun.run.commandline import json_object


@dataclass(frozen=True)
class Serving:
    """One service as its command line says."""

    model: Annotated[str | None, typer.Option(help="model to serve; without it the server waits for LOAD")] = None
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = one that is free")] = 54100
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 for other hosts")] = "127.0.0.1"
    address: Annotated[str | None, typer.Option(help="instead of host and port, e.g. unix:/tmp/a.sock")] = None
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto"
    threads: Annotated[int, typer.Option(min=1, help="intra-op threads")] = 1
    queue_limit: Annotated[int, typer.Option(min=1, help="requests that may wait; more are rejected")] = 1024
    max_batch: Annotated[int, typer.Option(min=1, help="dynamic batching: largest batch")] = 1
    max_delay_ms: Annotated[float, typer.Option(min=0, help="dynamic batching: longest wait for a batch")] = 0.0
    deadline_ms: Annotated[int, typer.Option(min=0, help="of requests that bring none; 0 = none")] = 0
    policy: Annotated[str, typer.Option(help="order of the queue: fifo, sjf, edf, hrrn or hrrn-stale")] = "fifo"
    precision: Annotated[str, typer.Option(help=", ".join(registry.PRECISIONS))] = "fp32"
    channels_last: Annotated[bool, typer.Option("--channels-last")] = False
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile")] = False
    weights: Annotated[str | None, typer.Option(help="default or a state dict file; else random")] = None
    image_size: Annotated[int | None, typer.Option(min=1, help="side of the network's input")] = None
    num_classes: Annotated[int | None, typer.Option(min=1)] = None
    extra: Annotated[str, typer.Option(help="JSON object of options of one model family")] = "{}"
    out: Annotated[Path | None, typer.Option(help="directory for infer_server/<name>.csv; default: no files")] = None
    name: Annotated[str | None, typer.Option(help="name of the service; default: the model's")] = None
    warmup: Annotated[int, typer.Option(min=0, help="examples run after a load")] = 3
    follow: Annotated[Path | None, typer.Option(help="directory of published weights to take up as they come")] = None
    announce: Annotated[str | None, typer.Option(help="PAGE:SLOT of a sharing policy's page")] = None
    parent: Annotated[int | None, typer.Option(help="end when this process ends")] = None

    @property
    def label(self) -> str:
        """Name of the service in files and messages."""
        return self.name or self.model or "server"

    def check(self) -> None:
        """InputError when there is no such model or --extra is no JSON object; nothing heavy is imported."""
        if self.model:
            registry.model(self.model)
        json_object("--extra", self.extra)

    @property
    def model_options(self) -> dict[str, Any]:
        """What a LOAD of its model says; InputError when --extra is no JSON object."""
        given = {"weights": self.weights, "image_size": self.image_size, "num_classes": self.num_classes}
        return {name: value for name, value in given.items() if value is not None} | {
            "extra": json_object("--extra", self.extra)
        }


@takes(Serving)
def flags(serving: Serving) -> Serving:
    """Serve one model; SIGTERM or Ctrl-C once drains and saves, Ctrl-C twice kills."""
    return serving
