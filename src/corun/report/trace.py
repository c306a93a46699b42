"""A run as a Chrome trace: open trace.json in https://ui.perfetto.dev or chrome://tracing.

One process per service, with each request as complete events, one per stage; requests that overlap get lanes of
their own. Training steps, windows, events and the shares of CPU and GPU stand beside them on the same clock.
Format: "Trace Event Format", Google, 2016; times in microseconds since the first window.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corun.errors import RunFault
from corun.report.shares import cpu_shares, gpu_shares, power
from corun.report.stages import NAMES, STAMPS
from corun.run.read import Run, Table, read

Event = dict[str, Any]

US_PER_S = 1e6
NS_PER_US = 1e3
RUN_PID, TRAINER_PID, COUNTERS_PID, FIRST_SERVICE_PID = 1, 2, 3, 10
SHORTEST_NS = 1_000
LOST_NS = 1_000_000


def write_trace(path: Path) -> Path:
    """Write trace.json of a run directory, event by event; returns its path."""
    target = path / "trace.json"
    temporary = target.with_suffix(".json.part")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            for number, event in enumerate(events(read(path))):
                file.write(("" if number == 0 else ",\n") + json.dumps(event, separators=(",", ":")))
            file.write("\n]}\n")
        os.replace(temporary, target)
    except OSError as error:
        raise RunFault(f"cannot write {target}: {error.strerror or error}") from error
    return target


def events(run: Run) -> Iterator[Event]:
    """All events of a run; names of tracks first."""
    origin_ns = _origin(run)
    yield from _named(RUN_PID, f"run {run.manifest.get('run', run.path.name)}", "windows and events")
    for window in run.windows:
        name = f"{window.arm} (repeat {window.repeat + 1})"
        yield _complete(name, "window", RUN_PID, 0, window.start_ns - origin_ns, window.stop_ns - window.start_ns)
    yield from _instants(run, origin_ns)
    for number, service in enumerate(run.services):
        pid = FIRST_SERVICE_PID + number
        yield from _named(pid, f"service {service}")
        yield from _requests(run.infer_client[service], pid, origin_ns)
    if len(run.train["step"]):
        yield from _named(TRAINER_PID, "trainer", "steps")
        yield from _steps(run.train, origin_ns)
    yield from _counters(run, origin_ns)


def _origin(run: Run) -> int:
    """Where time 0 is: the first window, or without one the first instant that anybody recorded."""
    starts = [window.start_ns for window in run.windows]
    starts += [int(t) for table in run.infer_client.values() for t in table["t_intended_ns"][:1]]
    starts += [int(t) for t in run.train["t_start_ns"][:1]]
    return min(starts, default=int(run.events["t_ns"][0]) if len(run.events["t_ns"]) else 0)


def _named(pid: int, process: str, thread: str = "") -> Iterator[Event]:
    yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": {"name": process}}
    yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_sort_index", "args": {"sort_index": pid}}
    if thread:
        yield {"ph": "M", "pid": pid, "tid": 0, "name": "thread_name", "args": {"name": thread}}


def _complete(name: str, kind: str, pid: int, tid: int, at_ns: int, length_ns: int, **args: Any) -> Event:
    event = {"ph": "X", "name": name, "cat": kind, "pid": pid, "tid": tid}
    return {
        **event,
        "ts": at_ns / NS_PER_US,
        "dur": max(0, length_ns) / NS_PER_US,
        **({"args": args} if args else {}),
    }


def _instants(run: Run, origin_ns: int) -> Iterator[Event]:
    rows = run.events
    for t_ns, kind, role, name, detail in zip(
        *(rows[c] for c in ("t_ns", "kind", "role", "name", "detail")), strict=True
    ):
        if not str(kind).startswith("window"):
            where = " ".join(filter(None, (str(role), str(name))))
            event = {"ph": "i", "s": "g", "name": f"{kind} {where}".strip(), "cat": "event", "pid": RUN_PID, "tid": 0}
            yield {**event, "ts": (int(t_ns) - origin_ns) / NS_PER_US, "args": {"detail": str(detail)}}


# Requests


def _requests(table: Table, pid: int, origin_ns: int) -> Iterator[Event]:
    """Each answered request as its stages on a lane of its own, each other one as a mark."""
    order = np.argsort(table["t_intended_ns"], kind="stable")
    begin = table["t_intended_ns"][order]
    end = np.maximum(table["t_rx_ns"][order], begin + np.where(table["t_rx_ns"][order] > 0, 0, LOST_NS))
    stamps = np.array([table[name] for name in STAMPS], dtype=np.int64)[:, order]
    stamps = np.maximum.accumulate(np.where(table["t_rx_ns"][order] > 0, stamps, begin), axis=0)
    for row, lane in zip(range(len(order)), lanes(begin.tolist(), end.tolist()), strict=True):
        source = int(order[row])
        args = {
            "id": int(table["id"][source]),
            "status": str(table["status"][source]),
            "arm": str(table["arm"][source]),
        }
        at_ns, length_ns = int(begin[row]) - origin_ns, int(end[row] - begin[row])
        if table["t_rx_ns"][source] <= 0:
            yield _complete(str(table["status"][source]), "request", pid, lane, at_ns, length_ns, **args)
            continue
        yield _complete(f"request {args['id']}", "request", pid, lane, at_ns, length_ns, **args)
        for stage, name in enumerate(NAMES):
            first, last = int(stamps[stage, row]), int(stamps[stage + 1, row])
            if last - first >= SHORTEST_NS:
                yield _complete(name, "stage", pid, lane, first - origin_ns, last - first)


def lanes(begin: Iterable[int], end: Iterable[int]) -> Iterator[int]:
    """A lane for each interval (in order of begin), so that intervals of one lane never overlap; as few as possible."""
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    opened = 0
    for start, stop in zip(begin, end, strict=True):
        while busy and busy[0][0] <= start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            heapq.heappush(free, opened)
            opened += 1
        lane = heapq.heappop(free)
        heapq.heappush(busy, (stop, lane))
        yield lane


# Training and shares


def _steps(train: Table, origin_ns: int) -> Iterator[Event]:
    columns = (train[name] for name in ("t_start_ns", "t_end_ns", "step", "epoch", "loss", "samples"))
    for begin, end, step, epoch, loss, samples in zip(*columns, strict=True):
        args = {"epoch": _whole(epoch), "loss": None if np.isnan(loss) else float(loss), "samples": _whole(samples)}
        at_ns, length_ns = int(begin) - origin_ns, int(end - begin)
        yield _complete(f"step {_whole(step)}", "training", TRAINER_PID, 0, at_ns, length_ns, **args)


def _whole(value: float) -> int | None:
    return None if np.isnan(value) else int(value)


def _counters(run: Run, origin_ns: int) -> Iterator[Event]:
    """Stacked counters: a value stands at the beginning of the interval it describes."""
    if not run.windows:
        return
    last_ns = max(window.stop_ns for window in run.windows)
    yield from _named(COUNTERS_PID, "machine")
    for title, make in (("CPU", cpu_shares), ("GPU", gpu_shares), ("power", power)):
        shares = make(run, origin_ns, last_ns)
        if shares is None:
            continue
        for kind, series in (("by role", shares.stacked), ("", shares.lines)):
            begins = np.concatenate([[shares.begin_s], shares.seconds[:-1]])
            name = " ".join(filter(None, (title, kind, f"({shares.unit})")))
            for row in range(len(begins) if series else 0):
                known = {label: float(values[row]) for label, values in series if not np.isnan(values[row])}
                if known:
                    event = {"ph": "C", "name": name, "pid": COUNTERS_PID, "tid": 0, "args": known}
                    yield {**event, "ts": float(begins[row]) * US_PER_S}
