"""Runs config.json: every training job beside every set of services, in the arms it names, with the profiler."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from corun import registry
from corun.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_SLO_MISSED, CorunError, guard
from corun.launch.cells import describe, require_known
from corun.launch.demo import DEMO
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
    policy: Annotated[
        str | None, typer.Option(help='sharing policy, e.g. idle or idle+slo; overrides "sharing"')
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure cells again that are complete")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="stop at the first failed cell")] = False,
    out: Annotated[Path | None, typer.Option(help="where run directories go; default result/")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="measure client and null server alone first")
    ] = True,
    legacy: Annotated[
        bool, typer.Option("--legacy", help="measure every cell under the original's load too, with its latencies")
    ] = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="write report.html at the end")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress, only the tables at the end")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="a JSON object a second and one as the last line, the rest to stderr")
    ] = False,
) -> None:
    """Measure tail latency, throughput and training speed alone and together.

    Exit code 0 when all is measured and promised latencies are kept, 1 when a cell failed, 2 for bad input, 3 when
    a promise ("slo" in config.json) was missed or cannot be told from so few requests, 130 when interrupted.
    """
    with guard():
        settings = configs.parse(DEMO, "the demo") if demo else configs.load(config)
        if count is not None:
            settings = settings.model_copy(
                update={"duration_s": dict.fromkeys(configs.ARMS, count * settings.period_s)}
            )
        if policy is not None:
            given = settings.sharing if isinstance(settings.sharing, dict) else {}
            settings = settings.model_copy(update={"sharing": {**given, "policy": policy}})
        cells = configs.with_legacy(configs.pairs(settings)) if legacy else configs.pairs(settings)
        require_known(cells)
        if dry_run:
            print("\n".join(describe(cells)))
        else:
            from corun.report.console import console_for

            console = console_for(stderr=as_json)
            calibrate = calibrate and settings.calibrate
            options = Options(
                out or result_root(), console, fresh, fail_fast, calibrate, quiet, as_json, report, legacy
            )
            raise typer.Exit(_run(cells, options))


@dataclass(frozen=True)
class Options:
    """How the cells are run and shown."""

    root: Path
    console: Console
    fresh: bool
    fail_fast: bool
    calibrate: bool
    quiet: bool
    as_json: bool
    report: bool
    legacy: bool


def _run(cells: list[configs.Pair], options: Options) -> int:
    from corun.launch.calibrate import Calibration
    from corun.launch.experiment import run_pair
    from corun.launch.live import make_live
    from corun.launch.sweep import CellResult, run_sweep, sweep_name
    from corun.report import legacy as originals
    from corun.report.conclude import conclude
    from corun.report.slo import kept

    console = options.console

    def say(line: str) -> None:
        if not options.quiet:
            console.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {escape(line)}", highlight=False)

    last: dict[str, object] = {}
    with StopSignal() as stop:
        calibration = Calibration(stop, say, options.calibrate)
        live = make_live(console, say, options.quiet, sys.stdout if options.as_json else None)

        def measure(cell: configs.Pair, run: RunDirectory) -> CellResult:
            began = time.monotonic()
            calibration.store(run)
            outcome = run_pair(cell, run, stop, say, live)
            figures, answer = conclude(run.path, console, cell.promises)
            last.update(answer)
            return CellResult(outcome.status, outcome.reasons, figures, time.monotonic() - began)

        if len(cells) == 1:
            run = RunDirectory.create(
                options.root / run_id(cells[0].digest()), cells[0].resolved(), cells[0].digest()
            )
            results, paths = [measure(cells[0], run)], [run.path]
            _write_page(run.path, options)
        else:
            sweep = options.root / sweep_name(cells)
            stopped = lambda: stop.requested  # noqa: E731
            rows = run_sweep(cells, sweep, measure, say, stopped, options.fresh, options.fail_fast)
            results, paths = [row.result for row in rows], [sweep / row.cell for row in rows]
            console.print(f"sweep: {sweep}/index.csv", highlight=False, soft_wrap=True)
            _write_page(sweep, options)
            if options.legacy:
                originals.show(originals.write(paths, sweep / "legacy.csv"), console)
        interrupted = stop.requested
    for result in results:
        for reason in result.reasons:
            console.print(f"[red]{result.status}:[/] {escape(reason)}", highlight=False)
    if options.as_json:
        print(json.dumps(last))
    if interrupted:
        return EXIT_INTERRUPTED
    if any(result.status != "complete" for result in results):
        return EXIT_FAILED
    promised = zip(paths, cells, strict=False)
    return EXIT_OK if all(kept(path, cell.promises) for path, cell in promised) else EXIT_SLO_MISSED


def _write_page(path: Path, options: Options) -> None:
    """report.html of a run or a sweep; what cannot be drawn is said, the rows are safe by now."""
    if not options.report:
        return
    from corun.report import page, sweep_page

    try:
        written = sweep_page.write(path) if sweep_page.is_sweep(path) else page.write(path)
    except CorunError as error:
        options.console.print(f"[yellow]no report:[/] {escape(str(error))}", highlight=False)
        return
    options.console.print(f"report: {written}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
