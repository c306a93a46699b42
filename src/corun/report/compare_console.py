"""The comparison of two sets of runs as a person reads it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from corun.report.compare import Line, Result, chance
from corun.report.exhibit import shown
from corun.stats.compare import Verdict

STYLES = {Verdict.SLOWER: "red", Verdict.FASTER: "green", Verdict.NO_DIFFERENCE: "", Verdict.CANNOT_TELL: "yellow"}
MOST_DIFFERENCES = 12


def show(result: Result, console: Console) -> None:
    """One table per cell, then everything that tempers what it says."""
    console.print(f"baseline  {result.baseline.path}", highlight=False, soft_wrap=True)
    console.print(f"candidate {result.candidate.path}", highlight=False, soft_wrap=True)
    for cell in dict.fromkeys(line.cell for line in result.lines):
        console.print(_table(cell, [line for line in result.lines if line.cell == cell]))
    console.print(
        f"ratio = candidate / baseline with its 95 % interval; a difference within {result.margin:.0%} does not matter; "
        "smallest = the smallest difference these runs would have shown in 4 of 5 tries",
        highlight=False,
    )
    for note in result.notes:
        console.print(f"[yellow]note:[/] {note}", highlight=False)
    for cell in result.unmatched:
        console.print(f"[yellow]only on one side:[/] {cell}", highlight=False)
    for name, side in (("baseline", result.baseline), ("candidate", result.candidate)):
        if side.doubts:
            count = f"{side.doubts} reason{'s' * (side.doubts > 1)} for doubt"
            console.print(f"[yellow]{name}:[/] {count}; its report names them", highlight=False)
    _differences(result, console)


def _table(cell: str, lines: list[Line]) -> Table:
    first = lines[0].result
    several = "s" * (max(first.baseline_runs, first.candidate_runs) > 1)
    units = f"{first.baseline_runs} against {first.candidate_runs} repeat{several}{', paired' * lines[0].paired}"
    table = Table(title=f"{cell}: {units}", title_justify="left")
    for name in ("arm", "who", "figure"):
        table.add_column(name)
    for name in ("baseline", "candidate", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    table.add_column("smallest", justify="right")
    previous = None
    for line in lines:
        if previous and (previous.arm, previous.who) != (line.arm, line.who):
            table.add_section()
        table.add_row(*_cells(line))
        previous = line
    return table


def _cells(line: Line) -> list[str]:
    result = line.result
    style = STYLES[result.verdict]
    words = f"{result.verdict}{' (negligible)' if result.negligible else ''}{' †' if chance(line) else ''}"
    return [
        line.arm,
        line.who,
        f"{line.figure}, {line.unit}",
        shown(line.baseline) or "n/a",
        shown(line.candidate) or "n/a",
        _ratio(line),
        f"[{style}]{words}[/]" if style else words,
        f"{result.detectable:.1%}" if result.detectable is not None else "",
    ]


def _ratio(line: Line) -> str:
    ratio = line.result.ratio
    if ratio is not None:
        return f"×{ratio.point:.3f} \\[{ratio.low:.3f}, {ratio.high:.3f}]"
    return f"×{line.candidate / line.baseline:.3f}" if line.baseline and line.candidate else "n/a"


def _differences(result: Result, console: Console) -> None:
    for key, before, after in result.differences[:MOST_DIFFERENCES]:
        console.print(f"[dim]differs:[/] {key}: {_value(before)} | {_value(after)}", highlight=False, soft_wrap=True)
    more = len(result.differences) - MOST_DIFFERENCES
    if more > 0:
        console.print(f"[dim]and {more} more keys of the manifest differ (--json lists them)[/]", highlight=False)


def _value(value: Any) -> str:
    return "not set" if value is None else str(value).replace("[", "\\[")
