"""The tables of the Corun paper, at the size of this machine: what n services cost a training job and each other.

    nested        n = 0..4 services beside each trainer, Poisson 30 requests/s each, with and without training
    combinations  every set of two and of three of the four services beside the small trainer
    azure         the nested sets under the packaged Azure trace (about 10 requests/s each), longer windows
    legacy        the nested sets under the original's load: even seconds, one in flight, rests after replies

Three trainers stand for the paper's three: one that waits for its data loader (the regime of the paper's figures, where
the device idles), one small and one heavy. Processes live through all windows of a trainer; sets with and without training
alternate on the same arrivals. Percentiles pool the sojourns of all services and windows of a set, and a set gets as many
windows as its p99 needs requests (not with --quick: too few leave a cell empty).

    python -m bench.corun_paper [--quick]        writes docs/corun-paper.md too, unless --quick
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.common import fill, last_line, machine, markdown, store
from corun.errors import guard
from corun.launch.stage import Observation, Stage
from corun.run import config as configs
from corun.stats.percentiles import percentile_of, sample_floor

PAGE = Path(__file__).resolve().parents[1] / "docs" / "corun-paper.md"

SERVICES = ("mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x1_0", "resnet18")
SIZE, RATE = 64, 30.0
AZURE_S = 17.0
PER_SERVICE = {"poisson": RATE, "azure": 8.5, "legacy": 24.0}
"""Requests/s to expect of each service: the packaged trace's first seconds, and what one in flight comes to."""
TRAINERS: dict[str, dict[str, Any]] = {
    "loader-bound": {
        "arch": "mobilenet_v3_small",
        "data": "sample",
        "batch_size": 16,
        "image_size": 64,
        "workers": 1,
    },
    "small": {"arch": "mobilenet_v3_small", "data": "synthetic", "batch_size": 64, "image_size": 32},
    "heavy": {"arch": "resnet50", "data": "synthetic", "batch_size": 16, "image_size": 64},
}
MIDDLE = "small"
EPOCH = 1024

Names = tuple[str, ...]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Seen:
    """One set in one repeat, with training and without."""

    names: Names
    seconds: float
    corun: Observation
    alone: Observation | None


