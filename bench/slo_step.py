"""Does feedback hold a latency promise through a jump in load, and does training come back? Real processes.

    load      10 % of a core ──┐ 40 % ┌── 10 %       Poisson; the service has one thread, the trainer all cores
    windows   5 s each; the promise is judged window by window, at its p99

    settled_after        windows of the step until all that follow in it keep the bound (goal: at most 3)
    over                 windows of the step over the bound, of 7
    recovered_x          training speed after the step / before it (the last half of each; goal: 0.9 or more)

The bound is `--slack` times the p99 of the service alone at the high load, measured first, so it can be kept, but not by
a trainer that does what it likes. `none` runs beside the controllers under the same arrivals.

    python -m bench.slo_step [--quick]
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.common import fill, last_line, machine, markdown, store
from corun.clock import NS_PER_S
from corun.errors import RunFault, guard
from corun.launch.experiment import run_pair
from corun.process import StopSignal, available_cores
from corun.registry import home
from corun.run import config as configs
from corun.run.directory import RunDirectory
from corun.run.read import Run, Window, read

MODEL, SIZE = "mobilenet_v3_small", 64
JOB = {
    "arch": "resnet18",
    "data": "synthetic",
    "batch_size": 64,
    "image_size": 32,
    "num_classes": 10,
    "count": 512,
    "threads": available_cores(),
}
LOW, HIGH = 0.1, 0.4
WINDOW_S = 5.0
BEFORE, DURING, AFTER = 8, 7, 6
PORT = 55100
WITHIN_WINDOWS, RECOVERED = 3, 0.9

Spec = dict[str, Any]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Load:
    """Requests/s outside and inside the step, and the bound in ms."""

    low: float
    high: float
    slo_ms: float


@app.command()
def main(
    quick: Annotated[bool, typer.Option("--quick", help="one run of each policy instead of two")] = False,
    slack: Annotated[float, typer.Option(min=1, help="bound / p99 alone at the high load")] = 2.0,
) -> None:
    """Measure, store bench/results/slo_step.json, print one JSON object as the last line."""
    with guard(), StopSignal() as stop:
        load = _load(slack, stop)
        specs = _specs(load.slo_ms)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in specs}
        for repeat in range(1 if quick else 2):
            for name, spec in specs.items():
                runs[name].append(_judge(_run(_cell(load, spec, repeat), stop), load.slo_ms))
                print(f"{name}: {_line(runs[name][-1])}", flush=True)
        figures = {"slo_ms": round(load.slo_ms, 2), "policies": {name: _summary(seen) for name, seen in runs.items()}}
        details = {
            "quick": quick,
            "slack": slack,
            "requests_per_s": [load.low, load.high],
            "specs": specs,
            "runs": runs,
        }
        store("slo_step", figures, details)
        if not quick:
            fill(home() / "docs" / "sharing.md", "slo_step", page(figures, details))
        last_line(figures)


def page(figures: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """The table for docs/sharing.md: the worst of the runs, and speeds of the windows before, in and after the step."""
    host, (low, high) = machine(), details["requests_per_s"]
    rows = []
    for name, runs in details["runs"].items():
        speeds = np.mean([run["samples_per_s"] for run in runs], axis=0)
        parts = (speeds[BEFORE // 2 : BEFORE], speeds[BEFORE : BEFORE + DURING], speeds[-(AFTER // 2) :])
        seen = figures["policies"][name]
        over = " and ".join(str(count) for count in seen["over"])
        rows.append(
            (name, over, seen["settled_after"], *(round(float(part.mean())) for part in parts), seen["recovered_x"])
        )
    head = (
        f"{host['cores']} cores of {host['cpu']}; {MODEL} {SIZE} px, {low:.1f} requests/s, then {high:.1f}, then {low:.1f}; trainer with all "
        f"cores; bound {figures['slo_ms']:.0f} ms, {details['slack']:g} times the p99 alone at {high:.1f}/s; {len(next(iter(details['runs'].values())))} runs each."
    )
    columns = (
        "policy",
        f"windows over, of {DURING}",
        "settled after",
        "samples/s before",
        "in the step",
        "after",
        "after / before",
    )
    return f"{head}\n\n{markdown(columns, rows)}"


def _specs(slo_ms: float) -> dict[str, Spec]:
    shared = {"slo_ms": slo_ms, "window_s": WINDOW_S}
    return {
        "none": {"policy": "none"},
        "slo aimd": {"policy": "slo", "controller": "aimd", **shared},
        "slo pi": {"policy": "slo", "controller": "pi", **shared},
        "idle+slo": {"policy": "idle+slo", "controller": "aimd", **shared},
    }


def _load(slack: float, stop: StopSignal) -> Load:
    """Rates from the service's own time, the bound from its p99 alone at the high one."""
    service_ms = float(np.median(_alone(5.0, 8.0, stop)))
    high = HIGH * 1000 / service_ms
    p99_ms = float(np.quantile(_alone(high, 15.0, stop), 0.99, method="higher"))
    print(f"service {service_ms:.1f} ms, p99 alone at {high:.1f}/s {p99_ms:.1f} ms", flush=True)
    return Load(round(LOW * 1000 / service_ms, 3), round(high, 3), slack * p99_ms)


