"""The command lines of client.py and client_async.py; what they mean is in `corun.load.door`.

Nothing heavy is imported here: a client fixes the threads of its libraries before it loads numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True)
class Flags:
    """The command line of a client with one request in flight, which knows every flag there is."""

    host: Annotated[str, typer.Option(help="the server's host")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=1, max=65535, help="the server's port")] = 54100
    address: Annotated[str | None, typer.Option(help="host:port or unix:/path, instead of --host and --port")] = None
    model: Annotated[str, typer.Option(help="model to be served; loaded if the server has another one")] = ""
    name: Annotated[str | None, typer.Option(help="service name in files and tables; default: the model")] = None
    rate: Annotated[float, typer.Option(min=0, help="mean requests/s; 0 = the recorded trace")] = 10.0
    process: Annotated[
        str, typer.Option(help="arrivals: poisson, constant, gamma:rate=10,shape=0.5, closed (back to back) ...")
    ] = "poisson"
    after_reply: Annotated[
        bool, typer.Option("--after-reply", help="rest the schedule's gaps after each reply, as the original did")
    ] = False
    think_s: Annotated[
        float, typer.Option("--think", min=0, help="with --process closed: seconds of rest after a reply")
    ] = 0.0
    duration_s: Annotated[float, typer.Option("--duration", min=0.001, help="seconds")] = 10.0
    seed: Annotated[int, typer.Option(min=0)] = 0
    stream: Annotated[int, typer.Option(min=0, help="streams of one seed are independent")] = 0
    data: Annotated[str, typer.Option(help="data set, name:/root or folder of images")] = "sample"
    count: Annotated[int, typer.Option(min=1, help="different payloads")] = 64
    image_size: Annotated[int | None, typer.Option(min=1, help="side of the network's input")] = None
    train_model: Annotated[str, typer.Option(help="what is being trained meanwhile; only for the table")] = "none"
    schedule: Annotated[Path | None, typer.Option(help="schedule.npy: send its rows of this stream")] = None
    out: Annotated[Path | None, typer.Option(help="directory; default a fresh one in result/")] = None
    control: Annotated[str | None, typer.Option(help="launcher's address")] = None
    priority: Annotated[str, typer.Option(help="none, auto or fifo (SCHED_FIFO)")] = "none"
    cores: Annotated[str, typer.Option(help="cores this client may run on, e.g. 1 or 0,1")] = ""
    wait_s: Annotated[float, typer.Option("--wait", min=0, help="seconds to wait for a server that is starting")] = (
        0.0
    )
    whole: Annotated[bool, typer.Option("--whole", help="a generated answer in one piece, not token by token")] = (
        False
    )
    deadline_ms: Annotated[
        int, typer.Option(min=0, help="the server ends a request so long after its due instant; 0 = none")
    ] = 0
    cancel_after_ms: Annotated[
        int, typer.Option(min=0, help="take a request back so long after it was sent; 0 = never")
    ] = 0
    drain_timeout_s: Annotated[
        float, typer.Option("--drain-timeout", min=0, help="seconds to wait for the last replies")
    ] = 10.0
    one_at_a_time: bool = False


@dataclass(frozen=True)
class OpenFlags(Flags):
    """The command line of an open-loop client."""

    process: Annotated[
        str, typer.Option(help="arrivals: poisson, constant, gamma:rate=10,shape=0.5, mmpp, trace ...")
    ] = "poisson"
