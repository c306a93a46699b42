"""One open-loop client: every request leaves at its due instant, however slow the server is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corun.errors import guard
from corun.process import set_threads

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    host: Annotated[str, typer.Option(help="the server's host")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="the server's port")] = 54100,
    address: Annotated[str | None, typer.Option(help="host:port or unix:/path, instead of --host and --port")] = None,
    model: Annotated[str, typer.Option(help="model to be served; loaded if the server has another one")] = "",
    name: Annotated[str | None, typer.Option(help="service name in files and tables; default: the model")] = None,
    rate: Annotated[float, typer.Option(min=0, help="mean requests/s; 0 = the recorded trace")] = 10.0,
    process: Annotated[
        str, typer.Option(help="arrivals: poisson, constant, gamma:rate=10,shape=0.5, mmpp, trace ...")
    ] = "poisson",
    duration: Annotated[float, typer.Option(min=0.001, help="seconds")] = 10.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    stream: Annotated[int, typer.Option(min=0, help="streams of one seed are independent")] = 0,
    data: Annotated[str, typer.Option(help="data set, name:/root or folder of images")] = "sample",
    count: Annotated[int, typer.Option(min=1, help="different payloads")] = 64,
    image_size: Annotated[int | None, typer.Option(min=1, help="side of the network's input")] = None,
    train_model: Annotated[str, typer.Option(help="what is being trained meanwhile; only for the table")] = "none",
    schedule: Annotated[Path | None, typer.Option(help="schedule.npy: send its rows of this stream")] = None,
    out: Annotated[Path | None, typer.Option(help="directory; default a fresh one in result/")] = None,
    control: Annotated[str | None, typer.Option(help="launcher's address")] = None,
    priority: Annotated[str, typer.Option(help="none, auto or fifo (SCHED_FIFO)")] = "none",
    cores: Annotated[str, typer.Option(help="cores this client may run on, e.g. 1 or 0,1")] = "",
    wait: Annotated[float, typer.Option(min=0, help="seconds to wait for a server that is starting")] = 0.0,
    whole: Annotated[
        bool, typer.Option("--whole", help="a generated answer in one piece, not token by token")
    ] = False,
    deadline_ms: Annotated[
        int, typer.Option(min=0, help="the server ends a request so long after its due instant; 0 = none")
    ] = 0,
    cancel_after_ms: Annotated[
        int, typer.Option(min=0, help="take a request back so long after it was sent; 0 = never")
    ] = 0,
    drain_timeout: Annotated[float, typer.Option(min=0, help="seconds to wait for the last replies")] = 10.0,
) -> None:
    """Send requests on a schedule and record every one; prints sojourn, response and slip."""
    with guard():
        set_threads(1)
        from corun.load.door import Flags, run

        run(
            Flags(
                host=host,
                port=port,
                address=address,
                model=model,
                name=name,
                rate=rate,
                process=process,
                duration_s=duration,
                seed=seed,
                stream=stream,
                data=data,
                count=count,
                image_size=image_size,
                train_model=train_model,
                schedule=schedule,
                out=out,
                control=control,
                priority=priority,
                cores=cores,
                wait_s=wait,
                whole=whole,
                deadline_ms=deadline_ms,
                cancel_after_ms=cancel_after_ms,
                drain_timeout_s=drain_timeout,
            )
        )


if __name__ == "__main__":
    app()
