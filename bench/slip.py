"""How late requests leave: our open-loop client against MLPerf LoadGen, 1,000 Poisson arrivals a second.

    ours       the sender of client_async.py over TCP to a null echo in another process: its slip, t_tx_start -
               t_intended, everything the client does before the first byte leaves included
    loadgen    mlcommons-loadgen's Server scenario with a SUT that completes inside the callback: its latency counts
               from the scheduled instant, so it is the slip plus 1-2 µs of callback, and it sends nothing

Every measurement is a process of its own; contestants take turns, in reversed order every other round, and each
figure is the median over rounds of that round's percentile. Tails on a shared machine are its neighbours': medians
and the ratio are the result. Without --quick, rows are added for 150 KB requests and, where permitted, SCHED_FIFO.

    python -m bench.slip [--quick]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.common import last_line, store
from corun import arrivals
from corun.clock import NS_PER_S, anchor, now_ns
from corun.errors import guard
from corun.load.ring import Metadata, RingWriter, read_ring
from corun.load.sender import Sender
from corun.load.timing import make_waiter, prepare
from corun.load.work import Work
from corun.process import thread_environment
from corun.wire import Address, connect

ROOT = Path(__file__).resolve().parents[1]
QUANTILES = (50, 90, 99)
IMAGE = 153_600

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Case:
    """One contestant under one condition; size: bytes of a request."""

    name: str
    contestant: str
    size: int = 1024
    priority: str = "none"


BASE = (Case("ours", "ours"), Case("loadgen", "loadgen"))
MORE = (Case("ours_150k", "ours", IMAGE),)
FIFO = (Case("ours_fifo", "ours", priority="fifo"), Case("loadgen_fifo", "loadgen", priority="fifo"))


@app.command()
def main(
    quick: Annotated[bool, typer.Option("--quick", help="2 short rounds of the two main contestants")] = False,
    rate: Annotated[float, typer.Option(min=1, help="requests/s")] = 1000.0,
    rounds: Annotated[int, typer.Option(min=0, help="0 = 5, or 2 with --quick")] = 0,
    seconds: Annotated[float, typer.Option(min=0, help="of each measurement; 0 = 1.5, or 1 with --quick")] = 0.0,
    child: Annotated[str, typer.Option(hidden=True)] = "",
    size: Annotated[int, typer.Option(hidden=True)] = 1024,
    priority: Annotated[str, typer.Option(hidden=True)] = "none",
    address: Annotated[str, typer.Option(hidden=True)] = "",
    seed: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Measure, store bench/results/slip.json, print the figures as the last line."""
    with guard():
        seconds = seconds or (1.0 if quick else 1.5)
        if child:
            run_here = _ours if child == "ours" else _loadgen
            print(json.dumps(run_here(rate, seconds, size, priority, address, seed)))
            return
        cases = BASE if quick else (*BASE, *MORE, *(FIFO if _fifo_permitted() else ()))
        found = _measure(cases, rounds or (2 if quick else 5), rate, seconds)
        figures = _figures(found)
        store("slip", figures, _details(found, rate, seconds))
        last_line(figures)


def _measure(cases: tuple[Case, ...], rounds: int, rate: float, seconds: float) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {case.name: [] for case in cases}
    with _echo() as address:
        for turn in range(rounds):
            for case in cases if turn % 2 == 0 else cases[::-1]:
                result = _in_child(case, rate, seconds, address, turn)
                found[case.name].append(result)
                shown = "  ".join(f"p{quantile} {result[f'p{quantile}_us']:8.1f} µs" for quantile in QUANTILES)
                print(f"round {turn + 1}  {case.name:13s} {shown}", flush=True)
    return found


