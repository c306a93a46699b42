"""The end of a run of inference loops: rates, percentiles and training speed, as loops.json and as a table.

Rates count an inference over the window's edge by the share of it that lies inside; percentiles are exact, over every
inference of the window that was OK, with the sample floors of `corun.stats.percentiles`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from corun.report.summary import training
from corun.run.directory import read_manifest, write_json
from corun.run.read import Window, read_table, windows
from corun.run.records import TRAIN
from corun.serve.loop import INFER_LOOP
from corun.stats import percentile_of

QUANTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class LoopFigures:
    """One loop in the window; inferences: those that were OK; per_s: pictures a second; None = too few samples."""

    loop: str
    model: str
    weights: str
    inferences: int
    failed: int
    per_s: float | None
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    max_ms: float | None


@dataclass(frozen=True)
class LoopSummary:
    """All loops of a run, and the training job beside them."""

    run: Path
    status: str
    arm: str
    seconds: float
    loops: tuple[LoopFigures, ...]
    train: str
    train_samples_per_s: float | None = None
    train_steps: int | None = None

    def as_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "run": str(self.run)}


def summarise_loops(path: Path) -> LoopSummary:
    """Read a run of loops, whatever state it is in, and write its loops.json."""
    manifest = read_manifest(path)
    measured = windows(manifest)
    config, seconds = manifest["config"], sum(window.seconds for window in measured)
    job = config.get("train")
    speed = training(read_table(path / "train.csv", TRAIN), list(measured)) if job and measured else {}
    summary = LoopSummary(
        run=path,
        status=str(manifest.get("status")),
        arm=measured[0].arm if measured else "",
        seconds=round(seconds, 6),
        loops=tuple(_figures(path, entry, measured[0], manifest) for entry in config["loops"]) if measured else (),
        train=f"{job['arch']}_{job['batch_size']}" if job else "none",
        train_samples_per_s=_rounded(speed.get("train_samples_per_s")),
        train_steps=speed.get("train_steps"),
    )
    write_json(path / "loops.json", summary.as_json())
    return summary


def _figures(path: Path, entry: Mapping[str, Any], window: Window, manifest: Mapping[str, Any]) -> LoopFigures:
    table = read_table(path / "infer_loop" / f"{entry['name']}.csv", INFER_LOOP)
    ok = table["status"] == "OK"
    begin, end, latency = table["t_start_ns"][ok], table["t_end_ns"][ok], table["latency"][ok]
    overlap = np.minimum(end, window.stop_ns) - np.maximum(begin, window.start_ns)
    share = np.clip(overlap / np.maximum(1, end - begin), 0.0, 1.0)
    return LoopFigures(
        loop=entry["name"],
        model=entry["arch"],
        weights=_weights(manifest, entry["name"]),
        inferences=int(ok.sum()),
        failed=int((~ok).sum()),
        per_s=_rounded(float((share * table["batch"][ok]).sum()) / window.seconds) if window.seconds else None,
        **{f"p{quantile}_ms": _rounded(percentile_of(latency, quantile)) for quantile in QUANTILES},
        max_ms=_rounded(float(latency.max())) if len(latency) else None,
    )


def _weights(manifest: Mapping[str, Any], name: str) -> str:
    for process in manifest.get("processes", []):
        if process["role"] == "loop" and process["name"] == name:
            return str((process.get("hello") or {}).get("weights", ""))
    return ""


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def show_loops(summary: LoopSummary, console: Console) -> None:
    """One row per loop, the training speed, and where the files are."""
    title = f"Inference back to back, {summary.arm or 'not measured'}, {summary.seconds:g} s (ms per inference)"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("loop", "weights"):
        table.add_column(name, no_wrap=True)
    for name in ("inferences", "failed", "per s", "p50", "p90", "p95", "p99", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary.loops:
        figures = (row.per_s, row.p50_ms, row.p90_ms, row.p95_ms, row.p99_ms, row.max_ms)
        counts = (str(row.inferences), str(row.failed))
        table.add_row(row.loop, row.weights.split(" ")[0], *counts, *map(_number, figures))
    console.print(table)
    if summary.train != "none":
        speed = _number(summary.train_samples_per_s)
        console.print(
            f"training {summary.train}: {speed} samples/s, {summary.train_steps or 0} steps", highlight=False
        )
    console.print(f"run: {summary.run}", highlight=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"
