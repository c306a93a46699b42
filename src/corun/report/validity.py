"""Why a number may not be trusted: flags with the measured value, the limit and the remedy; nothing is discarded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from corun.report.summary import Summary
from corun.run.directory import write_json
from corun.run.read import read_table
from corun.run.records import Column

SLIP_FLOOR_MS = 0.2
SLIP_SHARE = 0.02
CLIENT_CPU_LIMIT = 0.7
STEAL_LIMIT = 0.01

_TICKS = (
    Column("arm", "", "str", ""),
    Column("missed", "", "int", ""),
    Column("cpu_steal", "", "int", ""),
)


@dataclass(frozen=True)
class Flag:
    """One reason for doubt, in a sentence that names the remedy."""

    check: str
    arm: str
    who: str
    value: float | None
    limit: float | None
    sentence: str


def check(summary: Summary) -> list[Flag]:
    """All flags of a run; also written to validity.json."""
    flags = [*_faults(summary), *_requests(summary), *_clients(summary), *_ticks(summary.run)]
    write_json(
        summary.run / "validity.json",
        {"valid": not flags, "reasons": [flag.sentence for flag in flags], "flags": [asdict(flag) for flag in flags]},
    )
    return flags


def _faults(summary: Summary) -> list[Flag]:
    status = summary.manifest.get("status")
    flags = [Flag("fault", "", "", None, None, fault) for fault in summary.manifest.get("faults", [])]
    if status != "complete" and not flags:
        flags.append(Flag("status", "", "", None, None, f"the run is {status}, not complete"))
    return flags


def _requests(summary: Summary) -> list[Flag]:
    flags = []
    for row in (row for row in summary.rows if row["role"] == "server" and row["repeat"] is not None):
        where = f"{row['service']} in {row['arm']} (repeat {row['repeat'] + 1})"
        if row["errors"]:
            sentence = f"{where}: {row['errors']} of {row['requests']} requests were not answered with OK"
            flags.append(Flag("errors", row["arm"], row["service"], row["errors"], 0, sentence))
        flags += _slip(row, where)
    return flags


def _slip(row: dict[str, Any], where: str) -> list[Flag]:
    """L5: slip p99 <= max(200 us, 2 % of the median response)."""
    slip, response = row["slip_p99_ms"], row["response_p50_ms"]
    if slip is None or response is None:
        return []
    limit = max(SLIP_FLOOR_MS, SLIP_SHARE * response)
    if slip <= limit:
        return []
    sentence = (
        f"{where}: the client sent late, slip p99 {slip:.2f} ms over {limit:.2f} ms; it competes for the CPU with what "
        "it measures: run clients on another host, leave them a core, or allow SCHED_FIFO"
    )
    return [Flag("slip", row["arm"], row["service"], slip, limit, sentence)]


def _clients(summary: Summary) -> list[Flag]:
    """Client CPU over 70 % of a core: the generator itself may be the bottleneck."""
    durations = {
        entry["index"]: (entry["stop_ns"] - entry["start_ns"]) / 1e9 for entry in summary.manifest.get("segments", [])
    }
    arms = {entry["index"]: entry["arm"] for entry in summary.manifest.get("segments", [])}
    flags = []
    for entry in summary.manifest.get("counts", []):
        if entry["role"] != "client" or entry.get("cpu_s") is None or not durations.get(entry["segment"]):
            continue
        share = entry["cpu_s"] / durations[entry["segment"]]
        if share > CLIENT_CPU_LIMIT:
            arm = arms[entry["segment"]]
            sentence = (
                f"client {entry['name']} in {arm} used {share:.0%} of a core: lower the rate or use more streams"
            )
            flags.append(Flag("client_cpu", arm, entry["name"], share, CLIENT_CPU_LIMIT, sentence))
    return flags


def _ticks(run: Path) -> list[Flag]:
    path = run / "profile.csv"
    if not path.exists():
        return [Flag("profiler", "", "profiler", None, None, "there is no profile.csv: the profiler did not run")]
    missed = int(np.nansum(read_table(path, _TICKS[1:2])["missed"]))
    if not missed:
        return []
    sentence = f"the profiler missed {missed} of its ticks: the machine was too busy to run it every second"
    return [Flag("missed_ticks", "", "profiler", missed, 0, sentence)]
