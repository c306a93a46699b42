"""What measuring costs the machine that is measured: launcher, profiler, live panel and request records.

One co-run as main.py makes it, this process being the launcher: two null services under load beside a small training
job, the profiler reading everything it can once a second. Two windows: the first without a live view, the second with
the panel drawn on a terminal that is thrown away.

    launcher_pct                     CPU time of this process in the first window, in % of a core
    profiler_pct                     CPU time of the profiler's process in both
    panel_pct                        reading the files and drawing the panel, by the thread's own clock, in the second
    recorder_ns_per_request          one request into the record ring: sent and answered
    profiler_drift_ms_per_120_ticks  slope of (tick's instant - its place on the grid), by Theil and Sen, x 120

    python -m bench.overhead [--quick]
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from scipy import stats

from bench.common import last_line, store
from corun.clock import NS_PER_MS, NS_PER_S
from corun.errors import RunFault, guard
from corun.launch.calibrate import free_port
from corun.launch.experiment import run_pair
from corun.launch.live import Live, Panel
from corun.launch.segments import Segment
from corun.load.ring import Metadata, RingWriter
from corun.process import StopSignal
from corun.report.attribution import attribute
from corun.run import config as configs
from corun.run.directory import RunDirectory
from corun.run.read import read_any
from corun.wire import STAMPS, Status

TARGETS = {"launcher_pct": 0.5, "profiler_pct": 0.2, "panel_pct": 1.0, "profiler_drift_ms_per_120_ticks": 1.0}
DRIFT_TICKS = 120
WINDOW_S, QUICK_WINDOW_S = 65.0, 15.0
RECORDS, ROUNDS = 20_000, 7

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(quick: Annotated[bool, typer.Option("--quick", help="two windows of 15 s instead of 65 s")] = False) -> None:
    """Measure, store bench/results/overhead.json, print one JSON object as the last line."""
    with guard():
        seconds = QUICK_WINDOW_S if quick else WINDOW_S
        print(f"recording {RECORDS} requests {ROUNDS} times", flush=True)
        recorder = recorder_ns()
        with tempfile.TemporaryDirectory(prefix="corun-bench-") as folder:
            figures, details = overhead(Path(folder), seconds)
        figures["recorder_ns_per_request"] = round(statistics.median(recorder), 1)
        details |= {"recorder_ns_rounds": recorder, "targets": TARGETS, "seconds": seconds, "quick": quick}
        store("overhead", figures, details)
        for name, target in TARGETS.items():
            print(f"{name} {figures[name]:g}, target below {target:g}", flush=True)
        last_line(figures)


class SecondWindow(Live):
    """Shows only the second window of a run."""

    def begin(self, run: Path, segment: Segment, services: Sequence[str], start_ns: int, stop_ns: int) -> None:
        if segment.index == 1:
            super().begin(run, segment, services, start_ns, stop_ns)


def overhead(folder: Path, seconds: float) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures of one co-run with two windows of so many seconds, and what stands behind them."""
    cell = _cell(seconds)
    run = RunDirectory.create(folder / "run", cell.resolved(), cell.digest())
    with open(os.devnull, "w", encoding="utf-8") as terminal, StopSignal() as stop:
        live = SecondWindow(Panel(Console(file=terminal, force_terminal=True, width=120, height=40)))
        outcome = run_pair(cell, run, stop, lambda line: print(line, flush=True), live)
    if outcome.status != "complete":
        raise RunFault(f"the co-run of the bench is {outcome.status}: {'; '.join(outcome.reasons)}")
    rows = {(row["repeat"], row["role"], row["name"]): row["cores"] for row in attribute(run.path)}
    shown = live.cost()
    figures = {
        "launcher_pct": round(100 * rows[0, "launcher", "launcher"], 4),
        "profiler_pct": round(100 * rows[None, "profiler", "profiler"], 4),
        "panel_pct": round(shown["pct_of_core"], 4),
        "profiler_drift_ms_per_120_ticks": round(drift_ms(run.path), 4),
    }
    details = {
        "launcher_with_panel_pct": round(100 * rows[1, "launcher", "launcher"], 4),
        "panel_ticks": shown["ticks"],
        "panel_fault": shown["fault"],
        "profiler": profiler_ticks(run.path),
        "cores_by_process": {
            f"{role} {name}".strip(): round(cores, 5)
            for (repeat, role, name), cores in rows.items()
            if repeat is None and cores is not None
        },
    }
    return figures, details


def _cell(seconds: float) -> configs.Pair:
    settings = {
        "train": [{"arch": "squeezenet1_1", "batch_size": 8, "image_size": 32, "count": 64}],
        "infer": [
            [
                {"arch": "null", "name": "a", "rate": 100, "count": 4},
                {"arch": "null", "name": "b", "rate": 20, "count": 4},
            ]
        ],
        "arms": ["corun"],
        "duration_s": seconds,
        "repeat": 2,
        "port": free_port(2),
    }
    (cell,) = configs.pairs(configs.parse(settings, "the bench"))
    return cell


def drift_ms(run: Path) -> float:
    """How far the profiler's ticks move off their grid in DRIFT_TICKS ticks; its period is a second."""
    table = read_any(run / "profile.csv")
    off_grid = (table["t_ns"] - table["t_ns"][0]) - (table["tick"] - table["tick"][0]) * NS_PER_S
    return abs(float(stats.theilslopes(off_grid, table["tick"]).slope)) * DRIFT_TICKS / NS_PER_MS


def profiler_ticks(run: Path) -> dict[str, Any]:
    """Lateness, missed ticks and time per reading as the profiler counted them."""
    table = read_any(run / "profile.csv")
    return {
        "ticks": len(table["tick"]),
        "missed": int(table["missed"].sum()),
        "late_us_median": float(statistics.median(table["late_us"])),
        "read_us_median": float(statistics.median(table["read_us"])),
    }


def recorder_ns() -> list[float]:
    """Nanoseconds per request of RingWriter.tx and rx, without the loop around them; one value per round."""
    stamps = list(range(len(STAMPS)))
    with tempfile.TemporaryDirectory(prefix="corun-bench-") as folder:
        ring = RingWriter(Path(folder) / "bench.ring", RECORDS, Metadata())
        ring.fill(range(RECORDS), range(1, RECORDS + 1), 0, [0] * RECORDS)

        def record(index: int) -> None:
            ring.tx(index, 1, 2, 3)
            ring.rx(index, Status.OK, 1, 4, 4, stamps)

        found = [round(_each(record) - _each(lambda index: None), 1) for _ in range(ROUNDS)]
        ring.close()
    return found


def _each(work: Callable[[int], None]) -> float:
    began = time.thread_time_ns()
    for index in range(RECORDS):
        work(index)
    return (time.thread_time_ns() - began) / RECORDS


if __name__ == "__main__":
    app()
