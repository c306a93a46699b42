"""Starts one service per model on consecutive ports, or N empty ones that wait for a client's LOAD."""

from __future__ import annotations

import select
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from corun import registry
from corun.errors import EXIT_FAILED, InputError, RunFault, guard
from corun.launch import commands
from corun.launch.arguments import launch_of, spread
from corun.launch.children import Child
from corun.launch.control import hold
from corun.launch.crew import Crew, make_crew
from corun.process import StopSignal
from corun.run.config import Config, Pair, Service
from corun.run.directory import RunDirectory, result_root
from corun.wire.channel import Channel
from corun.wire.messages import Stop
from corun.wire.sockets import Address, connect

STOP_S = 15.0

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
        with StopSignal() as stop, _crew(services, Config(host=host, launch=launch_of(launch)), directory) as crew:
            raise typer.Exit(_watch(*_start(crew, services, port), crew, stop, directory))


def _crew(services: list[Service], config: Config, directory: Path) -> Crew:
    cell = Pair(train=None, services=tuple(services), arms=("alone",), config=config)
    return make_crew(cell, RunDirectory(directory, {}), lambda fault: print(fault, flush=True))


def _start(crew: Crew, services: list[Service], port: int) -> tuple[list[Child], list[Address]]:
    children, addresses = [], []
    for index, service in enumerate(services):
        place = crew.place("server", index)
        addresses.append(Address("tcp", place.host, port + index))
        command = commands.server(service, addresses[-1], place.out, place.parent_pid)
        children.append(crew.start(place, "server", service.label, *command))
    for child, address in zip(children, addresses, strict=True):
        if child.node:
            hold(child, address, crew)
    crew.compare_clocks("before")
    return children, addresses


def _name(names: list[str], index: int) -> str:
    if not names:
        return f"server-{index}"
    twice = names[:index].count(names[index])
    return f"{names[index]}-{twice + 1}" if twice else names[index]


def _watch(children: list[Child], addresses: list[Address], crew: Crew, stop: StopSignal, directory: Path) -> int:
    """Report until stopped; a server that dies is named and the others go on."""
    poller = select.poll()
    poller.register(stop.fileno(), select.POLLIN)
    alive: dict[int, tuple[Child, Address]] = {}
    for child, address in zip(children, addresses, strict=True):
        poller.register(child.fd, select.POLLIN)
        alive[child.fd] = (child, address)
    print(f"{len(alive)} servers starting on {addresses[0]} and up; logs and rows in {directory}", flush=True)
    failed = False
    while alive and not stop.requested:
        for fd, _ in poller.poll():
            if fd in alive:
                poller.unregister(fd)
                child, address = alive.pop(fd)
                child.closed_fd()
                failed = True
                print(f"{child.name} on {address} {child.how_it_ended()}", flush=True)
    crew.compare_clocks("after")
    for child, address in alive.values():
        _stop(child, address)
    return EXIT_FAILED if failed else 0


def _stop(child: Child, address: Address) -> None:
    try:
        channel = Channel(connect(address, timeout_s=1.0))
        print(f"{child.name}: {channel.request(Stop('the user stopped it'), STOP_S)}", flush=True)
        child.popen.wait(STOP_S)
    except (RunFault, OSError) as error:
        print(f"{child.name} on {address} did not stop in order: {error}", flush=True)


if __name__ == "__main__":
    app(spread(sys.argv[1:], "--models"))
