"""Services without a run: started on consecutive ports, watched until somebody stops them."""

from __future__ import annotations

import select
from collections.abc import Sequence
from pathlib import Path

from corun.errors import RunFault
from corun.launch import commands
from corun.launch.children import Child
from corun.launch.control import hold
from corun.launch.crew import Crew, make_crew
from corun.process import StopSignal
from corun.run.config import Config, Pair, Service
from corun.run.directory import RunDirectory
from corun.wire.channel import Channel
from corun.wire.messages import Stop
from corun.wire.sockets import Address, connect

STOP_S = 15.0


def serve(services: Sequence[Service], config: Config, port: int, directory: Path, stop: StopSignal) -> bool:
    """Serve until stopped; a server that dies is named and the others go on. Returns whether all of them lived."""
    cell = Pair(train=None, services=tuple(services), arms=("alone",), config=config)
    with make_crew(cell, RunDirectory(directory, {}), lambda fault: print(fault, flush=True)) as crew:
        return _watch(*_start(crew, services, port), crew, stop, directory)


def _start(crew: Crew, services: Sequence[Service], port: int) -> tuple[list[Child], list[Address]]:
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


def _watch(children: list[Child], addresses: list[Address], crew: Crew, stop: StopSignal, directory: Path) -> bool:
    poller = select.poll()
    poller.register(stop.fileno(), select.POLLIN)
    alive: dict[int, tuple[Child, Address]] = {}
    for child, address in zip(children, addresses, strict=True):
        poller.register(child.fd, select.POLLIN)
        alive[child.fd] = (child, address)
    print(f"{len(alive)} servers starting on {addresses[0]} and up; logs and rows in {directory}", flush=True)
    while alive and not stop.requested:
        for fd, _ in poller.poll():
            if fd in alive:
                poller.unregister(fd)
                child, address = alive.pop(fd)
                child.closed_fd()
                print(f"{child.name} on {address} {child.how_it_ended()}", flush=True)
    crew.compare_clocks("after")
    for child, address in alive.values():
        _stop(child, address)
    return len(alive) == len(children)


def _stop(child: Child, address: Address) -> None:
    try:
        channel = Channel(connect(address, timeout_s=1.0))
        print(f"{child.name}: {channel.request(Stop('the user stopped it'), STOP_S)}", flush=True)
        child.popen.wait(STOP_S)
    except (RunFault, OSError) as error:
        print(f"{child.name} on {address} did not stop in order: {error}", flush=True)
