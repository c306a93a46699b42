"""What each sharing policy costs the tail of a service and leaves of training: latency and speed against alone.

    p50_x, p95_x, p99_x   sojourn percentile with training / without, same arrivals
    train_x               training samples/s beside the service / alone with the whole machine
    idle_eff              train_x / (1 - utilisation of the service alone): 1 = nothing is wasted

`--device cuda` serves and trains on a GPU: a set of processes for each way of starting them (separate, capped, under MPS,
as one process with lanes), all of them living through all segments. `--device cpu` runs real servers, clients and trainers on this machine, policies switched between short interleaved
segments; a segment in which others used the machine is run again. `--device simulated` runs the same policies, gates
and controllers, GPU ones included, on a device in virtual time. Percentiles are of all requests of a policy; intervals
are a bootstrap over repeats, which resamples a policy and its baseline together.

    python -m bench.sharing [--device cpu|cuda|simulated] [--quick] [--policies idle,preempt]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from bench.common import RESULTS, fill, last_line, machine, markdown, store
from corun.clock import NS_PER_MS, NS_PER_S
from corun.errors import InputError, guard
from corun.share.controllers import percentile_ms
from corun.share.simulated import Arrangement, Outcome, arrange, simulate
from corun.share.simulation import Load, TrainingCost
from corun.share.slack import choose_micro
from corun.share.spec import parse
from corun.stats import poisson_arrivals, sample_floor

PAGE = RESULTS.parents[1] / "docs" / "sharing.md"
PERCENTILES = (50.0, 95.0, 99.0)
REPLICATES = 2000
LEVEL = 0.95
WITHIN = 1.10
SEED = 20240921

Spec = dict[str, Any]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Cell:
    """One arm in one repeat: sojourns of its requests (ms; inf = no reply), and training samples/s if it trained."""

    sojourns_ms: NDArray[np.float64]
    samples_per_s: float | None = None


@dataclass(frozen=True)
class Measured:
    """cells[name] has one Cell a repeat; `alone` and `train` are the baselines. utilisation: of the service alone."""

    cells: Mapping[str, Sequence[Cell]]
    utilisation: float
    details: Mapping[str, Any]


@app.command()
def main(
    device: Annotated[str, typer.Option(help="cpu, cuda (this machine) or simulated (virtual time)")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="2 repeats instead of 5, or 10 (simulated)")] = False,
    policies: Annotated[str, typer.Option(help="comma-separated names of the table; default: all")] = "",
    seconds: Annotated[float, typer.Option(min=1, help="length of a segment of real processes")] = 8.0,
    repeats: Annotated[int, typer.Option(min=0, help="0 = as --quick says")] = 0,
    service: Annotated[str, typer.Option(help="cuda: model that serves")] = "resnet50",
    trainer: Annotated[str, typer.Option(help="cuda: model that trains")] = "resnet152",
    batch_size: Annotated[int, typer.Option(min=1, help="cuda: samples per training step")] = 32,
) -> None:
    """Measure, store bench/results/sharing_<device>.json, print one JSON object as the last line."""
    with guard():
        chosen = [name.strip() for name in policies.split(",") if name.strip()]
        if device == "simulated":
            measured = measure_simulated(repeats or (2 if quick else 10), chosen)
        elif device == "cpu":
            from bench.sharing_cpu import measure_cpu

            measured = measure_cpu(repeats or (2 if quick else 5), chosen, seconds)
        elif device == "cuda":
            from bench.sharing_sets import Settings, measure_sets, require_gpu

            require_gpu()
            settings = Settings(service, trainer, batch_size=batch_size, seconds=seconds, repeats=repeats or 5)
            measured = measure_sets(replace(settings, repeats=repeats or 2) if quick else settings, chosen)
        else:
            raise InputError(f'device "{device}" is none of cpu, cuda and simulated')
        found = figures(measured)
        details = {"utilisation": measured.utilisation, "quick": quick, **measured.details}
        store(f"sharing_{device}", found, details)
        if not quick and not chosen:
            fill(PAGE, f"sharing_{device}", page_table(found, details))
        print(table(found), flush=True)
        last_line(found)


# Figures


def figures(measured: Measured) -> dict[str, Any]:
    """Ratios of every policy with their intervals, and the one that trains most within 10 % of the p99 alone."""
    rng = np.random.default_rng(SEED)
    names = [name for name in measured.cells if name not in ("alone", "train")]
    found = {name: ratios(measured, name, rng) for name in names}
    within = [name for name in names if found[name]["p99_x"] is not None and found[name]["p99_x"] <= WITHIN]
    best = max(within, key=lambda name: found[name]["train_x"], default=None)
    refused = measured.details.get("refused", {})
    return {"policies": found, "best_within_10pct": best, "refused": refused}


def ratios(measured: Measured, name: str, rng: np.random.Generator) -> dict[str, Any]:
    """One policy's row. A percentile of fewer requests than its floor is given all the same, and listed as such."""
    alone, train, mine = (measured.cells[arm] for arm in ("alone", "train", name))
    row: dict[str, Any] = {}
    bounds: dict[str, list[float] | None] = {}
    everything = np.arange(len(mine))
    picks = rng.integers(len(mine), size=(REPLICATES, len(mine)))
    for percent in PERCENTILES:
        key = f"p{percent:g}_x"
        row[key] = _rounded(_latency_ratio(alone, mine, everything, percent))
        bounds[key] = _interval([_latency_ratio(alone, mine, pick, percent) for pick in picks])
    row["train_x"] = _rounded(_speed_ratio(train, mine, everything))
    bounds["train_x"] = _interval([_speed_ratio(train, mine, pick) for pick in picks])
    idle = 1 - measured.utilisation
    row["idle_eff"] = _rounded(row["train_x"] / idle)
    speed = bounds["train_x"]
    bounds["idle_eff"] = [round(bound / idle, 3) for bound in speed] if speed else None
    row["ci"] = bounds
    count = sum(len(cell.sojourns_ms) for cell in mine)
    row["requests"] = count
    row["below_floor"] = [f"p{percent:g}" for percent in PERCENTILES if count < sample_floor(percent)]
    return row


