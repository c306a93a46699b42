"""The page of one run: what to doubt, the figures in large, the tables, the plots, and how it was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from corun.report import (
    accuracy_figure,
    attribution,
    html,
    measured,
    numbers,
    slowdown,
    speed,
    stages,
    tail,
    timeline,
)
from corun.report.exhibit import Exhibit
from corun.report.html import Drawn, drawn
from corun.report.loops import LoopSummary, summarise_loops
from corun.report.slowdown import Slowdown
from corun.report.summary import Row, Summary, summarise
from corun.report.validity import Flag, check
from corun.run.read import Run, read

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """Everything the page of one run shows; usage: the rows of attribution.csv; loops: of a run of inference loops."""

    run: Run
    summary: Summary
    flags: list[Flag]
    figures: list[Drawn]
    usage: list[Row] = field(default_factory=list)
    loops: LoopSummary | None = None


def write(path: Path) -> Path:
    """Write report.html, report/*.png, summary, attribution and validity of a run directory; returns the page's path."""
    report = make(path)
    page = path / "report.html"
    page.write_text(render(report), encoding="utf-8")
    save_images(report.figures, path / "report")
    return page


def make(path: Path) -> Report:
    """Read a run directory and draw its figures."""
    run, summary = read(path), summarise(path)
    usage, flags = attribution.write(path), check(summary)
    loops = summarise_loops(path) if (run.manifest.get("config") or {}).get("loops") else None
    return Report(run, summary, flags, [drawn(exhibit) for exhibit in exhibits(run, summary)], usage, loops)


def exhibits(run: Run, summary: Summary) -> list[Exhibit]:
    """The figures of a run in the order of the page."""
    return [
        timeline.exhibit(run),
        tail.exhibit(run),
        slowdown.exhibit(run, summary),
        stages.exhibit(run),
        speed.exhibit(summary),
        *accuracy_figure.exhibits(run),
    ]


def save_images(figures: list[Drawn], folder: Path) -> None:
    """Every rendering as a file, the light wide one under the figure's own name; those of an old page are removed."""
    for old in folder.glob("*.png"):
        old.unlink()
    for figure in figures:
        for look, image in figure.images.items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{figure.exhibit.key}{'' if look == 'light' else '-' + look}.png").write_bytes(image)


def render(report: Report) -> str:
    """The page as HTML."""
    manifest = report.run.manifest
    title = f"{label(manifest)} · {manifest.get('run', report.run.path.name)}"
    tables = [
        ("training-table", "Training", numbers.training(report.summary)),
        ("usage", "Use of the machine", numbers.usage(report.usage)),
    ]
    if report.loops:
        tables.insert(0, ("loops", "Inference loops", numbers.loops(report.loops)))
    else:
        tables.insert(0, ("latency", "Latency", numbers.latency(report.summary) + numbers.tokens(report.summary)))
    how = ("measured", "How it was measured", measured.measured(report.run))
    figures = [(figure.exhibit.key, figure.exhibit.title) for figure in report.figures]
    links = [
        *((key, name) for key, name, _ in tables[:2]),
        *figures,
        *((key, name) for key, name, _ in (tables[2], how)),
    ]
    parts = [
        doubts(report.flags),
        numbers.cards(report.summary, _intervals(report)),
        *(html.section(*table) for table in tables[:2]),
        *(html.figure(figure) for figure in report.figures),
        html.section(*tables[2]),
        html.section(*how),
    ]
    header = "\n".join([_head(report.run), html.navigation(links)])
    return html.document(title, header, "\n".join(parts), footer())


def _intervals(report: Report) -> dict[tuple[str, str], Slowdown]:
    """Slowdowns whose interval rests on repeats; with one repeat there are none worth a headline."""
    if max((window.repeat for window in report.run.windows), default=0) == 0:
        return {}
    return {(row.service, row.name): row for row in slowdown.make(report.run, report.summary) if row.low is not None}


def label(manifest: Manifest) -> str:
    """What ran beside what, in words."""
    config = manifest.get("config") or {}
    services = ", ".join(str(entry["name"]) for entry in config.get("services") or config.get("loops") or [])
    job = config.get("train")
    trainer = f"training {job['arch']} (batch {job['batch_size']})" if job else config.get("beside") or ""
    return " beside ".join(part for part in (services, trainer) if part) or "an empty run"


def short_label(manifest: Manifest) -> str:
    """The same for a table's cell: `resnet18, yolov5n + resnet50_16`."""
    config = manifest.get("config") or {}
    services = ", ".join(str(entry["name"]) for entry in config.get("services") or config.get("loops") or [])
    job = config.get("train")
    trainer = f"{job['arch']}_{job['batch_size']}" if job else config.get("beside") or ""
    return " + ".join(part for part in (services, trainer) if part)


def _head(run: Run) -> str:
    manifest = run.manifest
    status = str(manifest.get("status", "unknown"))
    known = status if status in ("complete", "failed", "interrupted", "running") else "failed"
    told = {"running": "not finished: killed, or still running"}.get(status, status)
    parts = [str(manifest.get("run", run.path.name)), *_when(manifest), _shape(run)]
    meta = " · ".join(escape(part) for part in parts if part)
    return (
        f"<h1>{escape(label(manifest))}</h1>\n"
        f'<p class="meta"><span class="status {known}">{escape(told)}</span> · {meta}</p>'
    )


def _when(manifest: Manifest) -> list[str]:
    try:
        started = datetime.fromisoformat(str(manifest.get("started")))
    except ValueError:
        return []
    return [f"{started:%Y-%m-%d %H:%M}"]


def _shape(run: Run) -> str:
    repeats = len({window.repeat for window in run.windows})
    windows = f"{len(run.windows)} window{'s' * (len(run.windows) != 1)}"
    return f"{windows}, {repeats} repeat{'s' * (repeats != 1)}, {sum(w.seconds for w in run.windows):.0f} s measured"


def doubts(flags: list[Flag]) -> str:
    """Why the numbers may not be trusted, above all of them."""
    if not flags:
        return '<p class="sound">✓ Every validity check passed.</p>'
    kinds: dict[str, list[str]] = {}
    for flag in flags:
        kinds.setdefault(flag.check, []).append(flag.sentence)
    items = "".join(_doubt(*sentences) for sentences in kinds.values())
    head = "One reason to doubt these numbers" if len(flags) == 1 else f"{len(flags)} reasons to doubt these numbers"
    return f'<aside class="doubt" aria-label="Validity">\n<h2>{head}</h2>\n<ul>{items}</ul>\n</aside>'


def _doubt(first: str, *more: str) -> str:
    """One kind of doubt: its first sentence, and the same about others folded away when there are many."""
    if len(more) <= 1:
        return "".join(f"<li>{escape(sentence)}</li>" for sentence in (first, *more))
    inside = "".join(f"<li>{escape(sentence)}</li>" for sentence in more)
    return f"<li>{escape(first)}{html.folded(f'{len(more)} more of this kind', f'<ul>{inside}</ul>')}</li>"


def footer() -> str:
    """What the words mean."""
    return html.paragraph(
        "alone: services without training. train: training without load. corun: both. Latency is the sojourn, from the "
        "intended send time, so a stalled client cannot hide a slow answer. An empty cell or n/a was not measured or "
        "rests on too few samples; it is never zero. The page is one file and loads nothing."
    )
