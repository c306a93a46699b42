"""Runs config.json: every training job beside every set of services, in the arms it names, with the profiler."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from corun import registry
from corun.errors import EXIT_FAILED, EXIT_INTERRUPTED, InputError, guard
from corun.launch.demo import DEMO
from corun.launch.segments import process_of
from corun.process import StopSignal
from corun.run import config as configs
from corun.run.directory import RunDirectory, result_root, run_id

CONFIG = registry.home() / "config.json"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="what to train, serve and measure")] = CONFIG,
    demo: Annotated[bool, typer.Option("--demo", help="the built-in demo instead of a config file")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the cells and their wall time, run nothing")
    ] = False,
    count: Annotated[int | None, typer.Option(min=1, help="profiler rows per window: overrides duration_s")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure cells again that are complete")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="stop at the first failed cell")] = False,
    out: Annotated[Path | None, typer.Option(help="where run directories go; default result/")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON object as the last line, the rest to stderr")
    ] = False,
) -> None:
    """Measure tail latency, throughput and training speed alone and together."""
    with guard():
        settings = configs.parse(DEMO, "the demo") if demo else configs.load(config)
        if count is not None:
            settings = settings.model_copy(
                update={"duration_s": dict.fromkeys(configs.ARMS, count * settings.period_s)}
            )
        cells = configs.pairs(settings)
        _check(cells)
        if dry_run:
            _show_plan(cells)
        else:
            from corun.report.console import console_for

            raise typer.Exit(
                _run(cells, out or result_root(), console_for(stderr=as_json), fresh, fail_fast, as_json)
            )


def _check(cells: list[configs.Pair]) -> None:
    """Names that do not exist, all of them, before anything starts."""
    if not cells:
        raise InputError('nothing to do: "train" and "infer" are both none, or no arm fits what they name')
    problems = []
    for cell in cells:
        jobs = ([("train", cell.train.arch, cell.train.data)] if cell.train else []) + [
            ("infer", service.arch, service.data) for service in cell.services
        ]
        for where, arch, data in jobs:
            for find, name in ((registry.model, arch), (registry.resolve_data, data)):
                problems += _problem(where, find, name)
        for service in cell.services:
            problems += _problem("infer", process_of, service)
    if problems:
        raise InputError("the configuration names what is not there", list(dict.fromkeys(problems)))


def _problem(where: str, find: Callable[[Any], object], name: Any) -> list[str]:
    try:
        find(name)
    except InputError as error:
        return [f"{where}: {error.what}"]
    return []


def _show_plan(cells: list[configs.Pair]) -> None:
    for number, cell in enumerate(cells, 1):
        ports = [str(cell.config.port + index) for index in range(len(cell.services))]
        windows = ", ".join(f"{arm} {cell.config.duration(arm):g} s" for arm in cell.arms)
        print(f"{number}. {cell.label}: {windows}, {cell.config.repeat}x; ports {', '.join(ports) or 'none'}")
    print(f"{len(cells)} cells, about {sum(cell.expected_s for cell in cells) / 60:.1f} minutes")


def _run(cells: list[configs.Pair], root: Path, console: Console, fresh: bool, fail_fast: bool, as_json: bool) -> int:
    from corun.launch.experiment import run_pair
    from corun.launch.sweep import CellResult, run_sweep, sweep_name
    from corun.report.conclude import conclude

    def say(line: str) -> None:
        console.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {line}", highlight=False)

    last: dict[str, object] = {}
    with StopSignal() as stop:

        def measure(cell: configs.Pair, run: RunDirectory) -> CellResult:
            began = time.monotonic()
            outcome = run_pair(cell, run, stop, say)
            figures, answer = conclude(run.path, console)
            last.update(answer)
            return CellResult(outcome.status, outcome.reasons, figures, time.monotonic() - began)

        if len(cells) == 1:
            run = RunDirectory.create(root / run_id(cells[0].digest()), cells[0].resolved(), cells[0].digest())
            results = [measure(cells[0], run)]
        else:
            sweep = root / sweep_name(cells)
            results = [
                row.result for row in run_sweep(cells, sweep, measure, say, lambda: stop.requested, fresh, fail_fast)
            ]
            console.print(f"sweep: {sweep}/index.csv", highlight=False, soft_wrap=True)
        interrupted = stop.requested
    for result in results:
        for reason in result.reasons:
            console.print(f"[red]{result.status}:[/] {escape(reason)}", highlight=False)
    if as_json:
        print(json.dumps(last))
    if interrupted:
        return EXIT_INTERRUPTED
    return EXIT_FAILED if any(result.status != "complete" for result in results) else 0


if __name__ == "__main__":
    app()