def _in_child(case: Case, rate: float, seconds: float, address: str, seed: int) -> dict[str, Any]:
    flags = {"child": case.contestant, "rate": rate, "seconds": seconds, "size": case.size,
             "priority": case.priority, "address": address, "seed": seed}  # fmt: skip
    argv = [sys.executable, "-m", "bench.slip"] + [
        word for key, value in flags.items() for word in (f"--{key}", str(value))
    ]
    done = subprocess.run(argv, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _environment() -> dict[str, str]:
    return {**os.environ, **thread_environment(1), "PYTHONPATH": str(ROOT / "src")}


@contextmanager
def _echo() -> Iterator[str]:
    """The null server in a process of its own."""
    argv = [sys.executable, "-m", "corun.testing.echo"]
    process = subprocess.Popen(argv, env=_environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def _fifo_permitted() -> bool:
    probe = "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"
    return subprocess.run([sys.executable, "-c", probe], stderr=subprocess.DEVNULL, check=False).returncode == 0


# In a process of its own


def _ours(rate: float, seconds: float, size: int, priority: str, address: str, seed: int) -> dict[str, Any]:
    timing = prepare(priority, rate=rate)
    schedule = arrivals.make([arrivals.Stream(0, arrivals.Poisson(rate))], seconds, seed)
    with tempfile.TemporaryDirectory() as directory, connect(Address.parse(address)) as sock:
        path = Path(directory) / "slip.ring"
        start = now_ns() + NS_PER_S // 5
        work = Work.of_rows(schedule.rows, start, 0, [bytes(size)])
        ring = RingWriter(path, len(work), Metadata(anchor=anchor()))
        counts = Sender(sock, work, ring, make_waiter(timing), start + round((seconds + 10) * NS_PER_S)).run()
        ring.close()
        records = read_ring(path)
    slip_us = (records["t_tx_start"] - records["t_intended"]) / 1000
    return {
        **_percentiles(slip_us),
        "response_p50_us": float(np.median((records["t_rx"] - records["t_tx_start"]) / 1000)),
        "sent": counts.sent,
        "scheduled": counts.scheduled,
        "cpu_pct": 100 * counts.cpu_s / seconds,
        "rung": timing.rung,
    }


def _percentiles(values: Any) -> dict[str, float]:
    return {f"p{quantile}_us": float(np.percentile(values, quantile, method="higher")) for quantile in QUANTILES}


def _loadgen(rate: float, seconds: float, size: int, priority: str, address: str, seed: int) -> dict[str, Any]:
    import mlperf_loadgen as loadgen

    if priority == "fifo":
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))

    def complete(samples: list[Any]) -> None:
        loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(sample.id, 0, 0) for sample in samples])

    settings = loadgen.TestSettings()
    settings.scenario = loadgen.TestScenario.Server
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.server_target_qps = rate
    settings.server_target_latency_ns = NS_PER_S
    settings.min_duration_ms = round(seconds * 1000)
    settings.min_query_count = round(seconds * rate)
    settings.schedule_rng_seed = seed
    with tempfile.TemporaryDirectory() as directory:
        log = loadgen.LogSettings()
        log.enable_trace = False
        log.log_output.outdir = directory
        sut = loadgen.ConstructSUT(complete, lambda: None)
        library = loadgen.ConstructQSL(1, 1, lambda samples: None, lambda samples: None)
        loadgen.StartTestWithLogSettings(sut, library, settings, log)
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(sut)
        summary = (Path(directory) / "mlperf_log_summary.txt").read_text()
    return {
        f"p{quantile}_us": _line(summary, f"{quantile:.2f} percentile latency (ns)") / 1000 for quantile in QUANTILES
    }


def _line(summary: str, name: str) -> float:
    return next(float(line.split(":")[1]) for line in summary.splitlines() if line.strip().startswith(name))


# The figures


def _median(results: list[dict[str, Any]], key: str) -> float:
    return round(statistics.median(result[key] for result in results), 1)


def _figures(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    p50 = {name: _median(results, "p50_us") for name, results in found.items()}
    p99 = {name: _median(results, "p99_us") for name, results in found.items()}
    ours = [result for name, results in found.items() if name.startswith("ours") for result in results]
    return {
        "p50_us": p50,
        "p99_us": p99,
        "ratio_p50": round(p50["loadgen"] / p50["ours"], 2),
        "sent": sum(result["sent"] for result in ours),
        "scheduled": sum(result["scheduled"] for result in ours),
    }


def _details(found: dict[str, list[dict[str, Any]]], rate: float, seconds: float) -> dict[str, Any]:
    return {
        "rate": rate,
        "seconds": seconds,
        "targets": {"p50_us": 40, "ratio_p50": 3.0, "fifo": {"p50_us": 30, "p99_us": 200}, "cpu_pct_at_5000": 15},
        "rounds": found,
    }


if __name__ == "__main__":
    app()
