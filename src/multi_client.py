"""Runs N clients against N servers: every combination of k models, every rate, every repeat, resumable."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from corun import registry
from corun.errors import InputError, guard
from corun.launch.arguments import launch_of, spread
from corun.launch.segments import process_of
from corun.launch.sweep import CellResult, run_sweep, sweep_name
from corun.launch.telling import exit_code, sayer, tell_reasons
from corun.process import StopSignal
from corun.run.config import NONE, Config, Pair, Service
from corun.run.directory import RunDirectory, result_root

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    models: Annotated[list[str], typer.Option(help="models to ask for (several names may follow)")],
    comb: Annotated[list[int] | None, typer.Option(help="how many at once, e.g. 2 3; default: all together")] = None,
    rates: Annotated[
        list[float] | None, typer.Option(help="requests/s of each client, default 10; 0 = the Azure trace")
    ] = None,
    train_model: Annotated[str, typer.Option(help="training job that runs beside the servers, for the log")] = NONE,
    duration: Annotated[float, typer.Option(min=0.1, help="seconds of one window")] = 60.0,
    repeat: Annotated[int, typer.Option(min=1, help="repetitions, interleaved over the cells")] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    host: Annotated[str, typer.Option(help="where the servers listen")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port of the first server")] = 54100,
    data: Annotated[str, typer.Option(help="data set, name:/root or folder of images")] = "sample",
    mode: Annotated[str, typer.Option(help="open, closed (the original's synchronous mode) or paced")] = "open",
    process: Annotated[str, typer.Option(help="arrivals, e.g. poisson or gamma:rate=10,shape=0.5")] = "poisson",
    image_size: Annotated[int | None, typer.Option(min=1, help="default: each model's own")] = None,
    fresh: Annotated[bool, typer.Option("--fresh/--resume", help="measure complete cells again")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the cells and their wall time")] = False,
    launch: Annotated[
        str | None, typer.Option(help='clients on a cluster: a config.json with "launch", or that object')
    ] = None,
    out: Annotated[Path | None, typer.Option(help="where sweep directories go; default result/")] = None,
) -> None:
    """Measure running servers; started again with the same arguments it goes on where it stopped."""
    with guard():
        for name in models:
            registry.model(name)
        shared: dict[str, Any] = {"data": data, "mode": mode, "process": process, "image_size": image_size}
        windows = {"alone": duration, "corun": duration}
        config = Config(duration_s=windows, seed=seed, host=host, port=port, launch=launch_of(launch))
        cells = _cells(models, comb or [], rates or [10.0], repeat, config, train_model, shared)
        if dry_run:
            for cell in cells:
                print(f"{cell.label} (repeat seed {cell.config.seed})")
            print(f"{len(cells)} cells, about {sum(cell.expected_s for cell in cells) / 60:.1f} minutes")
            return
        raise typer.Exit(_run(cells, out or result_root(), fresh))


def _cells(
    names: list[str],
    sizes: list[int],
    rates: list[float],
    repeats: int,
    config: Config,
    beside: str,
    shared: dict[str, Any],
) -> list[Pair]:
    """(combinations x rates) inside, repeats outside, so that a slow drift hits every cell alike."""
    too_many = [size for size in sizes if not 1 <= size <= len(names)]
    if too_many:
        raise InputError(f"--comb {too_many[0]}: there are {len(names)} models to choose from")
    cells = []
    for index, size, rate in itertools.product(range(repeats), sizes or [len(names)], rates):
        for chosen in itertools.combinations(names, size):
            services = tuple(Service(arch=name, name=name, rate=rate, **shared) for name in chosen)
            for service in services:
                process_of(service)
            cells.append(
                Pair(
                    train=None,
                    services=services,
                    arms=("alone",) if beside == NONE else ("corun",),
                    config=config.model_copy(update={"seed": config.seed + index}),
                    beside=beside,
                )
            )
    return cells


def _run(cells: list[Pair], root: Path, fresh: bool) -> int:
    from corun.launch.experiment import run_pair
    from corun.report.conclude import conclude
    from corun.report.console import console_for

    console = console_for()
    say = sayer(console)
    with StopSignal() as stop:

        def measure(cell: Pair, run: RunDirectory) -> CellResult:
            began = time.monotonic()
            outcome = run_pair(cell, run, stop, say)
            figures, _ = conclude(run.path, console)
            return CellResult(outcome.status, outcome.reasons, figures, time.monotonic() - began)

        sweep = root / sweep_name(cells)
        rows = run_sweep(cells, sweep, measure, say, lambda: stop.requested, fresh)
        interrupted = stop.requested
    for row in rows:
        tell_reasons(console, row.result, row.label)
    console.print(f"sweep: {sweep}/index.csv", highlight=False, soft_wrap=True)
    return exit_code([row.result for row in rows], interrupted)


if __name__ == "__main__":
    app(spread(sys.argv[1:], "--models", "--comb", "--rates"))
