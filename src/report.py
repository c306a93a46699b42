"""Shows what was measured: a page with figures and tables, summaries for other programs, and comparisons of runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import click
import typer
from typer.core import TyperGroup

from corun.errors import InputError, guard


class _PageByDefault(TyperGroup):
    """`report.py RUN` is short for `report.py page RUN`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["page", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_PageByDefault, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.command()
def page(
    run: Annotated[Path, typer.Argument(help="a run directory, or a sweep with run directories in it")],
    as_csv: Annotated[bool, typer.Option("--csv", help="the summary on stdout as CSV, no page")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the summary on stdout as JSON, no page")] = False,
    parquet: Annotated[bool, typer.Option("--parquet", help="a Parquet file beside each CSV file, no page")] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="trace.json for Perfetto or chrome://tracing, no page")
    ] = False,
    cells: Annotated[bool, typer.Option("--cells", help="of a sweep: the page of every cell too")] = False,
) -> None:
    """Write report.html and its figures into RUN, or export RUN (the name `page` may be left out)."""
    with guard():
        from corun.report import export, sweep_page
        from corun.report.recover import recover

        runs = list(sweep_page.run_directories(run)) if sweep_page.is_sweep(run) else [run]
        if not run.is_dir():
            raise InputError(f"{run} is not there; runs are in result/")
        for sentence in (sentence for path in runs for sentence in recover(path)):
            print(sentence, file=sys.stderr)
        if as_csv:
            sys.stdout.write(export.summary_csv(runs, run))
        if as_json:
            print(json.dumps(export.summary_json(runs, run)))
        if parquet:
            _tell((file for path in runs for file in export.parquet(path)), as_csv or as_json)
        if trace:
            from corun.report.trace import write_trace

            _tell((write_trace(path) for path in runs), as_csv or as_json)
        if not (as_csv or as_json or parquet or trace):
            _pages(run, runs, cells)


def _pages(run: Path, runs: list[Path], cells: bool) -> None:
    from corun.report import page, sweep_page

    if runs == [run]:
        _tell([page.write(run)])
        return
    if cells:
        _tell(page.write(path) for path in runs)
    _tell([sweep_page.write(run)])


def _tell(files: Iterable[Path], aside: bool = False) -> None:
    """Name every file as it is written; on stderr when stdout carries data."""
    for file in files:
        print(file, file=sys.stderr if aside else sys.stdout, flush=True)


@app.command()
def compare(
    baseline: Annotated[Path, typer.Argument(help="a run, or a directory of runs")],
    candidate: Annotated[Path, typer.Argument(help="what is compared with it")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout instead of tables")] = False,
    margin: Annotated[
        float, typer.Option(min=0.001, max=0.9, help="a difference below this does not matter, 0.05 = 5 %")
    ] = 0.05,
) -> None:
    """Say whether CANDIDATE is slower, faster, alike, or whether these runs cannot tell; the repeat is the unit."""
    with guard():
        from rich.console import Console

        from corun.report import compare as comparing
        from corun.report.compare_console import show

        result = comparing.compare(baseline, candidate, margin)
        if as_json:
            print(json.dumps(comparing.as_json(result)))
        else:
            show(result, Console())


if __name__ == "__main__":
    app()
