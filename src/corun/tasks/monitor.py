"""What is going on, for people: a table for a terminal, a snapshot for the web page, a report per task.

Everything is read from the store and from the supervisor's directory, so it can be watched by any process of the same
user, while it runs and afterwards. Reports are written by the supervisor as it ends.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from corun.errors import InputError
from corun.tasks.store import Event, Store

__all__ = ["history", "log_names", "log_tail", "report", "snapshot", "table", "watch"]

STALE_S = 5.0
WATCH_S = 1.0
TAIL_BYTES = 64 << 10
ROW_BYTES = 256
EVENTS = 12


def snapshot(store: Store, now_s: float | None = None, events: int = EVENTS) -> dict[str, Any]:
    """The live state as the supervisor last wrote it, with the last events.

    stale: it should have been written since, so the supervisor hangs or was killed.
    """
    live = store.state("live") or {"up": False, "tasks": [], "t_s": 0.0, "directory": ""}
    age_s = (time.time() if now_s is None else now_s) - live["t_s"]
    known = {task["id"] for task in live["tasks"]}
    idle = [
        {"id": task.id, "description": task.description, "kind": task.kind, "priority": task.priority}
        for task in store.all()
        if task.id not in known
    ]
    shown = [
        {"t_s": event.t_s, "task": event.task_id, "kind": event.kind, "detail": event.detail}
        for event in store.events(None, events)
    ]
    return {**live, "stale": bool(live["up"] and age_s > STALE_S), "idle": idle, "events": shown}


def history(directory: Path, task_id: str, last: int = 150) -> list[dict[str, float | None]]:
    """The last rows of a task's table, oldest first; empty cells are None."""
    path = directory / f"{task_id}.csv"
    try:
        with open(path, "rb") as file:
            header = file.readline().decode()
            size = file.seek(0, os.SEEK_END)
            file.seek(max(len(header), size - last * ROW_BYTES))
            text = file.read().decode()
    except OSError:
        return []
    lines = text.splitlines() if size - last * ROW_BYTES <= len(header) else text.splitlines()[1:]
    rows = csv.DictReader([header, *lines])
    return [{name: _number(cell) for name, cell in row.items() if name} for row in list(rows)[-last:]]


def _number(cell: str | None) -> float | None:
    try:
        return float(cell) if cell else None
    except ValueError:
        return None


def log_names(directory: Path, task_id: str) -> list[str]:
    """Logs of one task: its own, the router's, one per replica."""
    own = [f"{task_id}.log", f"{task_id}-router.log"]
    replicas = [f"{task_id}-{index}.log" for index in range(64)]
    return [name for name in [*own, *replicas] if (directory / name).is_file()]


def log_tail(directory: Path, task_id: str, name: str, lines: int = 200) -> str:
    """The last lines of one of a task's logs; InputError for any other file."""
    known = log_names(directory, task_id)
    if name not in known:
        raise InputError(f'task "{task_id}" has no log "{name}"', [f"its logs: {', '.join(known) or 'none'}"])
    with open(directory / name, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    return "\n".join(text.splitlines()[-lines:])


# On a terminal


def watch(store: Store, console: Console, again: bool) -> None:
    """Print the table once, or redraw it every second until Ctrl-C."""
    if not again:
        console.print(table(snapshot(store)))
        return
    with Live(table(snapshot(store)), console=console, auto_refresh=False) as live:
        try:
            while True:
                live.update(table(snapshot(store)), refresh=True)
                time.sleep(WATCH_S)
        except KeyboardInterrupt:
            return


def table(state: Mapping[str, Any]) -> RenderableType:
    """Tasks, one row each, and the last events below."""
    grid = Table(box=None, pad_edge=False, show_edge=False)
    for name in ("task", "address", "model"):
        grid.add_column(name, no_wrap=True)
    for name in ("prio", "replicas", "req/s", "expected", "p50 ms", "p99 ms", "late %", "open", "ok", "errors"):
        grid.add_column(name, justify="right", no_wrap=True)
    for task in state["tasks"]:
        grid.add_row(*_cells(task))
    for task in state["idle"]:
        grid.add_row(task["id"], "not up", "", str(task["priority"]))
    return Group(Text(_headline(state)), grid, Text(""), *(Text(_line(event)) for event in state["events"]))


def _headline(state: Mapping[str, Any]) -> str:
    if not state["up"]:
        return "no supervisor is running: `tasks.py up` starts one"
    if state["stale"]:
        return f"the supervisor (pid {state['pid']}) has written nothing for a while: it hangs or was killed"
    return f"supervised by pid {state['pid']}, files in {state['directory']}"


def _cells(task: Mapping[str, Any]) -> list[str]:
    ready = sum(replica["state"] == "ready" for replica in task["replicas"])
    answered = task["answered"]
    late = task["late_share"]
    open_ = (task["waiting"] or 0) + (task["outstanding"] or 0)
    return [
        task["id"],
        task["address"] if task["router"]["up"] else "router is down",
        task["model"],
        str(task["priority"]),
        f"{ready}/{task['wanted']}",
        _figure(task["rate"]),
        _figure((task["forecast"] or {}).get("rate")),
        _figure(task["p50_ms"]),
        _figure(task["p99_ms"]),
        "" if late is None or task["bound_ms"] is None else f"{100 * late:.1f}",
        str(open_),
        str(answered.get("ok", 0)),
        str(sum(answered.values()) - answered.get("ok", 0)),
    ]


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"


def _line(event: Mapping[str, Any]) -> str:
    return f"{_clock(event['t_s'])} {event['task']:12} {event['kind']:8} {event['detail']}"


def _clock(t_s: float) -> str:
    return datetime.fromtimestamp(t_s).strftime("%H:%M:%S")


# On paper


def report(summary: Mapping[str, Any], events: Sequence[Event]) -> str:
    """A task's life from `up` to `down` as Markdown."""
    answered = ", ".join(f"{count} {name}" for name, count in summary["answered"].items()) or "none"
    rows = [
        ("model", f"{summary['model']} ({summary['why']})"),
        ("priority, runtime", f"{summary['priority']}, {summary['runtime']}"),
        ("promised", summary["slo"] or "nothing"),
        ("up", f"{summary['up_s']:.0f} s on {summary['address']}"),
        ("requests", f"{summary['received']} received; answered: {answered}; unanswered: {summary['unanswered']}"),
        ("latency in the router", ", ".join(_bounds(summary))),
        ("later than promised", "n/a" if summary["late"] is None else f"{summary['late']} ({summary['late_pct']} %)"),
        ("CPU", f"{summary['cpu_s']} s, {_figure(summary['cpu_ms_per_request'])} ms per answer"),
        ("replicas", f"{summary['most_replicas']} at most, {summary['replica_restarts']} restarts"),
        ("router", f"{summary['router_restarts']} restarts"),
    ]
    lines = [f"# {summary['task']}", "", summary["description"], "", "| | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in rows]
    lines += ["", "| time | event | |", "|---|---|---|"]
    lines += [f"| {_clock(event.t_s)} | {event.kind} | {event.detail} |".replace("\n", " ") for event in events]
    return "\n".join(lines) + "\n"


def _bounds(summary: Mapping[str, Any]) -> list[str]:
    return [
        f"{name.removesuffix('_ms')} {_figure(summary[name])} ms" for name in ("p50_ms", "p90_ms", "p99_ms", "max_ms")
    ]
