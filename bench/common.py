"""What every benchmark does with its figures: keep them with the machine they came from, print them last."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from corun.errors import InputError
from corun.registry import home
from corun.run.directory import git_state, hardware, versions, write_json

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores, kernel, library versions and load: what a figure is worth nothing without."""
    return {**hardware(), "versions": versions(), "load_average": [round(load, 2) for load in os.getloadavg()]}


def store(name: str, figures: Mapping[str, Any], details: Mapping[str, Any] | None = None) -> Path:
    """Write bench/results/<name>.json: figures as printed, details behind them, date, command and machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    module = sys.modules["__main__"].__spec__
    write_json(
        path,
        {
            "name": name,
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": " ".join(["python -m", module.name if module else name, *sys.argv[1:]]),
            "figures": dict(figures),
            "details": dict(details or {}),
            "machine": machine(),
            "git": git_state(home()),
        },
    )
    return path


def last_line(figures: Mapping[str, Any]) -> None:
    """The figures as one JSON object, the last line of every benchmark's output."""
    print(json.dumps(figures), flush=True)


def fill(page: Path, name: str, text: str) -> None:
    """Put generated text between `<!-- begin name -->` and `<!-- end name -->` of a page, all else untouched.

    Raises InputError when the page lacks the marks: a table nobody can find would be lost silently.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    head, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise InputError(f"{page} has no place for the table: it needs the lines {begin} and {end}")
    page.write_text(f"{head}{begin}\n{text.strip()}\n{end}{tail}", encoding="utf-8")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; None is an empty cell, floats have two digits behind the point."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(cell(value) for value in row) + " |" for row in rows)])
