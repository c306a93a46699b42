"""The page of one run: what to doubt, the figures in large, the tables, the plots, and how it was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from corun.report import html, slowdown, speed, stages, tail, timeline
from corun.report.exhibit import Exhibit, shown
from corun.report.html import Drawn, drawn
from corun.report.summary import Row, Summary, summarise
from corun.report.validity import Flag, check
from corun.run.read import Run, read
from corun.stats.percentiles import PERCENTILES, sample_floor

Manifest = dict[str, Any]
Words = tuple[Any, ...]

LATENCIES = ("p50_ms", "p90_ms", "p95_ms", "p99_ms")


@dataclass(frozen=True)
class Report:
    """Everything the page of one run shows."""

    run: Run
    summary: Summary
    flags: list[Flag]
    figures: list[Drawn]


def write(path: Path) -> Path:
    """Write report.html, report/*.png, summary and validity of a run directory; returns the page's path."""
    report = make(path)
    page = path / "report.html"
    page.write_text(render(report), encoding="utf-8")
    save_images(report.figures, path / "report")
    return page


def make(path: Path) -> Report:
    """Read a run directory and draw its figures."""
    run, summary = read(path), summarise(path)
    return Report(run, summary, check(summary), [drawn(exhibit) for exhibit in exhibits(run, summary)])


def exhibits(run: Run, summary: Summary) -> list[Exhibit]:
    """The figures of a run in the order of the page."""
    return [
        timeline.exhibit(run),
        tail.exhibit(run),
        slowdown.exhibit(run, summary),
        stages.exhibit(run),
        speed.exhibit(summary),
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
    parts = [
        html.section("latency", "Latency", _latency(report.summary)),
        html.section("training-table", "Training", _training(report.summary)),
        *(html.figure(figure) for figure in report.figures),
        html.section("measured", "How it was measured", _measured(report.run)),
    ]
    links = [("latency", "Latency"), ("training-table", "Training")]
    links += [(figure.exhibit.key, figure.exhibit.title) for figure in report.figures]
    links += [("measured", "How it was measured")]
    header = "\n".join([_head(report.run), html.navigation(links)])
    return html.document(title, header, "\n".join([doubts(report.flags), _cards(report), *parts]), footer())


def label(manifest: Manifest) -> str:
    """What ran beside what, in words."""
    config = manifest.get("config") or {}
    services = ", ".join(str(service["name"]) for service in config.get("services", []))
    job = config.get("train")
    trainer = f"training {job['arch']} (batch {job['batch_size']})" if job else config.get("beside") or ""
    return " beside ".join(part for part in (services, trainer) if part) or "an empty run"


def short_label(manifest: Manifest) -> str:
    """The same for a table's cell: `resnet18, yolov5n + resnet50_16`."""
    config = manifest.get("config") or {}
    services = ", ".join(str(service["name"]) for service in config.get("services", []))
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


# The large figures


def _cards(report: Report) -> str:
    cards = [*_service_cards(report.summary), *_training_card(report.summary)]
    items = "".join(
        f'<li><span class="who">{escape(who)}</span><span class="figure">{escape(value)}</span>'
        f'<span class="how">{escape(how)}</span></li>'
        for who, value, how in cards
    )
    return f'<ul class="cards" aria-label="In short">{items}</ul>' if items else ""


def _service_cards(summary: Summary) -> Iterator[tuple[str, str, str]]:
    alone = {row["service"]: row for row in summary.pooled("alone", "server")}
    corun = {row["service"]: row for row in summary.pooled("corun", "server")}
    for service in dict.fromkeys([*alone, *corun]):
        rows = [side[service] for side in (alone, corun) if service in side]
        known = [name for name in reversed(LATENCIES) if all(row[name] is not None for row in rows)]
        if not known:
            yield service, "n/a", f"{sum(row['ok'] for row in rows)} answers are too few for a percentile"
            continue
        name, words = known[0], known[0].removesuffix("_ms")
        if len(rows) == 2:
            before, after = rows[0][name], rows[1][name]
            how = f"{words} beside training, {shown(before)} → {shown(after)} ms".replace(" → ", "\u00a0→\u00a0")
            yield service, f"×{after / before:.2f}", how
        else:
            yield service, f"{shown(rows[0][name])} ms", f"{words} ({rows[0]['arm']})"


def _training_card(summary: Summary) -> Iterator[tuple[str, str, str]]:
    rows = {arm: summary.pooled(arm, "trainer") for arm in ("train", "corun")}
    speeds = {arm: found[0]["train_samples_per_s"] for arm, found in rows.items() if found}
    name = f"training {next((found[0]['service'] for found in rows.values() if found), '')}"
    if speeds.get("train") and speeds.get("corun") is not None:
        how = f"of its own speed, {shown(speeds['train'])}\u00a0→\u00a0{shown(speeds['corun'])} samples/s"
        yield name, f"{speeds['corun'] / speeds['train']:.0%}", how
    else:
        for arm, value in speeds.items():
            if value is not None:
                yield name, shown(value), f"samples/s ({arm})"


# Tables


def _latency(summary: Summary) -> str:
    if not any(row["role"] == "server" for row in summary.rows):
        return html.paragraph("No request was measured: no service was part of a complete window.")
    columns = ("service", "arm", "p50", "p90", "p95", "p99", "max", "response p99", "slip p99", "requests", "not OK")
    rows, strong = _latency_rows(summary)
    note = (
        "Milliseconds from the intended send time to the reply (sojourn); response counts from the actual send. "
        f"Percentiles are exact, over answers with status OK. {floors()} “n/a”: there were fewer."
    )
    return html.table((*columns, "sent/s"), rows, "Latency by service and arm", strong=strong) + html.paragraph(
        note, "caption"
    )


def _latency_rows(summary: Summary) -> tuple[list[Words], list[int]]:
    rows: list[Words] = []
    strong: list[int] = []
    for service in dict.fromkeys(row["service"] for row in summary.rows if row["role"] == "server"):
        for arm in ("alone", "corun"):
            mine = (row for row in summary.pooled(arm, "server") if row["service"] == service)
            rows += [(service, arm, *_cells(row)) for row in mine]
        ratios = summary.ratios.get("services", {}).get(service)
        if ratios:
            strong.append(len(rows))
            factors = [_times(ratios.get(f"{name}_x")) for name in ("p50", "p90", "p95", "p99", "max", "sent_rate")]
            rows.append((None, "corun / alone", *factors[:5], None, None, None, None, factors[5]))
    return rows, strong


def _cells(row: Row) -> Words:
    latencies = (_or_na(row[name]) for name in (*LATENCIES, "max_ms", "response_p99_ms", "slip_p99_ms"))
    return *latencies, row["requests"], row["errors"], row["sent_rate"]


def _or_na(value: float | None) -> float | str:
    return "n/a" if value is None else value


def _times(value: float | None) -> str:
    return "n/a" if value is None else f"×{value:.2f}"


def _training(summary: Summary) -> str:
    rows: list[Words] = []
    for arm in ("train", "corun"):
        for row in summary.pooled(arm, "trainer"):
            loss = tuple(_or_na(row[name]) for name in ("loss_first", "loss_last"))
            rows.append((row["service"], arm, row["train_steps"], _or_na(row["train_samples_per_s"]), *loss))
    if not rows:
        return html.paragraph("No training was measured in this run.")
    strong = []
    if summary.ratios.get("train_x") is not None:
        strong.append(len(rows))
        rows.append((rows[0][0], "corun / train", None, _times(summary.ratios["train_x"]), None, None))
    columns = ("job", "arm", "steps", "samples/s", "loss, first tenth", "loss, last tenth")
    return html.table(columns, rows, "Training by arm", strong=strong)


def floors() -> str:
    """The sample counts below which a percentile is not quoted, as a sentence."""
    needed = ", ".join(f"p{percentile:g} from {sample_floor(percentile):,}" for percentile in PERCENTILES)
    return f"A percentile needs enough answers: {needed}."


# How it was measured


def _measured(run: Run) -> str:
    manifest = run.manifest
    config = manifest.get("config") or {}
    parts = [
        html.facts(_run_facts(run)),
        "<h3>Services</h3>" + _services(manifest),
        "<h3>Training</h3>" + _job(manifest),
        "<h3>Machine</h3>" + html.facts(_named(manifest.get("hardware") or {})),
        "<h3>Versions</h3>" + html.facts(_named(manifest.get("versions") or {})),
        html.folded("Configuration in force", html.preformatted(json.dumps(config, indent=1))),
        html.folded(
            "Whole manifest",
            html.download("manifest.json", json.dumps(manifest, indent=1), "application/json")
            + html.preformatted(json.dumps(manifest, indent=1)),
        ),
    ]
    return "\n".join(parts)


def _run_facts(run: Run) -> Iterator[tuple[str, Any]]:
    manifest = run.manifest
    config, git = manifest.get("config") or {}, manifest.get("git") or {}
    sharing = manifest.get("sharing") or {}
    yield "run", manifest.get("run")
    yield "status", manifest.get("status")
    yield "started", manifest.get("started")
    yield "finished", manifest.get("finished")
    yield "command", " ".join(str(word) for word in manifest.get("argv", []))
    yield "sharing policy", _policy(sharing)
    yield "arms", ", ".join(config.get("arms", []))
    yield "repeats", config.get("repeat")
    yield "seed", config.get("seed")
    yield "schedule", f"sha256 {manifest['schedule_sha256']}" if manifest.get("schedule_sha256") else None
    yield "threads", ", ".join(f"{who} {count}" for who, count in (manifest.get("threads") or {}).items())
    yield "clients wait by", _senders(manifest)
    if git.get("commit"):
        yield "code", f"{git['commit'][:12]}{', with local changes' if git.get('dirty') else ''}"


def _policy(sharing: dict[str, Any]) -> str | None:
    rest = ", ".join(f"{name} {value}" for name, value in sharing.items() if name != "policy")
    policy = sharing.get("policy")
    return f"{policy} ({rest})" if policy and rest else policy


def _services(manifest: Manifest) -> str:
    rows = [
        (
            entry.get("name"),
            entry.get("arch"),
            weights(manifest, "server", str(entry.get("name"))),
            _hello(manifest, "server", str(entry.get("name"))).get("device") or entry.get("device"),
            entry.get("precision"),
            entry.get("rate"),
            _process(entry),
            f"{entry.get('policy')}, batch {entry.get('max_batch')}, limit {entry.get('queue_limit')}",
            entry.get("threads"),
        )
        for entry in (manifest.get("config") or {}).get("services", [])
    ]
    columns = ("service", "model", "weights", "device", "precision", "rate/s", "arrivals", "queue", "threads")
    if not rows:
        return html.paragraph("No service was part of this run.")
    random = any(row[2] == "random" for row in rows)
    note = html.paragraph("With random weights the timings hold and the answers mean nothing.", "caption")
    return html.table(columns, rows, "Services") + note * random


def _process(entry: dict[str, Any]) -> str:
    process = entry.get("process")
    return f"{entry.get('mode')} loop, {process if isinstance(process, str) else json.dumps(process)}"


def _job(manifest: Manifest) -> str:
    job = (manifest.get("config") or {}).get("train")
    if not job:
        return html.paragraph("No training job was part of this run.")
    named = {name: value for name, value in job.items() if value not in (None, False, {}, 0)}
    label = f"{job['arch']}_{job['batch_size']}"
    return html.facts([("weights", weights(manifest, "trainer", label)), *_named(named)])


def weights(manifest: Manifest, role: str, name: str) -> str | None:
    """The label of the weights a process used: random, default, or the file's digest."""
    hello = _hello(manifest, role, name)
    return hello.get("weights_label") or (hello.get("info") or {}).get("weights")


def _hello(manifest: Manifest, role: str, name: str) -> dict[str, Any]:
    """What a process said about itself when it was ready."""
    processes = manifest.get("processes", [])
    found = [process for process in processes if process.get("role") == role and process.get("name") == name]
    return (found[0].get("hello") or {}) if found else {}


def _senders(manifest: Manifest) -> str:
    """How the clients waited for their due times, each way once."""
    timings = [
        (process.get("hello") or {}).get("timing")
        for process in manifest.get("processes", [])
        if process.get("role") == "client"
    ]
    said = (f"{timing['rung']}, scheduled {timing['policy']}" for timing in timings if timing and "rung" in timing)
    return "; ".join(dict.fromkeys(said))


def _named(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        yield name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


def footer() -> str:
    """What the words mean."""
    return html.paragraph(
        "alone: services without training. train: training without load. corun: both. Latency is the sojourn, from the "
        "intended send time, so a stalled client cannot hide a slow answer. An empty cell or n/a was not measured or "
        "rests on too few samples; it is never zero. The page is one file and loads nothing."
    )