@app.command()
def main(
    quick: Annotated[bool, typer.Option("--quick", help="one trainer, one repeat, short windows")] = False,
    seconds: Annotated[float, typer.Option(min=1, help="length of a window")] = 6.0,
    repeats: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Measure, store bench/results/corun_paper.json, print one JSON object as the last line."""
    with guard():
        if quick:
            seconds, repeats = 3.0, 1
        trainers = [MIDDLE] if quick else list(TRAINERS)
        nested = [SERVICES[:count] for count in range(len(SERVICES) + 1)]
        figures: dict[str, Any] = {"nested": {}}
        enough = 0 if quick else sample_floor(99)
        for trainer in trainers:
            seen = _measure(trainer, "poisson", nested, repeats, seconds, enough)
            figures["nested"][trainer] = _by_size(seen)
        figures["combinations"] = _by_set(_measure(MIDDLE, "poisson", list(_sets(quick)), 1, seconds, enough))
        if not quick:
            figures["azure"] = _by_size(_measure(MIDDLE, "azure", nested, 1, AZURE_S, enough))
            figures["legacy"] = _by_size(_measure(MIDDLE, "legacy", nested, 1, seconds, enough))
        store("corun_paper", figures, {"quick": quick, "seconds": seconds, "repeats": repeats, **_setting()})
        if not quick:
            fill(PAGE, "measured", page(figures, seconds, repeats))
        last_line(figures)


def _setting() -> dict[str, Any]:
    return {"services": SERVICES, "image_size": SIZE, "rate": RATE, "trainers": TRAINERS, "epoch_samples": EPOCH}


def _sets(quick: bool) -> Iterator[Names]:
    yield ()
    for size in (2,) if quick else (2, 3):
        yield from itertools.combinations(SERVICES, size)


def _pair(trainer: str, load: str) -> configs.Pair:
    asked = {
        "poisson": {"process": "poisson", "rate": RATE},
        "azure": {"process": "poisson", "rate": 0},
        "legacy": {"process": {"name": "legacy", "rate": RATE}, "rate": RATE, "mode": "closed"},
    }[load]
    job = {"count": EPOCH, "device": "cpu", "threads": 1, **TRAINERS[trainer]}
    if job["data"] == "synthetic":
        job["num_classes"] = 10
    services = [{"arch": name, "image_size": SIZE, "device": "cpu", **asked} for name in SERVICES]
    [pair] = configs.pairs(configs.parse({"train": [job], "infer": [services]}))
    return pair


def _measure(trainer: str, load: str, sets: Sequence[Names], repeats: int, seconds: float, enough: int) -> list[Seen]:
    """Every set with training and without, one after the other, repeat by repeat, until it has `enough` requests."""
    windows = {names: _windows(names, PER_SERVICE[load] * seconds, repeats, enough) for names in sets}
    seen = []
    with Stage(_pair(trainer, load), (), max(windows.values()), seconds) as stage:
        for repeat, names in itertools.product(range(max(windows.values())), sets):
            if repeat >= windows[names]:
                continue
            alone = stage.observe(names, repeat=repeat, trains=False) if names else None
            seen.append(Seen(names, seconds, stage.observe(names, repeat=repeat), alone))
            print(f"{trainer} {load} repeat {repeat + 1}: {_line(seen[-1])}", flush=True)
    return seen


def _windows(names: Names, requests: float, repeats: int, enough: int) -> int:
    """Windows of a set whose services send so many requests each in one."""
    return max(repeats, math.ceil(enough / (requests * len(names)))) if names else repeats


def _line(seen: Seen) -> str:
    names = ", ".join(seen.names) or "no service"
    return f"{names}: {seen.corun.samples_per_s:.0f} samples/s, others used {seen.corun.foreign_cores:.2f} cores"


def _by_size(seen: Sequence[Seen]) -> list[dict[str, Any]]:
    """One row per number of services, all windows pooled."""
    base = _speed([one for one in seen if not one.names])
    return [
        _row([one for one in seen if len(one.names) == size], base)
        for size in sorted({len(one.names) for one in seen})
    ]


def _by_set(seen: Sequence[Seen]) -> dict[str, dict[str, Any]]:
    base = _speed([one for one in seen if not one.names])
    chosen = dict.fromkeys(one.names for one in seen if one.names)
    return {" + ".join(names): _row([one for one in seen if one.names == names], base) for names in chosen}


def _row(seen: Sequence[Seen], base: float) -> dict[str, Any]:
    """Training and latency of one set or size. _x: with training over without."""
    speed = _speed(seen)
    row: dict[str, Any] = {
        "services": len(seen[0].names),
        "samples_per_s": round(speed, 2),
        "epoch_s": round(EPOCH / speed, 2),
        "epoch_x": round(base / speed, 3),
        "memory_mib": round(float(np.median([_memory(one.corun) for one in seen])), 1),
    }
    alone = [one.alone for one in seen if one.alone]
    if not alone:
        return row
    with_training, without = _sojourns([one.corun for one in seen]), _sojourns(alone)
    seconds = sum(one.seconds for one in seen)
    row |= {
        "asked_per_s": round(_asked(seen), 2),
        "requests": [len(without), len(with_training)],
        "lost": int(np.isinf(with_training).sum() + np.isinf(without).sum()),
        "answered_per_s": round(float(np.isfinite(with_training).sum()) / seconds, 2),
    }
    for percent in (50, 95, 99):
        before, after = percentile_of(without, percent), percentile_of(with_training, percent)
        row[f"p{percent}_ms"] = [_rounded(before), _rounded(after)]
        row[f"p{percent}_x"] = _rounded(after / before) if before and after else None
    return row


def _asked(seen: Sequence[Seen]) -> float:
    """Requests/s of the set together: as configured, or as many as the trace had."""
    rates = [served.rate for served in seen[0].corun.served]
    if all(rates):
        return sum(rates)
    return len(_sojourns([one.corun for one in seen])) / sum(one.seconds for one in seen)


def _speed(seen: Sequence[Seen]) -> float:
    return float(np.mean([one.corun.samples_per_s or 0.0 for one in seen]))


def _sojourns(observed: Sequence[Observation]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([value for one in observed for served in one.served for value in served.sojourns_ms])


def _memory(observed: Observation) -> float:
    """Private memory of every process and one copy of the mapped files they share, MiB."""
    parts = observed.memory.values()
    return sum(part.private_mib for part in parts) + max((part.shared_mib for part in parts), default=0.0)


def _rounded(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), 3)


# The page


def page(figures: Mapping[str, Any], seconds: float, repeats: int) -> str:
    """The measured half of docs/corun-paper.md."""
    host = machine()
    parts = [
        f"Measured by `python -m bench.corun_paper` on {host['cores']} cores of {host['cpu']}, no GPU; windows of "
        f"{seconds:g} s ({AZURE_S:g} s for the trace), {repeats} or as many as a p99 needs. Services: {', '.join(SERVICES)}, {SIZE} px, one thread each, random weights, "
        f"{RATE:g} requests/s each; trainers with one thread. An epoch is {EPOCH:,} samples. ms: without / with training.",
    ]
    for trainer, rows in figures["nested"].items():
        job = TRAINERS[trainer]
        parts += [f"### {trainer}: {job['arch']}, batch {job['batch_size']}, {job['image_size']} px", _sizes(rows)]
    parts += ["### Which services, not only how many (small trainer)", _combinations(figures["combinations"])]
    parts += ["### The Azure trace (small trainer)", _sizes(figures["azure"])]
    parts += ["### The original's load (small trainer)", _sizes(figures["legacy"])]
    return "\n\n".join(parts)


COLUMNS = ("services", "epoch s", "epoch x", "asked/s", "answered/s", "p50 ms", "p95 ms", "p99 ms", "p99 x", "MiB")


def _sizes(rows: Sequence[Mapping[str, Any]]) -> str:
    return markdown(COLUMNS, [_cells(row["services"], row) for row in rows])


def _combinations(rows: Mapping[str, Mapping[str, Any]]) -> str:
    return markdown(COLUMNS, [_cells(names, row) for names, row in rows.items()])


def _cells(first: Any, row: Mapping[str, Any]) -> tuple[Any, ...]:
    both = (_both(row.get(f"p{percent}_ms")) for percent in (50, 95, 99))
    loads = (row.get("asked_per_s"), row.get("answered_per_s"))
    return (first, row["epoch_s"], row["epoch_x"], *loads, *both, row.get("p99_x"), round(row["memory_mib"]))


def _both(pair: Sequence[float | None] | None) -> str | None:
    if pair is None or None in pair:
        return None
    return " / ".join(f"{value:.1f}" for value in pair)


if __name__ == "__main__":
    app()
