"""A sweep: many cells, each in a directory named by the hash of what it measures, resumable and never fatal.

    result/<sweep>/index.csv                one row per cell, rewritten after every cell
    result/<sweep>/<12 hex of the cell>/    a run directory

A cell is done exactly when its manifest says complete; anything else is measured again. Sweep and cell names
depend only on the resolved configuration, so starting the same command again goes on where it stopped.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from corun.errors import CorunError, InputError
from corun.run.config import digest
from corun.run.directory import RunDirectory, read_manifest

INDEX_COLUMNS = ("cell", "label", "status", "reason", "seconds")


class Cell(Protocol):
    """One measurement of a sweep."""

    @property
    def label(self) -> str: ...

    @property
    def expected_s(self) -> float:
        """Expected wall time in seconds."""

    def resolved(self) -> dict[str, Any]:
        """Everything that determines the measurement, as JSON values."""


@dataclass(frozen=True)
class CellResult:
    """How one cell ended; figures are extra columns of the index."""

    status: str
    reasons: tuple[str, ...] = ()
    figures: Mapping[str, Any] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Row:
    """One row of the index."""

    cell: str
    label: str
    result: CellResult


def cell_name(cell: Cell) -> str:
    """Directory of a cell: 12 hex digits of its resolved configuration."""
    return digest(cell.resolved())[:12]


def sweep_name(cells: Sequence[Cell]) -> str:
    """Directory of a sweep: depends on the cells and nothing else."""
    return f"sweep-{digest([cell.resolved() for cell in cells])[:8]}"


def is_done(path: Path) -> bool:
    """True when the run directory's manifest says complete."""
    try:
        return read_manifest(path).get("status") == "complete"
    except InputError:
        return False


def run_sweep(
    cells: Sequence[Cell],
    root: Path,
    measure: Callable[[Cell, RunDirectory], CellResult],
    say: Callable[[str], None],
    stopped: Callable[[], bool],
    fresh: bool = False,
    fail_fast: bool = False,
) -> list[Row]:
    """Measure every cell that is not done yet; a failed cell is a row with its reason and the sweep goes on."""
    root.mkdir(parents=True, exist_ok=True)
    known = _read_index(root)
    rows: list[Row] = []
    for number, cell in enumerate(cells, 1):
        name = cell_name(cell)
        path = root / name
        if not fresh and is_done(path):
            rows.append(known.get(name) or Row(name, cell.label, CellResult("complete")))
            say(f"[{number}/{len(cells)}] {cell.label}: done before")
            continue
        if stopped():
            break
        say(f"[{number}/{len(cells)}] {cell.label}")
        rows.append(Row(name, cell.label, _measure(cell, path, measure)))
        _write_index(root, [*rows, *_others(known, rows)])
        if fail_fast and rows[-1].result.status != "complete":
            break
    _write_index(root, [*rows, *_others(known, rows)])
    return rows


def _measure(cell: Cell, path: Path, measure: Callable[[Cell, RunDirectory], CellResult]) -> CellResult:
    if path.exists():
        shutil.rmtree(path)
    try:
        run = RunDirectory.create(path, cell.resolved(), digest(cell.resolved()))
        return measure(cell, run)
    except CorunError as error:
        return CellResult("failed", (str(error),))


def _others(known: dict[str, Row], rows: list[Row]) -> list[Row]:
    """Rows of an earlier start that this one has not reached yet."""
    seen = {row.cell for row in rows}
    return [row for name, row in known.items() if name not in seen]


def _read_index(root: Path) -> dict[str, Row]:
    path = root / "index.csv"
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {row["cell"]: _row(row) for row in csv.DictReader(file)}


def _row(cells: dict[str, str]) -> Row:
    figures = {name: value for name, value in cells.items() if name not in INDEX_COLUMNS}
    reasons = (cells["reason"],) if cells["reason"] else ()
    return Row(
        cells["cell"],
        cells["label"],
        CellResult(cells["status"], reasons, figures, float(cells["seconds"] or 0)),
    )


def _write_index(root: Path, rows: Sequence[Row]) -> None:
    figures = {name: None for row in rows for name in row.result.figures or {}}
    temporary = root / "index.csv.part"
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*INDEX_COLUMNS, *figures))
        for row in rows:
            result = row.result
            reason = "; ".join(result.reasons).replace("\n", " ")
            values = (dict(result.figures or {}).get(name) for name in figures)
            writer.writerow((row.cell, row.label, result.status, reason, round(result.seconds, 1), *values))
    os.replace(temporary, root / "index.csv")
