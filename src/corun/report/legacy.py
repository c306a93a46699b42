"""The original research code's three "latencies" and its load, from the rows of an honest run: why its figures look good.

    between acks  client.py: from one handshake to the next. A period: the previous request and the rest before this one.
    handshake     client_async.py: stops before the picture is sent. Neither queue nor inference is in it.
    device        server.py: copy, forward, copy back. No decoding, no queue, no network.

Each is rebuilt from the stamps of the same requests whose sojourn stands beside it, with the original's percentile (the
element at int(p n) of the sorted list, the first three rows dropped). Under its own load (evenly spaced seconds, every
client from the same seed, resting after each reply) hardly any queue can form: `dispersion`, the variance over mean of the
requests a second, is 1 for Poisson arrivals. Facts: https://github.com/Real-Time-Lab (commit 0da858a, src/client.py,
src/client_async.py, src/server.py).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from corun.clock import NS_PER_MS, NS_PER_S
from corun.run.read import Run, Window, read, select
from corun.stats.percentiles import percentile_of

Floats = NDArray[np.float64]

DROPPED = 3
PERCENT = 95.0


@dataclass(frozen=True)
class Row:
    """One service in one arm under one load; latencies in ms, rates in requests/s, None = too few requests to say."""

    load: str
    service: str
    arm: str
    requests: int
    asked_per_s: float | None
    sent_per_s: float | None
    dispersion: float | None
    sojourn_p50_ms: float | None
    sojourn_p95_ms: float | None
    sojourn_p99_ms: float | None
    between_acks_p95_ms: float | None
    handshake_p95_ms: float | None
    device_p95_ms: float | None


def rows(run: Run) -> list[Row]:
    """Every service and arm of a run with requests."""
    load = "original" if (run.manifest.get("config") or {}).get("legacy") else "open loop"
    return [
        _row(load, service, arm, run.infer_client[service], run.select(arm))
        for service in run.services
        for arm in run.arms
        if arm != "train"
    ]


def original_percentile(values: Floats, percent: float = PERCENT) -> float | None:
    """The element at int(p n) of the sorted values without the first three rows, as the original's notebooks take it."""
    kept = np.sort(values[DROPPED:])
    return float(kept[min(int(percent / 100 * len(kept)), len(kept) - 1)]) if len(kept) else None


def between_acks_ms(table: Mapping[str, NDArray[Any]], windows: Sequence[Window]) -> Floats:
    """From one send to the next, in ms, within each window."""
    gaps = [np.diff(np.sort(_sent_in(table, window))) for window in windows]
    return np.concatenate([np.empty(0), *gaps]) / NS_PER_MS


def dispersion(table: Mapping[str, NDArray[Any]], windows: Sequence[Window]) -> float | None:
    """Variance over mean of the requests sent in each whole second; None below two seconds or without requests."""
    counts = np.concatenate([np.empty(0), *(_per_second(_sent_in(table, window), window) for window in windows)])
    return float(counts.var(ddof=1) / counts.mean()) if len(counts) > 1 and counts.mean() > 0 else None


def write(runs: Sequence[Path], path: Path) -> list[Row]:
    """The rows of several runs as one CSV file; returns them."""
    found = [row for run in runs for row in rows(read(run))]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows({name: "" if cell is None else cell for name, cell in asdict(row).items()} for row in found)
    return found


def show(found: Sequence[Row], console: Console) -> None:
    """The table a person sees: what happened, then what the original would have written down."""
    table = Table(
        title=f"Sojourn in ms beside the original's latencies (their p{PERCENT:g}) and load",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("service", "arm", "load"):
        table.add_column(name, no_wrap=True)
    for name in ("asked/s", "sent/s", "disp.", "p95", "p99", "acks", "handshake", "device"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in sorted(found, key=lambda row: (row.service, row.arm)):
        cells = (row.asked_per_s, row.sent_per_s, row.dispersion, row.sojourn_p95_ms, row.sojourn_p99_ms)
        theirs = (row.between_acks_p95_ms, row.handshake_p95_ms, row.device_p95_ms)
        shown = ("n/a" if cell is None else f"{cell:.2f}" for cell in (*cells, *theirs))
        table.add_row(row.service, row.arm, row.load, *shown)
    console.print(table)


def _row(load: str, service: str, arm: str, table: Mapping[str, NDArray[Any]], windows: Sequence[Window]) -> Row:
    mine = select(dict(table), table["arm"] == arm)
    answered = select(mine, mine["status"] == "OK")
    seconds = sum(window.seconds for window in windows)
    asked = mine["request_rate"][0] if len(mine["request_rate"]) else np.nan
    p50, p95, p99 = (_rounded(percentile_of(answered["sojourn_ms"], percent)) for percent in (50, 95, 99))
    return Row(
        load=load,
        service=service,
        arm=arm,
        requests=len(mine["id"]),
        asked_per_s=float(asked) if np.isfinite(asked) and asked > 0 else None,
        sent_per_s=round(len(mine["id"]) / seconds, 3) if seconds else None,
        dispersion=_rounded(dispersion(mine, windows)),
        sojourn_p50_ms=p50,
        sojourn_p95_ms=p95,
        sojourn_p99_ms=p99,
        between_acks_p95_ms=_rounded(original_percentile(between_acks_ms(mine, windows))),
        handshake_p95_ms=_rounded(original_percentile(_between(answered, "t_tx_start_ns", "s_rx_first_ns"))),
        device_p95_ms=_rounded(original_percentile(_between(answered, "s_preprocessed_ns", "s_d2h_ns"))),
    )


def _between(table: Mapping[str, NDArray[Any]], first: str, last: str) -> Floats:
    """last - first in ms of the requests that have both stamps."""
    both = (table[first] > 0) & (table[last] > 0)
    return np.asarray((table[last][both] - table[first][both]) / NS_PER_MS)


def _sent_in(table: Mapping[str, NDArray[Any]], window: Window) -> NDArray[np.int64]:
    sent = table["t_tx_start_ns"]
    return np.asarray(sent[(table["segment"] == window.segment) & (sent > 0)])


def _per_second(sent: NDArray[np.int64], window: Window) -> NDArray[np.int64]:
    seconds = int(window.seconds)
    edges = window.start_ns + NS_PER_S * np.arange(seconds + 1)
    return np.histogram(sent, edges)[0] if seconds else np.empty(0, dtype=np.int64)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
