"""One service: a model behind a socket, with its own queue, batcher and rows.

python src/server.py --model resnet18 --port 54100                     until Ctrl-C or STOP
python src/server.py --model null --address unix:/tmp/null.sock --extra '{"service_ms": 5}'
python src/server.py --port 54100                                      waits for a client's LOAD
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from corun import registry
from corun.errors import InputError, guard
from corun.process import StopSignal, die_with_parent, set_threads

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str | None, typer.Option(help="model to serve; without it the server waits for LOAD")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = one that is free")] = 54100,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 for other hosts")] = "127.0.0.1",
    address: Annotated[str | None, typer.Option(help="instead of host and port, e.g. unix:/tmp/a.sock")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="intra-op threads")] = 1,
    queue_limit: Annotated[int, typer.Option(min=1, help="requests that may wait; more are rejected")] = 1024,
    max_batch: Annotated[int, typer.Option(min=1, help="dynamic batching: largest batch")] = 1,
    max_delay_ms: Annotated[float, typer.Option(min=0, help="dynamic batching: longest wait for a batch")] = 0.0,
    deadline_ms: Annotated[int, typer.Option(min=0, help="of requests that bring none; 0 = none")] = 0,
    policy: Annotated[str, typer.Option(help="order of the queue: fifo, sjf, edf, hrrn or hrrn-stale")] = "fifo",
    precision: Annotated[str, typer.Option(help=", ".join(registry.PRECISIONS))] = "fp32",
    channels_last: Annotated[bool, typer.Option("--channels-last")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile")] = False,
    weights: Annotated[str | None, typer.Option(help="default or a state dict file; else random")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="side of the network's input")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1)] = None,
    extra: Annotated[str, typer.Option(help="JSON object of options of one model family")] = "{}",
    out: Annotated[Path | None, typer.Option(help="directory for infer_server/<name>.csv; default: no files")] = None,
    name: Annotated[str | None, typer.Option(help="name of the service; default: the model's")] = None,
    warmup: Annotated[int, typer.Option(min=0, help="examples run after a load")] = 3,
    follow: Annotated[
        Path | None, typer.Option(help="directory of published weights to take up as they come")
    ] = None,
    announce: Annotated[str | None, typer.Option(help="PAGE:SLOT of a sharing policy's page")] = None,
    parent: Annotated[int | None, typer.Option(help="end when this process ends")] = None,
) -> None:
    """Serve one model; SIGTERM or Ctrl-C once drains and saves, Ctrl-C twice kills."""
    with guard(), StopSignal() as stop:
        if parent:
            die_with_parent(parent)
        set_threads(threads)
        from corun.serve import Server, ServerOptions, load_engine
        from corun.serve.follow import Follower, followed
        from corun.wire import Address
        from corun.wire.messages import Load

        placement = registry.ModelOptions(
            device=device, precision=precision, channels_last=channels_last, compile=compile
        )
        given = {"weights": weights, "image_size": image_size, "num_classes": num_classes}
        chosen = {key: value for key, value in given.items() if value is not None} | {"extra": _object(extra)}
        initial = Load(registry.model(model).name, chosen) if model else None
        options = ServerOptions(
            name=name or model or "server",
            address=Address.parse(address) if address else Address("tcp", host, port),
            queue_limit=queue_limit,
            max_batch=max_batch,
            max_delay_ns=round(max_delay_ms * 1e6),
            deadline_ms=deadline_ms,
            policy=policy,
            warmup=warmup,
            threads=threads,
            out=out,
            placement=placement,
        )
        make = followed(load_engine) if follow else load_engine
        server = Server(options, lambda load: make(load, placement, threads), observer=_observer(announce))
        with Follower(server, follow) if follow else nullcontext():
            final = server.serve(initial, stop).counts
        where = f"; rows in {out}/infer_server/{options.name}.csv" if out else ""
        print(f"{options.name} stopped: {final.summary()}{where}", flush=True)
        if server.abandoned:
            os._exit(0)


def _observer(announce: str | None) -> Any:
    """The announcer of this service on a sharing policy's page, or None."""
    if announce is None:
        return None
    from corun.share.announce import Announcer
    from corun.share.page import Page

    page, _, slot = announce.rpartition(":")
    if not page or not slot.isdigit():
        raise InputError(f"--announce {announce} is not PAGE:SLOT")
    return Announcer(Page.open(page), int(slot))


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"--extra is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"--extra is not a JSON object, e.g. '{{\"conf\": 0.25}}': {text}")
    return value


if __name__ == "__main__":
    app()
