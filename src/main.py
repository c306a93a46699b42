"""Runs config.json: every training job beside every set of services, in the arms it names, with the profiler."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from corun import registry
from corun.errors import EXIT_OK, EXIT_SLO_MISSED, guard
from corun.flags import takes
from corun.launch.cells import describe, require_known
from corun.launch.demo import DEMO
from corun.process import StopSignal
from corun.run import config as configs
from corun.run.directory import RunDirectory, result_root, run_id

CONFIG = registry.home() / "config.json"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Flags:
    """How the cells of a config are run and shown."""

    config: Annotated[Path, typer.Option(help="what to train, serve and measure")] = CONFIG
    demo: Annotated[bool, typer.Option("--demo", help="the built-in demo instead of a config file")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the cells and their wall time, run nothing")] = (
        False
    )
    count: Annotated[int | None, typer.Option(min=1, help="profiler rows per window: overrides duration_s")] = None
    policy: Annotated[str | None, typer.Option(help='sharing policy, e.g. idle or idle+slo; overrides "sharing"')] = (
        None
    )
    fresh: Annotated[bool, typer.Option("--fresh", help="measure cells again that are complete")] = False
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="stop at the first failed cell")] = False
    out: Annotated[Path | None, typer.Option(help="where run directories go; default result/")] = None
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="measure client and null server alone first")
    ] = True
    legacy: Annotated[
        bool, typer.Option("--legacy", help="measure every cell under the original's load too, with its latencies")
    ] = False
    report: Annotated[bool, typer.Option("--report/--no-report", help="write report.html at the end")] = True
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress, only the tables at the end")] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="a JSON object a second and one as the last line, the rest to stderr")
    ] = False


@app.command()
@takes(Flags)
def main(flags: Flags) -> None:
    """Measure tail latency, throughput and training speed alone and together.

    Exit code 0 when all is measured and promised latencies are kept, 1 when a cell failed, 2 for bad input, 3 when
    a promise ("slo" in config.json) was missed or cannot be told from so few requests, 130 when interrupted.
    """
    with guard():
        given = configs.parse(DEMO, "the demo") if flags.demo else configs.load(flags.config)
        settings = configs.overridden(given, flags.count, flags.policy)
        cells = configs.with_legacy(configs.pairs(settings)) if flags.legacy else configs.pairs(settings)
        require_known(cells)
        if flags.dry_run:
            print("\n".join(describe(cells)))
        else:
            raise typer.Exit(_run(cells, flags, flags.calibrate and settings.calibrate))


def _run(cells: list[configs.Pair], flags: Flags, calibrate: bool) -> int:
    from corun.launch.calibrate import Calibration
    from corun.launch.experiment import run_pair
    from corun.launch.live import make_live
    from corun.launch.sweep import CellResult, run_sweep, sweep_name
    from corun.launch.telling import exit_code, sayer, tell_reasons
    from corun.report import legacy as originals
    from corun.report.conclude import conclude, write_page
    from corun.report.console import console_for
    from corun.report.slo import kept

    console, root = console_for(stderr=flags.as_json), flags.out or result_root()
    say = sayer(console, flags.quiet)
    last: dict[str, object] = {}
    with StopSignal() as stop:
        calibration = Calibration(stop, say, calibrate)
        live = make_live(console, say, flags.quiet, sys.stdout if flags.as_json else None)

        def measure(cell: configs.Pair, run: RunDirectory) -> CellResult:
            began = time.monotonic()
            calibration.store(run)
            outcome = run_pair(cell, run, stop, say, live)
            figures, answer = conclude(run.path, console, cell.promises)
            last.update(answer)
            return CellResult(outcome.status, outcome.reasons, figures, time.monotonic() - began)

        if len(cells) == 1:
            run = RunDirectory.create(root / run_id(cells[0].digest()), cells[0].resolved(), cells[0].digest())
            results, paths, whole = [measure(cells[0], run)], [run.path], run.path
        else:
            whole = root / sweep_name(cells)
            stopped = lambda: stop.requested  # noqa: E731
            rows = run_sweep(cells, whole, measure, say, stopped, flags.fresh, flags.fail_fast)
            results, paths = [row.result for row in rows], [whole / row.cell for row in rows]
            console.print(f"sweep: {whole}/index.csv", highlight=False, soft_wrap=True)
        if flags.report:
            write_page(whole, console)
        if flags.legacy and len(cells) > 1:
            originals.show(originals.write(paths, whole / "legacy.csv"), console)
        interrupted = stop.requested
    for result in results:
        tell_reasons(console, result)
    if flags.as_json:
        print(json.dumps(last))
    code = exit_code(results, interrupted)
    promised = zip(paths, cells, strict=False)
    return code or (EXIT_OK if all(kept(path, cell.promises) for path, cell in promised) else EXIT_SLO_MISSED)


if __name__ == "__main__":
    app()
