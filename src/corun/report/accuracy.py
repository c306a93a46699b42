"""Accuracy over time: of the requests with a label, how many got the right answer, second by second.

Every labelled request counts from its intended send time, one that failed or was lost as not answered rightly.
weights_version is that of the newest published weights among the replies of the second, by the server's rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from corun.clock import NS_PER_S
from corun.run.read import Run, Table, Window
from corun.run.read import read as read_run
from corun.run.records import ACCURACY
from corun.run.table import TableWriter

WINDOW_S = 1.0


@dataclass(frozen=True)
class Second:
    """One row of accuracy.csv."""

    service: str
    arm: str
    repeat: int
    segment: int
    t_ns: int
    t_s: float
    n: int
    correct: int
    accuracy: float
    weights_version: int | None


def write(path: Path) -> list[Second]:
    """Write accuracy.csv of a run directory whose requests have labels; [] and no file for others."""
    run = read_run(path)
    rows = seconds(run)
    if rows:
        with TableWriter(path / "accuracy.csv", ACCURACY) as table:
            table.rows([vars(row) for row in rows])
    return rows


def seconds(run: Run) -> list[Second]:
    """All rows of accuracy.csv, service by service and window by window."""
    found = []
    for service in run.services:
        table = run.infer_client[service]
        if not np.isfinite(table["label"]).any():
            continue
        versions = versions_of(run, service)
        for window in run.windows:
            found += _window(service, table, versions, window)
    return found


def versions_of(run: Run, service: str) -> dict[tuple[int, int], float]:
    """Weights version of every answered request by (stream, id), NaN before the first publication."""
    server = run.infer_server.get(service)
    if server is None:
        return {}
    keys = zip(server["stream"].astype(int).tolist(), server["id"].astype(int).tolist(), strict=True)
    return dict(zip(keys, server["weights_version"].tolist(), strict=True))


def _window(service: str, table: Table, versions: dict[tuple[int, int], float], window: Window) -> list[Second]:
    mine = (table["segment"] == window.segment) & np.isfinite(table["label"])
    due, right = table["t_intended_ns"][mine], right_of(table)[mine]
    streams, ids = table["stream"][mine].astype(int), table["id"][mine].astype(int)
    bins = ((due - window.start_ns) / (WINDOW_S * NS_PER_S)).astype(int)
    rows = []
    for number in np.unique(bins).tolist():
        inside = bins == number
        keys = zip(streams[inside].tolist(), ids[inside].tolist(), strict=True)
        seen = [version for key in keys if (version := versions.get(key, np.nan)) == version]
        count, correct = int(inside.sum()), int(right[inside].sum())
        rows.append(
            Second(
                service,
                window.arm,
                window.repeat,
                window.segment,
                window.start_ns + round(number * WINDOW_S * NS_PER_S),
                number * WINDOW_S,
                count,
                correct,
                round(correct / count, 6),
                int(max(seen)) if seen else None,
            )
        )
    return rows


def right_of(table: Table) -> NDArray[np.bool_]:
    """Which rows of a client's table were answered OK with their label."""
    right: NDArray[np.bool_] = (table["status"] == "OK") & (table["answer"] == table["label"])
    return right


def overall(rows: list[Second]) -> dict[str, dict[str, float]]:
    """Right answers over the whole run by service: {"service": {"requests", "right", "accuracy"}}."""
    found = {}
    for service in dict.fromkeys(row.service for row in rows):
        mine = [row for row in rows if row.service == service]
        requests, right = sum(row.n for row in mine), sum(row.correct for row in mine)
        found[service] = {"requests": requests, "right": right, "accuracy": round(right / requests, 6)}
    return found
