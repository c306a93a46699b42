"""Starts one service per model on consecutive ports, or N empty ones that wait for a client's LOAD."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from corun import registry
from corun.errors import EXIT_FAILED, EXIT_OK, InputError, guard
from corun.launch.arguments import launch_of, spread
from corun.launch.servers import serve
from corun.process import StopSignal
from corun.run.config import Config, Service
from corun.run.directory import result_root

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    models: Annotated[
        list[str] | None, typer.Option(help="models to serve, one per port (several names may follow)")
    ] = None,
    num: Annotated[int, typer.Option(min=0, help="without --models: servers that wait for LOAD")] = 0,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 for other hosts")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="first port")] = 54100,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="intra-op threads of each service")] = 1,
    queue_limit: Annotated[int, typer.Option(min=1, help="requests that may wait; more are rejected")] = 1024,
    max_batch: Annotated[int, typer.Option(min=1, help="dynamic batching: largest batch")] = 1,
    max_delay_ms: Annotated[float, typer.Option(min=0, help="dynamic batching: longest wait for a batch")] = 0.0,
    precision: Annotated[str, typer.Option(help=", ".join(registry.PRECISIONS))] = "fp32",
    channels_last: Annotated[bool, typer.Option("--channels-last")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile")] = False,
    weights: Annotated[str | None, typer.Option(help="default or a state dict file")] = None,
    image_size: Annotated[int | None, typer.Option(min=1)] = None,
    launch: Annotated[
        str | None, typer.Option(help='servers on a cluster: a config.json with "launch", or that object')
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="directory for infer_server/*.csv; default result/servers-<time>")
    ] = None,
) -> None:
    """Serve several models; Ctrl-C once drains and saves, twice kills."""
    with guard():
        names = models or []
        count = len(names) or num
        if not count:
            raise InputError("nothing to serve: give --models NAME ... or --num N")
        if port + count - 1 > 65535:
            raise InputError(
                f"{count} servers from port {port} on need ports up to {port + count - 1}; the last is 65535"
            )
        for name in names:
            registry.model(name)
        directory = (out or result_root() / f"servers-{datetime.now():%Y%m%d-%H%M%S}").absolute()
        options = {
            "device": device,
            "threads": threads,
            "queue_limit": queue_limit,
            "max_batch": max_batch,
            "max_delay_ms": max_delay_ms,
            "precision": precision,
            "channels_last": channels_last,
            "compile": compile,
            "weights": weights,
            "image_size": image_size,
        }
        services = [
            Service(arch=names[index] if names else "none", name=_name(names, index), **options)
            for index in range(count)
        ]
        with StopSignal() as stop:
            lived = serve(services, Config(host=host, launch=launch_of(launch)), port, directory, stop)
        raise typer.Exit(EXIT_OK if lived else EXIT_FAILED)


def _name(names: list[str], index: int) -> str:
    if not names:
        return f"server-{index}"
    twice = names[:index].count(names[index])
    return f"{names[index]}-{twice + 1}" if twice else names[index]


if __name__ == "__main__":
    app(spread(sys.argv[1:], "--models"))
