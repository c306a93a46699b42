"""What the harness costs by itself: one client and a null server on the loopback, measured before a run.

A latency measured by this harness holds the harness's own: the sender's lateness, two socket crossings, two
wake-ups, the hand-over to the model thread. The null model does nothing, so what is left is exactly that. It is
measured as any run is (same programs, same profiler, same rows), for 2 s at a rate that gives a quotable p99,
once before the first run of a command, and stored with each of its runs as calibration.json.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from corun.clock import NS_PER_S
from corun.errors import RunFault
from corun.launch.experiment import Outcome, run_pair
from corun.process import StopSignal
from corun.run import config as configs
from corun.run.directory import RunDirectory, write_json
from corun.run.read import Table, read_table, select
from corun.run.records import INFER_CLIENT
from corun.stats.percentiles import percentile_of

FILE: Final = "calibration.json"
SERVICE: Final = "null"
RATE: Final = 400.0
SECONDS: Final = 2.0
HOST: Final = "127.0.0.1"
PORT_TRIES: Final = 50

_FIGURES = (("slip", "slip_ms"), ("response", "response_ms"), ("sojourn", "sojourn_ms"))
_COLUMNS = tuple(
    column for column in INFER_CLIENT if column.name in ("status", "t_tx_start_ns", *(name for _, name in _FIGURES))
)


class Calibration:
    """Measured when it is first asked for, stored with every run after that."""

    def __init__(self, stop: StopSignal, say: Callable[[str], None], wanted: bool = True) -> None:
        self._stop = stop
        self._say = say
        self._wanted = wanted
        self._found: dict[str, Any] | None = None

    def store(self, run: RunDirectory) -> None:
        """Write calibration.json into a run directory."""
        if not self._wanted:
            return
        if self._found is None:
            self._say(f"calibrating: client and null server alone, {SECONDS:g} s")
            self._found = calibrate(self._stop)
        write_json(run.file(FILE), self._found)


def calibrate(stop: StopSignal) -> dict[str, Any]:
    """Measure client and null server; a failure is in the answer, never an exception."""
    cell = _cell(free_port())
    with tempfile.TemporaryDirectory(prefix="corun-calibration-") as folder:
        run = RunDirectory.create(Path(folder) / "run", cell.resolved(), cell.digest())
        outcome = run_pair(cell, run, stop, lambda line: None)
        return figures(run, outcome)


def _cell(port: int) -> configs.Pair:
    settings = {
        "infer": [{"arch": SERVICE, "rate": RATE, "count": 4}],
        "duration_s": SECONDS,
        "port": port,
        "start_timeout_s": 60,
    }
    (cell,) = configs.pairs(configs.parse(settings, "the calibration"))
    return cell


def free_port(count: int = 1) -> int:
    """The first of `count` ports of the loopback that nobody holds now; RunFault when none can be found."""
    for _ in range(PORT_TRIES):
        with ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind((HOST, 0))
            port = int(first.getsockname()[1])
            with suppress(OSError, OverflowError):
                for index in range(1, count):
                    stack.enter_context(socket.socket()).bind((HOST, port + index))
                return port
    raise RunFault(f"no {count} free ports in a row were found on {HOST}")


def figures(run: RunDirectory, outcome: Outcome) -> dict[str, Any]:
    """Slip, response and sojourn in µs over the answered requests, and what client and server used."""
    found: dict[str, Any] = {
        "status": outcome.status,
        "reason": "; ".join(outcome.reasons),
        "measured": datetime.now().astimezone().isoformat(timespec="seconds"),
        "what": "client and null server on the loopback, nothing else of this program but the profiler",
        "rate_per_s": RATE,
        "seconds": SECONDS,
    }
    table = read_table(run.file("infer_client") / f"{SERVICE}.csv", _COLUMNS)
    answered = select(table, table["status"] == "OK")
    found |= {"requests": len(table["status"]), "errors": len(table["status"]) - len(answered["status"])}
    for name, column in _FIGURES:
        found |= _microseconds(name, column, answered)
    for entry in run.manifest.get("counts", []):
        if entry["role"] == "client":
            window_s = sum(one["stop_ns"] - one["start_ns"] for one in run.manifest["segments"]) / NS_PER_S
            found["client_cpu_pct"] = round(100 * entry["cpu_s"] / window_s, 2) if window_s else None
            found["timing"] = entry["timing"]
    return found


def _microseconds(name: str, column: str, answered: Table) -> dict[str, float | None]:
    values = 1000 * answered[column]
    quoted: dict[str, float | None] = {
        f"{name}_p{quantile}_us": percentile_of(values, quantile) for quantile in (50, 90, 99)
    }
    quoted[f"{name}_max_us"] = float(values.max()) if len(values) else None
    return {key: None if value is None else round(value, 1) for key, value in quoted.items()}


__all__ = ["FILE", "Calibration", "calibrate", "figures", "free_port"]
