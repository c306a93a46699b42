"""The summary of a run of inference loops: shares at the window's edges, floors, and runs that broke off."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from corun.report.loops import show_loops, summarise_loops
from corun.run.records import TRAIN, names
from corun.run.table import TableWriter
from corun.serve.loop import INFER_LOOP

MS = 1_000_000
WINDOW = {"index": 0, "arm": "corun", "repeat": 0, "duration_s": 1.0, "start_ns": 1000 * MS, "stop_ns": 2000 * MS}


def make_run(path: Path, rows: list[dict[str, Any]], segments: list[dict[str, Any]], train: bool = False) -> Path:
    """A run directory with one loop `a` of these rows."""
    path.mkdir(exist_ok=True)
    job = {"arch": "resnet18", "batch_size": 16} if train else None
    manifest = {
        "status": "complete",
        "config": {"loops": [{"name": "a", "arch": "null"}], "services": [], "train": job},
        "segments": segments,
        "processes": [{"role": "loop", "name": "a", "hello": {"weights": "random"}}],
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    with TableWriter(path / "infer_loop" / "a.csv", INFER_LOOP) as table:
        table.rows([{name: row.get(name) for name in names(INFER_LOOP)} for row in rows])
    return path


def inference(start_ms: float, taken_ms: float, status: str = "OK", batch: int = 1) -> dict[str, Any]:
    start = round(start_ms * MS)
    return {
        "id": 0,
        "batch": batch,
        "status": status,
        "latency": taken_ms,
        "segment": 0,
        "t_start_ns": start,
        "t_end_ns": start + round(taken_ms * MS),
    }


def test_an_inference_over_the_edge_counts_by_its_share(tmp_path: Path) -> None:
    """19 inferences of 100 pictures of 50 ms fill 950 ms; the 20th lies half inside."""
    rows = [inference(1000 + 50 * i, 50, batch=100) for i in range(19)] + [inference(1950, 100, batch=100)]
    (row,) = summarise_loops(make_run(tmp_path / "run", rows, [WINDOW])).loops
    assert row.inferences == 20
    assert row.per_s == pytest.approx(1950)
    assert (row.p50_ms, row.max_ms) == (50, 100)
    assert row.p90_ms is row.p99_ms is None, "below 64 and 662 samples a tail is not quoted"


def test_failures_are_counted_beside_never_folded_in(tmp_path: Path) -> None:
    """Only inferences that were OK have a latency and a rate."""
    rows = [inference(1000, 10), inference(1010, 900, "FAILED")]
    (row,) = summarise_loops(make_run(tmp_path / "run", rows, [WINDOW])).loops
    assert (row.inferences, row.failed, row.per_s, row.max_ms) == (1, 1, 1.0, 10)


def test_training_speed_is_that_of_the_window(tmp_path: Path) -> None:
    """Samples of the steps inside the window over its length, as in every other summary."""
    run = make_run(tmp_path / "run", [inference(1000, 10)], [WINDOW], train=True)
    step = {"samples": 16, "t_start_ns": 1000 * MS, "t_end_ns": 1500 * MS, "loss": 1.0}
    with TableWriter(run / "train.csv", TRAIN) as table:
        table.row({name: step.get(name) for name in names(TRAIN)})
    summary = summarise_loops(run)
    assert (summary.train, summary.train_samples_per_s, summary.train_steps) == ("resnet18_16", 16.0, 1)
    assert json.loads((run / "loops.json").read_text())["train_samples_per_s"] == 16.0


def test_a_run_without_a_window_or_rows_reads_as_well(tmp_path: Path) -> None:
    """A run that broke off before its window has no loops in the summary; a loop without rows has none counted."""
    assert summarise_loops(make_run(tmp_path / "none", [], [])).loops == ()
    (row,) = summarise_loops(make_run(tmp_path / "empty", [], [WINDOW])).loops
    assert (row.inferences, row.per_s, row.p50_ms, row.max_ms) == (0, 0.0, None, None)


def test_the_table_fits_100_columns_and_says_na(tmp_path: Path) -> None:
    """One row per loop; what cannot be quoted is n/a."""
    summary = summarise_loops(make_run(tmp_path / "run", [inference(1000, 10)], [WINDOW], train=True))
    console = Console(width=100, record=True, file=io.StringIO())
    show_loops(summary, console)
    text = console.export_text()
    (line,) = [line for line in text.splitlines() if line.split()[:1] == ["a"]]
    assert line.split() == ["a", "random", "1", "0", "1.0", "n/a", "n/a", "n/a", "n/a", "10.0"]
    assert "training resnet18_16: 0.0 samples/s" in text
