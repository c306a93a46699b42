"""The page of a sweep: its cells with their figures and doubts, and who slows whom across them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from corun.errors import InputError
from corun.report import html, interference
from corun.report.html import Drawn, Link, drawn
from corun.report.page import footer, label, save_images, short_label
from corun.report.summary import Summary, summarise
from corun.report.validity import Flag, check
from corun.run.directory import read_manifest

INDEX = "index.csv"


@dataclass(frozen=True)
class Cell:
    """One run directory of a sweep."""

    summary: Summary
    flags: list[Flag]

    @property
    def path(self) -> Path:
        return self.summary.run

    @property
    def status(self) -> str:
        return str(self.summary.manifest.get("status", "unknown"))


def is_sweep(path: Path) -> bool:
    """True for a directory that is no run itself and has run directories in it."""
    return not (path / "manifest.json").exists() and any(True for _ in run_directories(path))


def run_directories(path: Path) -> Iterator[Path]:
    """The run directories of a sweep, those its index names first and in its order."""
    inside = {folder.parent.name: folder.parent for folder in sorted(path.glob("*/manifest.json"))}
    named = [row["cell"] for row in _index(path)]
    yield from (inside.pop(name) for name in named if name in inside)
    yield from inside.values()


def _index(path: Path) -> list[dict[str, str]]:
    try:
        with open(path / INDEX, newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if row.get("cell")]
    except OSError:
        return []


def cells(path: Path) -> list[Cell]:
    """Read every run directory of a sweep; InputError when there is none."""
    found = []
    for folder in run_directories(path):
        summary = summarise(folder)
        found.append(Cell(summary, check(summary)))
    if not found:
        raise InputError(
            f"{path} is neither a run directory nor a sweep: it has no manifest.json, nor has any folder in it"
        )
    return found


def write(path: Path) -> Path:
    """Write report.html and report/*.png of a sweep; returns the page's path."""
    found = cells(path)
    figures = [drawn(exhibit) for exhibit in interference.exhibits([cell.summary for cell in found])]
    page = path / "report.html"
    page.write_text(render(path, found, figures), encoding="utf-8")
    save_images(figures, path / "report")
    return page


def render(path: Path, found: list[Cell], figures: list[Drawn]) -> str:
    """The page as HTML."""
    links = [("cells", "Cells"), *((figure.exhibit.key, figure.exhibit.title) for figure in figures)]
    parts = [
        _doubts(found),
        html.section("cells", "Cells", _table(path, found) + _failures(path, found)),
        *(html.figure(figure) for figure in figures),
    ]
    complete = sum(cell.status == "complete" for cell in found)
    head = (
        f"<h1>{escape(path.name)}</h1>\n"
        f'<p class="meta">{len(found)} cells measured, {complete} of them complete</p>\n{html.navigation(links)}'
    )
    return html.document(f"Sweep {path.name}", head, "\n".join(parts), footer())


def _doubts(found: list[Cell]) -> str:
    doubtful = [cell for cell in found if cell.flags]
    if not doubtful:
        return '<p class="sound">✓ Every validity check passed in every cell.</p>'
    items = "".join(
        f"<li>{escape(label(cell.summary.manifest))}: {escape(cell.flags[0].sentence)}"
        f"{f' (and {len(cell.flags) - 1} more)' if len(cell.flags) > 1 else ''}</li>"
        for cell in doubtful
    )
    head = f"{len(doubtful)} of {len(found)} cells give reason for doubt"
    body = f"<ul>{items}</ul>" if len(doubtful) <= 5 else html.folded("Show them", f"<ul>{items}</ul>")
    return f'<aside class="doubt" aria-label="Validity">\n<h2>{head}</h2>\n{body}\n</aside>'


def _table(path: Path, found: list[Cell]) -> str:
    columns = (
        "cell",
        "service",
        "p99 alone",
        "p99 corun",
        "p50 alone",
        "p50 corun",
        "training kept",
        "doubts",
        "status",
    )
    rows = [row for cell in found for row in _rows(cell)]
    data = html.folded("Save the table", _saved(found))
    note = html.paragraph(
        "Latencies in ms from the intended send time; the name leads to the cell's own page.", "caption"
    )
    return html.table(columns, rows, f"Cells of {path.name}") + note + data


def _rows(cell: Cell) -> Iterator[tuple[Any, ...]]:
    summary = cell.summary
    first: Any = short_label(summary.manifest)
    if (cell.path / "report.html").exists():
        first = Link(first, f"{cell.path.name}/report.html")
    kept = summary.ratios.get("train_x")
    last = (f"×{kept:.2f}" if kept is not None else None, len(cell.flags), cell.status)
    sides = [{row["service"]: row for row in summary.pooled(arm, "server")} for arm in ("alone", "corun")]
    services = dict.fromkeys([*sides[0], *sides[1]])
    for service in services or [None]:
        figures = [side.get(service, {}).get(name) for name in ("p99_ms", "p50_ms") for side in sides]
        yield (first, service, *figures, *last)


def _saved(found: list[Cell]) -> str:
    """summary.csv of all cells in one file, the cell's name in front."""
    lines: list[str] = []
    for cell in found:
        head, *rows = (cell.path / "summary.csv").read_text(encoding="utf-8").splitlines()
        lines += [f"cell,{head}"] * (not lines) + [f"{cell.path.name},{row}" for row in rows]
    return html.download("sweep.csv", "\n".join(lines) + "\n", "text/csv")


def _failures(path: Path, found: list[Cell]) -> str:
    """Cells that did not complete, with the reason the index or the manifest gives."""
    reasons = {row["cell"]: row.get("reason") or "" for row in _index(path)}
    items = []
    for cell in found:
        if cell.status != "complete":
            why = reasons.get(cell.path.name) or "; ".join(read_manifest(cell.path).get("faults", [])) or cell.status
            items.append(f"<li>{escape(label(cell.summary.manifest))}: {escape(why)}</li>")
    return f"<h3>Not complete</h3><ul>{''.join(items)}</ul>" if items else ""
