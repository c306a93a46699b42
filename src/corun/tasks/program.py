"""The commands of `src/tasks.py`, but for `up`, which may start processes on a cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from corun.errors import guard
from corun.tasks import cli
from corun.tasks.profiles import Trainer
from corun.tasks.store import Store

Id = Annotated[str, typer.Argument(help="the task's id")]
Registry = Annotated[
    Path | None, typer.Option("--store", help="the registry; default $CORUN_TASKS or result/tasks.sqlite")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON value instead of a table")]


def add_registry(app: typer.Typer) -> None:
    """Add register, list, show, remove and plan: they start nothing that stays."""
    for command in (register, list_tasks, show, remove, plan):
        app.command("list" if command is list_tasks else None)(command)


def add_running(app: typer.Typer) -> None:
    """Add status, infer, logs, report and down: about what is up, or was."""
    for command in (status, infer, logs, report, down):
        app.command()(command)


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
    do(store, lambda opened: cli.register(opened, {k: v for k, v in given.items() if v is not None}, file, replace))


def list_tasks(as_json: Json = False, store: Registry = None) -> None:
    """All tasks, the highest priority first."""
    do(store, lambda opened: cli.listing(opened, as_json))


def show(id: Id, as_json: Json = False, store: Registry = None) -> None:
    """Everything known of one task: promise, chosen model and why, statistics, replicas, events."""
    do(store, lambda opened: cli.show(opened, id, as_json))


def remove(id: Id, store: Registry = None) -> None:
    """Forget a task and its statistics; what it was asked last is still answered."""
    do(store, lambda opened: cli.remove(opened, id))


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
    do(store, lambda opened: cli.plan(opened, *rest))


def status(
    watch: Annotated[bool, typer.Option("--watch", help="redraw every second")] = False,
    as_json: Json = False,
    store: Registry = None,
) -> None:
    """What is up and how it does."""
    do(store, lambda opened: cli.status(opened, watch, as_json))


def infer(
    id: Id,
    files: Annotated[list[Path] | None, typer.Argument(help="request payloads, e.g. JPEG files")] = None,
    count: Annotated[int, typer.Option(min=1, help="times each")] = 1,
    out: Annotated[Path | None, typer.Option(help="directory for the replies as they came")] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="seconds to wait for each")] = 30.0,
    store: Registry = None,
) -> None:
    """Ask a task that is up and print its answers."""
    do(store, lambda opened: cli.infer(opened, id, files or [], count, out, timeout))


def logs(
    id: Id,
    name: Annotated[str | None, typer.Option(help="one of its logs; default: all of them")] = None,
    lines: Annotated[int, typer.Option(min=1)] = 20,
    store: Registry = None,
) -> None:
    """The last lines a task, its router and its replicas wrote."""
    do(store, lambda opened: cli.logs(opened, id, name, lines))


def report(id: Annotated[str | None, typer.Argument()] = None, as_json: Json = False, store: Registry = None) -> None:
    """Statistics since registration, and the reports of the last `up`."""
    do(store, lambda opened: cli.report(opened, id, as_json))


def down(store: Registry = None) -> None:
    """End `up`: finish what is open, stop every replica, write the reports."""
    do(store, cli.down)


def do(path: Path | None, what: Callable[[Store], int | None]) -> None:
    """Run a command on the registry and end the program with its exit code, 0 when it has none."""
    with guard(), cli.open_store(path) as opened:
        raise typer.Exit(what(opened) or 0)