def _latency_ratio(alone: Sequence[Cell], mine: Sequence[Cell], pick: NDArray[np.intp], percent: float) -> float:
    """Pooled percentile of the picked repeats, with training over without."""
    return _pooled(mine, pick, percent) / _pooled(alone, pick, percent)


def _pooled(cells: Sequence[Cell], pick: NDArray[np.intp], percent: float) -> float:
    samples = np.concatenate([cells[index].sojourns_ms for index in pick])
    return float(np.quantile(samples, percent / 100, method="higher"))


def _speed_ratio(train: Sequence[Cell], mine: Sequence[Cell], pick: NDArray[np.intp]) -> float:
    def mean(cells: Sequence[Cell]) -> float:
        return float(np.mean([cells[index].samples_per_s or 0.0 for index in pick]))

    return mean(mine) / mean(train)


def _interval(draws: Sequence[float]) -> list[float] | None:
    """Percentile bootstrap; None when a ratio is not finite (requests without reply)."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return [round(float(low), 3), round(float(high), 3)] if np.isfinite([low, high]).all() else None


def _rounded(value: float) -> float | None:
    return round(value, 3) if np.isfinite(value) else None


def table(found: Mapping[str, Any]) -> str:
    """The figures for people."""
    lines = [f"{'policy':24} {'p50_x':>7} {'p95_x':>7} {'p99_x':>7} {'[95 % CI]':>16} {'train_x':>8} {'idle_eff':>9}"]
    for name, row in found["policies"].items():
        bounds = row["ci"]["p99_x"]
        interval = f"[{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "n/a"
        cells = [f"{row[key]:7.2f}" if row[key] is not None else "    n/a" for key in ("p50_x", "p95_x", "p99_x")]
        lines.append(f"{name:24} {' '.join(cells)} {interval:>16} {row['train_x']:8.2f} {row['idle_eff']:9.2f}")
    lines.append(f"most training within 10 % of the p99 alone: {found['best_within_10pct']}")
    return "\n".join([*lines, *(f"not to be had here: {line}" for line in refusals(found))])


def refusals(found: Mapping[str, Any]) -> list[str]:
    """`mps: there is no NVIDIA driver ...` for every policy this machine refuses."""
    return [f"{name}: {'; '.join(reasons)}" for name, reasons in found.get("refused", {}).items()]


def page_table(found: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """The figures for docs/sharing.md, with what they were measured on."""
    host = machine()
    where = (
        f"{host['cores']} cores of {host['cpu']}; {details['service']} served, {details['trainer']} trained"
        if "service" in details
        else f"simulated device, service {details['service_ms']:g} ms"
    )
    about = (
        f"{where}; {details['repeats']} repeats of {details['seconds']:g} s, service busy "
        f"{100 * details['utilisation']:.0f} % alone. In brackets: 95 % intervals over repeats."
    )
    columns = ("policy", "p50_x", "p95_x", "p99_x", "train_x", "idle_eff")
    rows = [
        (name, *(_with_interval(row, key) for key in ("p50_x", "p95_x", "p99_x", "train_x", "idle_eff")))
        for name, row in found["policies"].items()
    ]
    best = found["best_within_10pct"] or "none of them"
    text = f"{about}\n\n{markdown(columns, rows)}\n\nMost training within 10 % of the p99 alone: {best}."
    refused = found.get("refused")
    return f"{text}\n\nNot to be had there: {', '.join(refused)}." if refused else text


def _with_interval(row: Mapping[str, Any], key: str) -> str | None:
    bounds = row["ci"][key]
    value = None if row[key] is None else f"{row[key]:.2f}"
    return f"{value} [{bounds[0]:.2f}, {bounds[1]:.2f}]" if value and bounds else value


# The simulated device

SERVICE_MS = 11.0
UTILISATION = 0.3
SIMULATED_S = 120.0
BATCH = 64


def simulated_specs(alone_p99_ms: float, load: Load, cost: TrainingCost) -> dict[str, Spec]:
    """The policies of the simulated table; `slack` is preempt with the micro-step computed from 1.2 x the p99 alone."""
    choice = choose_micro(load.arrivals_ns, load.service_ns, cost.micro_ms, BATCH, 1.2 * alone_p99_ms)
    return {
        "none": {"policy": "none"},
        "stream_priority": {"policy": "stream_priority"},
        "mps": {"policy": "mps", "trainer_percent": 40},
        "mig": {"policy": "mig"},
        "green_context": {"policy": "green_context", "service_sms": 64},
        "throttle": {"policy": "throttle", "duty": 0.5},
        "slo": {"policy": "slo", "slo_ms": 2 * alone_p99_ms, "micro_max": 16},
        "preempt step": {"policy": "preempt", "micro": 1},
        "preempt micro 4": {"policy": "preempt", "micro": 4},
        "preempt micro 16": {"policy": "preempt", "micro": 16},
        "preempt slack": {"policy": "preempt", "micro": choice.micro},
        "preempt online": {"policy": "preempt", "slo_ms": 1.25 * alone_p99_ms},
        "preempt+slo": {"policy": "preempt+slo", "slo_ms": 1.5 * alone_p99_ms, "micro_max": 16, "controller": "pi"},
        "preempt+predictive": {"policy": "preempt+predictive", "micro": 4, "micro_max": 16},
        "preempt 4+priority": {"policy": "preempt+stream_priority", "micro": 4},
        "preempt 8+priority": {"policy": "preempt+stream_priority", "micro": 8},
    }


def poisson_load(seed: int, seconds: float = SIMULATED_S) -> Load:
    """Arrivals at UTILISATION for log-normal service times of about SERVICE_MS."""
    rng = np.random.default_rng(seed)
    rate = UTILISATION / (SERVICE_MS / 1000)
    arrivals = poisson_arrivals(rng, rate, int(1.5 * rate * seconds))
    arrivals = arrivals[arrivals < seconds]
    service = SERVICE_MS * rng.lognormal(0.0, 0.1, len(arrivals))
    return Load((arrivals * NS_PER_S).astype(int).tolist(), (service * NS_PER_MS).astype(int).tolist())


def measure_simulated(repeats: int, chosen: Sequence[str]) -> Measured:
    """All policies on the same arrivals, repeat by repeat."""
    cost, until = TrainingCost(), round(SIMULATED_S * NS_PER_S)
    loads = [poisson_load(SEED + repeat) for repeat in range(repeats)]
    alone = [simulate(Arrangement(), [load], until, trains=False) for load in loads]
    train = simulate(Arrangement(), [], until, batch=BATCH, cost=cost)
    base_ms = float(np.mean([percentile_ms(outcome.sojourns_ns) or 0.0 for outcome in alone]))
    specs = picked(simulated_specs(base_ms, loads[0], cost), chosen)
    cells = {"alone": [_cell(outcome) for outcome in alone], "train": [_cell(train)] * repeats}
    for name, spec in specs.items():
        arrangement = arrange(parse(spec))
        cells[name] = [_cell(simulate(arrangement, [load], until, batch=BATCH, cost=cost)) for load in loads]
        print(f"{name}: {repeats} x {SIMULATED_S:g} s of virtual time", flush=True)
    utilisation = float(np.mean([sum(load.service_ns) / until for load in loads]))
    details = {
        "specs": specs,
        "alone_p99_ms": round(base_ms, 3),
        "train_samples_per_s": round(train.samples_per_s or 0.0, 3),
        "seconds": SIMULATED_S,
        "repeats": repeats,
        "service_ms": SERVICE_MS,
        "training": {"points_samples_ms": cost.points, "resume_ms": cost.resume_ms, "batch": BATCH},
    }
    return Measured(cells, utilisation, details)


def _cell(outcome: Outcome) -> Cell:
    return Cell(np.array(outcome.sojourns_ns, dtype=np.float64) / NS_PER_MS, outcome.samples_per_s)


def picked(specs: dict[str, Spec], chosen: Sequence[str]) -> dict[str, Spec]:
    """The rows of a table that were asked for; InputError names those that are not in it."""
    unknown = [name for name in chosen if name not in specs]
    if unknown:
        raise InputError(f"no such policy in the table: {', '.join(unknown)}", [f"there are: {', '.join(specs)}"])
    return {name: spec for name, spec in specs.items() if not chosen or name in chosen}


if __name__ == "__main__":
    app()
