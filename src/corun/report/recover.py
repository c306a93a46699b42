"""Brings the last window of a run that was killed into its tables.

While a window is measured its requests are in memory-mapped rings, and its length is nowhere but in the events. A
launcher that was killed turned neither into rows. Here the rings become rows as the launcher would have made them,
and the window is entered into the manifest up to the last instant that anybody recorded. A run that may still be
alive, one whose files changed a moment ago, is left alone.
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corun.clock import NS_PER_S
from corun.errors import InputError
from corun.load.ring import open_ring, ring_to_csv
from corun.run.config import DEFAULT_DURATION_S
from corun.run.directory import read_manifest, write_json
from corun.run.read import read_any, read_table
from corun.run.records import EVENTS, TRAIN

QUIET_S = 30.0


def recover(path: Path, now_s: float | None = None) -> list[str]:
    """Complete the tables of a killed run; returns a sentence for everything that was done or could not be.

    now_s: the time of day, for tests. Does nothing to a run that ended, or that wrote within QUIET_S seconds.
    """
    manifest = read_manifest(path)
    if manifest.get("status") != "running" or _last_change_s(path) > (now_s or time.time()) - QUIET_S:
        return []
    said = []
    last_ns = 0
    for ring in sorted((path / "infer_client").glob("*.ring")):
        try:
            last_ns = max(last_ns, _last_stamp(ring))
            said.append(_rows_of(ring))
        except InputError as error:
            said.append(f"not recovered: {error}")
    said += _windows(path, manifest, last_ns)
    return said


def _last_change_s(path: Path) -> float:
    return max((file.stat().st_mtime for file in path.rglob("*") if file.is_file()), default=0.0)


# Requests


def _last_stamp(ring: Path) -> int:
    records = open_ring(ring).records
    return max((int(records[name].max()) for name in ("t_tx_start", "t_rx") if len(records)), default=0)


def _rows_of(ring: Path) -> str:
    """Append the ring's rows to its service's table, in place of those a killed launcher had begun to write."""
    service, _, segment = ring.stem.rpartition(".")
    table = ring.with_name(f"{service}.csv")
    if table.exists():
        _drop_segment(table, segment)
    count = ring_to_csv(ring, table)
    ring.unlink()
    return f"recovered {count} requests of {service} in segment {segment}"


def _drop_segment(table: Path, segment: str) -> None:
    text = table.read_text(encoding="utf-8")
    header, *rows = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    place = header.index("segment")
    draft = table.with_suffix(".csv.part")
    with open(draft, "w", newline="", encoding="utf-8") as file:
        kept = [row for row in rows if len(row) == len(header) and row[place] != segment]
        csv.writer(file, lineterminator="\n").writerows([header, *kept])
    os.replace(draft, table)


# Windows


def _windows(path: Path, manifest: dict[str, Any], last_ns: int) -> Iterator[str]:
    """Enter windows that began and are not in the manifest, up to the last instant on record."""
    segments = list(manifest.get("segments", []))
    known = {entry["index"] for entry in segments}
    last_ns = max(last_ns, _last_row_ns(path))
    for index, arm, start_ns in _begun(path):
        if index in known or last_ns <= start_ns:
            continue
        duration_s = (manifest.get("config") or {}).get("duration_s", {}).get(arm, DEFAULT_DURATION_S)
        stop_ns = min(last_ns, start_ns + round(duration_s * NS_PER_S))
        repeat = sum(entry["arm"] == arm for entry in segments)
        segments.append(
            {
                "index": index,
                "arm": arm,
                "repeat": repeat,
                "duration_s": duration_s,
                "start_ns": start_ns,
                "stop_ns": stop_ns,
                "recovered": True,
            }
        )
        yield f"recovered {(stop_ns - start_ns) / NS_PER_S:.1f} s of the window {arm} (repeat {repeat + 1})"
    if len(segments) > len(known):
        write_json(path / "manifest.json", {**manifest, "segments": segments})


def _begun(path: Path) -> Iterator[tuple[int, str, int]]:
    """Index, arm and start of every window that the events say began."""
    events = read_table(path / "events.csv", EVENTS)
    rows = zip(events["t_ns"], events["kind"], events["name"], events["detail"], strict=True)
    for t_ns, kind, arm, detail in rows:
        index = str(detail).removeprefix("segment ")
        if kind == "window_start" and index.isdigit():
            yield int(index), str(arm), int(t_ns)


def _last_row_ns(path: Path) -> int:
    """The last instant in the tables that are written as it happens."""
    steps, ticks = read_table(path / "train.csv", TRAIN)["t_end_ns"], read_any(path / "profile.csv").get("t_ns")
    return max([int(values[-1]) for values in (steps, ticks) if values is not None and len(values)], default=0)