def _alone(rate: float, seconds: float, stop: StopSignal) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Sojourns in ms without training."""
    service = {"arch": MODEL, "image_size": SIZE, "rate": rate}
    config = {"infer": [service], "arms": ["alone"], "duration_s": seconds, "port": PORT}
    return np.asarray(_run(config, stop).infer_client[MODEL]["sojourn_ms"])


def _cell(load: Load, spec: Spec, repeat: int) -> dict[str, Any]:
    begin, end = BEFORE * WINDOW_S, (BEFORE + DURING) * WINDOW_S
    process = {"name": "step", "rate": load.low, "high": load.high, "from_s": begin, "until_s": end}
    return {
        "train": [JOB],
        "infer": [{"arch": MODEL, "image_size": SIZE, "rate": load.low, "process": process}],
        "arms": ["corun"],
        "duration_s": (BEFORE + DURING + AFTER) * WINDOW_S,
        "sharing": spec,
        "seed": repeat,
        "port": PORT,
    }


def _run(config: Mapping[str, Any], stop: StopSignal) -> Run:
    [pair] = configs.pairs(configs.parse(dict(config)))
    with tempfile.TemporaryDirectory(prefix="corun-step-") as folder:
        run = RunDirectory.create(Path(folder) / "run", pair.resolved(), pair.digest())
        outcome = run_pair(pair, run, stop, lambda line: None)
        if outcome.status != "complete":
            raise RunFault("; ".join(outcome.reasons))
        return read(run.path)


def _judge(run: Run, slo_ms: float) -> dict[str, Any]:
    """p99 and training speed of every 5 s window, and what they say about the goals."""
    [window] = run.select("corun")
    p99s = _p99s(run, window)
    speeds = _speeds(run, window)
    step = p99s[BEFORE : BEFORE + DURING]
    over = [place for place, value in enumerate(step) if value is not None and value > slo_ms]
    before = float(np.mean(speeds[BEFORE // 2 : BEFORE]))
    after = float(np.mean(speeds[-(AFTER // 2) :]))
    return {
        "p99_ms": p99s,
        "samples_per_s": speeds,
        "settled_after": over[-1] + 1 if over else 0,
        "over": len(over),
        "over_before": sum(value is not None and value > slo_ms for value in p99s[:BEFORE]),
        "recovered_x": round(after / before, 3),
    }


def _edges(window: Window) -> list[int]:
    return [round(window.start_ns + WINDOW_S * place * NS_PER_S) for place in range(BEFORE + DURING + AFTER + 1)]


def _p99s(run: Run, window: Window) -> list[float | None]:
    table, edges = run.infer_client[MODEL], _edges(window)
    place = np.searchsorted(edges, table["t_intended_ns"], side="right") - 1
    sojourn = np.where(table["status"] == "OK", table["sojourn_ms"], np.inf)
    return [
        round(float(np.quantile(sojourn[place == window], 0.99, method="higher")), 2)
        if (place == window).any()
        else None
        for window in range(len(edges) - 1)
    ]


def _speeds(run: Run, window: Window) -> list[float]:
    """Samples/s by window; a step across a border counts by the part inside."""
    begin, end, samples = (run.train[name] for name in ("t_start_ns", "t_end_ns", "samples"))
    speeds = []
    for start, stop in itertools.pairwise(_edges(window)):
        inside = np.clip(np.minimum(end, stop) - np.maximum(begin, start), 0, None) / (end - begin)
        speeds.append(round(float((samples * inside).sum()) / WINDOW_S, 2))
    return speeds


def _summary(seen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The worst of the runs, so that no good one hides a bad one."""
    settled = max(run["settled_after"] for run in seen)
    recovered = min(run["recovered_x"] for run in seen)
    return {
        "settled_after": settled,
        "over": [run["over"] for run in seen],
        "recovered_x": recovered,
        "samples_per_s": round(float(np.mean([run["samples_per_s"] for run in seen])), 1),
        "holds": settled <= WITHIN_WINDOWS and recovered >= RECOVERED,
    }


def _line(judged: Mapping[str, Any]) -> str:
    p99s = " ".join("-" if value is None else f"{value:.0f}" for value in judged["p99_ms"])
    return f"p99 ms {p99s}; settled after {judged['settled_after']} windows, training after {judged['recovered_x']} x"


if __name__ == "__main__":
    app()
