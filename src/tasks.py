"""Tasks: register what is to be answered and how fast, let the best model that can be chosen, keep it served.

python src/tasks.py register doors --kind classification --rate 20 --slo "p99<=100" --model resnet18 --model resnet50
python src/tasks.py plan --measure        python src/tasks.py up        python src/tasks.py infer doors photo.jpg
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from corun.errors import guard
from corun.tasks import cli
from corun.tasks.profiles import Trainer
from corun.tasks.runtime import Runtime
from corun.tasks.store import Store
from corun.tasks.supervisor import UpOptions, runtimes_here

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)

Id = Annotated[str, typer.Argument(help="the task's id")]
Registry = Annotated[
    Path | None, typer.Option("--store", help="the registry; default $CORUN_TASKS or result/tasks.sqlite")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON value instead of a table")]


@app.command()
def register(
    id: Annotated[str | None, typer.Argument(help="name of the task: a-z 0-9 - _")] = None,
    description: Annotated[str | None, typer.Option()] = None,
    kind: Annotated[str | None, typer.Option(help="classification, detection, ...: what its models do")] = None,
    priority: Annotated[int | None, typer.Option(help="the higher one is served first")] = None,
    resource: Annotated[str | None, typer.Option(help="cpu or gpu")] = None,
    rate: Annotated[float | None, typer.Option(help="expected requests/s")] = None,
    slo: Annotated[str | None, typer.Option(help='promise, e.g. "p99<=100, max<=1s"')] = None,
    min_quality: Annotated[float | None, typer.Option(help="least quality, in % of the kind's metric")] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", help="allowed, repeatable; name or name:key=value,...")
    ] = None,
    min_replicas: Annotated[int | None, typer.Option()] = None,
    max_replicas: Annotated[int | None, typer.Option()] = None,
    runtime: Annotated[str | None, typer.Option(help="process or docker")] = None,
    weights: Annotated[str | None, typer.Option(help="default (released), random, or a state dict file")] = None,
    cpu_limit: Annotated[float | None, typer.Option(help="cores of each replica")] = None,
    memory_limit_mib: Annotated[float | None, typer.Option(help="memory of each replica")] = None,
    file: Annotated[Path | None, typer.Option(help="JSON: one task or a list, instead of flags")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="change a task that is registered")] = False,
    store: Registry = None,
) -> None:
    """Register a task."""
    given = {name: value for name, value in locals().items() if name not in ("file", "replace", "store")}
    _do(store, lambda opened: cli.register(opened, {k: v for k, v in given.items() if v is not None}, file, replace))


@app.command("list")
def list_tasks(as_json: Json = False, store: Registry = None) -> None:
    """All tasks, the highest priority first."""
    _do(store, lambda opened: cli.listing(opened, as_json))


@app.command()
def show(id: Id, as_json: Json = False, store: Registry = None) -> None:
    """Everything known of one task: promise, chosen model and why, statistics, replicas, events."""
    _do(store, lambda opened: cli.show(opened, id, as_json))


@app.command()
def remove(id: Id, store: Registry = None) -> None:
    """Forget a task and its statistics; what it was asked last is still answered."""
    _do(store, lambda opened: cli.remove(opened, id))


@app.command()
def plan(
    measure: Annotated[bool, typer.Option("--measure", help="measure models that were not measured here")] = False,
    train: Annotated[str | None, typer.Option(help="plan beside this training job: model of the model table")] = None,
    train_batch_size: Annotated[int, typer.Option(min=1)] = 16,
    train_threads: Annotated[int, typer.Option(min=1)] = 1,
    quality: Annotated[Path | None, typer.Option(help="your own quality table (JSON)")] = None,
    seconds: Annotated[float, typer.Option(help="of each measured window")] = 10.0,
    max_batch: Annotated[
        list[int] | None, typer.Option(help="batch limits to measure, repeatable; default 1")
    ] = None,
    max_slowdown: Annotated[float | None, typer.Option(help="with --train: how many times slower it may get")] = None,
    data: Annotated[str, typer.Option(help="request payloads of the measurement")] = "sample",
    cores: Annotated[float | None, typer.Option(help="cores for services; default: all")] = None,
    memory_mib: Annotated[float | None, typer.Option(help="memory for services; default: what is free")] = None,
    as_json: Json = False,
    store: Registry = None,
) -> None:
    """Choose a model for every task and say why each other one lost; exit code 3 when a task has none."""
    trainer = Trainer(train, batch_size=train_batch_size, threads=train_threads) if train else None
    rest = (quality, measure, trainer, seconds, max_batch or [1], cores, memory_mib, max_slowdown, data, as_json)
    _do(store, lambda opened: cli.plan(opened, *rest))


@app.command()
def up(
    task: Annotated[list[str] | None, typer.Option(help="only this one, repeatable; default: all registered")] = None,
    host: Annotated[str, typer.Option(help="where the tasks are reached")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="of the first task, then upwards; 0 = free ones")] = 0,
    image: Annotated[str | None, typer.Option(help="of containers; default corun:latest")] = None,
    checkout: Annotated[
        bool, typer.Option("--checkout", help="mount this checkout and Python into the image")
    ] = False,
    replan: Annotated[float, typer.Option(min=0, help="seconds between plans from live statistics; 0 = never")] = 0.0,
    page: Annotated[int | None, typer.Option(help="serve a page about it on this port")] = None,
    page_host: Annotated[str, typer.Option(help="other than loopback needs --token")] = "127.0.0.1",
    token: Annotated[str | None, typer.Option(envvar="CORUN_TOKEN", help="password of the page")] = None,
    out: Annotated[Path | None, typer.Option(help="logs, rows and reports; default: beside the registry")] = None,
    launch: Annotated[
        str | None, typer.Option(help='processes on a cluster: a config.json with "launch", or that object')
    ] = None,
    store: Registry = None,
) -> None:
    """Serve the tasks until Ctrl-C or `down`: router, replicas, restarts, scaling."""
    options = UpOptions(tuple(task or ()), host, port, image, checkout, out)
    site = (page_host, page, token) if page is not None else None
    _do(store, lambda opened: cli.up(opened, options, site, replan, _elsewhere(launch, opened, options)))


def _elsewhere(launch: str | None, opened: Store, options: UpOptions) -> Callable[[str], Runtime] | None:
    """Runtimes on the nodes of a cluster; None without --launch, before which nothing of it is imported."""
    if launch is None:
        return None
    from corun.launch.arguments import launch_of
    from corun.launch.ray_runtime import placed

    return placed(launch_of(launch), runtimes_here(opened, options))


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", help="redraw every second")] = False,
    as_json: Json = False,
    store: Registry = None,
) -> None:
    """What is up and how it does."""
    _do(store, lambda opened: cli.status(opened, watch, as_json))


@app.command()
def infer(
    id: Id,
    files: Annotated[list[Path] | None, typer.Argument(help="request payloads, e.g. JPEG files")] = None,
    count: Annotated[int, typer.Option(min=1, help="times each")] = 1,
    out: Annotated[Path | None, typer.Option(help="directory for the replies as they came")] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="seconds to wait for each")] = 30.0,
    store: Registry = None,
) -> None:
    """Ask a task that is up and print its answers."""
    _do(store, lambda opened: cli.infer(opened, id, files or [], count, out, timeout))


@app.command()
def logs(
    id: Id,
    name: Annotated[str | None, typer.Option(help="one of its logs; default: all of them")] = None,
    lines: Annotated[int, typer.Option(min=1)] = 20,
    store: Registry = None,
) -> None:
    """The last lines a task, its router and its replicas wrote."""
    _do(store, lambda opened: cli.logs(opened, id, name, lines))


@app.command()
def report(id: Annotated[str | None, typer.Argument()] = None, as_json: Json = False, store: Registry = None) -> None:
    """Statistics since registration, and the reports of the last `up`."""
    _do(store, lambda opened: cli.report(opened, id, as_json))


@app.command()
def down(store: Registry = None) -> None:
    """End `up`: finish what is open, stop every replica, write the reports."""
    _do(store, cli.down)


def _do(path: Path | None, what: Any) -> None:
    with guard(), cli.open_store(path) as opened:
        raise typer.Exit(what(opened) or 0)


if __name__ == "__main__":
    app()
