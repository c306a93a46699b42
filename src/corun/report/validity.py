"""Why a number may not be trusted: flags with the measured value, the limit and the remedy; nothing is discarded.

    faults        a process died, the run is not complete, requests were not answered
    load          the client sent late (slip), could not send (backlog), or had too little CPU left; requests in
                  flight grew, the level drifted, or there are too few to tell; training ended too early
    machine       see corun.report.disturbance: steal, throttling, strangers on CPU and GPU, missed ticks
    clocks        two hosts whose clocks are compared only to within a bound
    calibration   client and null server alone on this machine, before the run

The gate on slip, backlog, steal and client CPU is the load generator's own: a run whose generator was late
measures the generator. Slip is judged by its highest percentile that the number of requests supports.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corun.clock import NS_PER_MS
from corun.report import disturbance
from corun.report.flag import Flag
from corun.report.summary import Summary
from corun.run.directory import write_json
from corun.run.read import Table, Window, read_table, select, windows
from corun.run.records import INFER_CLIENT
from corun.stats import percentile_of
from corun.stats.steady import NEVER, steady_state

SLIP_FLOOR_MS = 0.2
SLIP_SHARE = 0.02
CLIENT_CPU_LIMIT = 0.7
CLOCK_FLOOR_MS = 0.1
CLOCK_SHARE = 0.05
CALIBRATION = "calibration.json"

_NEEDED = ("segment", "status", "t_intended_ns", "t_tx_start_ns", "t_rx_ns", "slip_ms", "s_picked_ns", "s_tx_ns")
_COLUMNS = tuple(column for column in INFER_CLIENT if column.name in _NEEDED)
_NO_CPU = (
    "it competes for the CPU with what it measures: run clients on another host, leave them a core, "
    "or allow SCHED_FIFO"
)


def check(summary: Summary) -> list[Flag]:
    """All flags of a run; also written to validity.json."""
    measured = windows(summary.manifest)
    calibration = read_calibration(summary.run)
    flags = [
        *_faults(summary),
        *_errors(summary),
        *_requests(summary, measured),
        *_clients(summary, measured),
        *_training(summary, measured),
        *_clocks(summary, measured),
        *disturbance.check(summary.run, summary.manifest, measured),
        *_calibrated(calibration),
    ]
    write_json(
        summary.run / "validity.json",
        {
            "valid": not flags,
            "reasons": [flag.sentence for flag in flags],
            "flags": [flag.as_json() for flag in flags],
            "calibration": calibration,
        },
    )
    return flags


def read_calibration(run: Path) -> dict[str, Any] | None:
    """calibration.json of a run: what client and null server cost alone; None when it was not measured."""
    try:
        value = json.loads((run / CALIBRATION).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None


def _where(who: str, window: Window) -> str:
    return f"{who} in {window.arm} (repeat {window.repeat + 1})"


# Faults


def _faults(summary: Summary) -> Iterator[Flag]:
    status, faults = summary.manifest.get("status"), summary.manifest.get("faults", [])
    for fault in faults:
        yield Flag("fault", "", "", None, None, fault, "see logs/ and events.csv of the run")
    if status != "complete" and not faults:
        yield Flag("status", "", "", None, None, f"the run is {status}, not complete", "measure it again")


def _errors(summary: Summary) -> Iterator[Flag]:
    for row in summary.rows:
        if row["role"] == "server" and row["repeat"] is not None and row["errors"]:
            found = (
                f"{row['service']} in {row['arm']} (repeat {row['repeat'] + 1}): {row['errors']} of {row['requests']} "
                "requests were not answered with OK, and percentiles leave them out"
            )
            remedy = "see their status in infer_client/, lower the rate or raise queue_limit"
            yield Flag("errors", row["arm"], row["service"], row["errors"], 0, found, remedy)


# The load


def _requests(summary: Summary, measured: tuple[Window, ...]) -> Iterator[Flag]:
    """Slip and steadiness of each service in each window."""
    for service in summary.manifest.get("config", {}).get("services", []):
        name = service["name"]
        table = read_table(summary.run / "infer_client" / f"{name}.csv", _COLUMNS)
        for window in (window for window in measured if window.arm != "train"):
            rows = select(table, table["segment"] == window.segment)
            yield from _slip(rows, window, name)
            yield from _steady(rows, window, name)


def _slip(rows: Table, window: Window, service: str) -> Iterator[Flag]:
    """L5: slip p99 <= max(200 us, 2 % of the median service time)."""
    answered = (rows["status"] == "OK") & (rows["s_picked_ns"] > 0)
    slip = rows["slip_ms"][rows["t_tx_start_ns"] > 0]
    known = ((quantile, percentile_of(slip, quantile)) for quantile in (99, 95, 90, 50))
    quantile, value = next((pair for pair in known if pair[1] is not None), (0, None))
    if value is None or not answered.any():
        return
    service_ms = float(np.median(rows["s_tx_ns"][answered] - rows["s_picked_ns"][answered])) / NS_PER_MS
    limit = max(SLIP_FLOOR_MS, SLIP_SHARE * service_ms)
    if value > limit:
        found = (
            f"{_where(service, window)}: the client sent late, slip p{quantile} {value:.2f} ms over {limit:.2f} ms"
        )
        yield Flag("slip", window.arm, service, value, limit, found, _NO_CPU)


def _steady(rows: Table, window: Window, service: str) -> Iterator[Flag]:
    """Warm-up, level and growth of what is in flight; requests answered with an error have no latency."""
    kept = select(rows, (rows["status"] == "OK") | (rows["status"] == "LOST"))
    ends = np.where(kept["t_rx_ns"] > 0, kept["t_rx_ns"], NEVER)
    for problem in steady_state(kept["t_intended_ns"], ends).problems:
        found, _, remedy = problem.partition("; ")
        kind = "too_few" if "too few" in found else "unstable"
        yield Flag(
            kind, window.arm, service, len(kept["status"]), None, f"{_where(service, window)}: {found}", remedy
        )


def _counts(summary: Summary, measured: tuple[Window, ...], role: str) -> Iterator[tuple[Window, dict[str, Any]]]:
    """What each process of a role answered at the end of each window."""
    by_segment = {window.segment: window for window in measured}
    for entry in summary.manifest.get("counts", []):
        if entry.get("role") == role and entry.get("segment") in by_segment:
            yield by_segment[entry["segment"]], entry


def _clients(summary: Summary, measured: tuple[Window, ...]) -> Iterator[Flag]:
    """A generator that is the bottleneck itself: its CPU, and requests the kernel would not take."""
    for window, entry in _counts(summary, measured, "client"):
        share = (entry.get("cpu_s") or 0.0) / max(window.seconds, 1e-9)
        if share > CLIENT_CPU_LIMIT:
            found = (
                f"client {_where(entry['name'], window)} used {share:.0%} of a core, over {CLIENT_CPU_LIMIT:.0%}: "
                "the generator may be what limits the rate"
            )
            remedy = "lower the rate or spread it over more services' clients"
            yield Flag("client_cpu", window.arm, entry["name"], share, CLIENT_CPU_LIMIT, found, remedy)
        backlog = entry.get("backlog_max") or 0
        if backlog:
            found = (
                f"client {_where(entry['name'], window)}: up to {backlog} due requests did not fit into the socket"
            )
            remedy = "the server or the network does not take them: look at its log, send smaller payloads or fewer"
            yield Flag("backlog", window.arm, entry["name"], backlog, 0, found, remedy)


def _training(summary: Summary, measured: tuple[Window, ...]) -> Iterator[Flag]:
    """A corun window in which training was over is partly a window of serving alone."""
    for window, entry in _counts(summary, measured, "trainer"):
        if entry.get("finished"):
            found = f"{_where(entry['name'], window)}: training finished its epochs before the window ended"
            yield Flag("train_ended", window.arm, entry["name"], None, None, found, "raise epochs, or 0 = endless")
        elif entry.get("steps") == 0:
            found = f"{_where(entry['name'], window)}: no training step was begun in the window"
            remedy = "lengthen the window, or give the trainer a smaller batch"
            yield Flag("train_idle", window.arm, entry["name"], 0, 1, found, remedy)


# Clocks and calibration


def _clocks(summary: Summary, measured: tuple[Window, ...]) -> Iterator[Flag]:
    """Stage times over the network are known only to within the clock comparison; sojourn needs no second clock."""
    medians = {
        (row["arm"], row["repeat"], row["service"]): row["response_p50_ms"]
        for row in summary.rows
        if row["role"] == "server"
    }
    for window, entry in _counts(summary, measured, "client"):
        clock = entry.get("clock") or {}
        bounds = [float(side["bound_ns"]) / NS_PER_MS for side in (clock.get("before"), clock.get("after")) if side]
        if not bounds:
            continue
        where = _where(entry["name"], window)
        limit = max(CLOCK_FLOOR_MS, CLOCK_SHARE * (medians.get((window.arm, window.repeat, entry["name"])) or 0.0))
        if max(bounds) > limit:
            found = (
                f"{where}: the server's clock is known to within {max(bounds):.3f} ms only, over {limit:.3f} ms: "
                "network out and back are no better than that"
            )
            remedy = "latencies hold; for the stages use a quieter network"
            yield Flag("clock", window.arm, entry["name"], max(bounds), limit, found, remedy)
        elif "after" not in clock:
            found = (
                f"{where}: the clocks were not compared after the window ({clock.get('after_failed', 'no answer')})"
            )
            yield Flag("clock", window.arm, entry["name"], None, None, found, "latencies hold, stages may drift")


def _calibrated(calibration: dict[str, Any] | None) -> Iterator[Flag]:
    if calibration is None:
        return
    if calibration.get("status") != "complete":
        reason = calibration.get("reason", "unknown reason")
        found = f"the harness could not be calibrated before the run: {reason}"
        yield Flag("calibration", "", "", None, None, found, "see calibration.json")
        return
    value, limit = calibration.get("slip_p99_us"), 1000 * SLIP_FLOOR_MS
    if value is not None and value > limit:
        found = (
            f"calibration: client and null server alone on this machine already slip by p99 {value:.0f} us, "
            f"over {limit:.0f} us"
        )
        yield Flag("calibration", "", "", value, limit, found, "stop what else runs here, or allow SCHED_FIFO")


__all__ = ["CALIBRATION", "Flag", "check", "read_calibration"]
