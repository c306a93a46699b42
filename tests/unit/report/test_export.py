"""Exports hold what the run holds, in forms other programs read."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.report import export, trace
from corun.report.stages import NAMES
from corun.run.read import Run, read
from corun.run.records import SUMMARY, names
from corun.testing.runs import FakeRun, FakeService, write_run, write_sweep

SHORT = {"alone": 2.0, "train": 1.0, "corun": 2.0}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    services = (FakeService(rate=40, lost_share=0.1), FakeService("yolov5n", rate=30))
    return write_run(tmp_path_factory.mktemp("small") / "run", FakeRun(services, gpu=True, duration_s=SHORT))


def test_summary_csv(small: Path) -> None:
    """The CSV is summary.csv: its columns as documented, one row per arm, repeat and service."""
    rows = list(csv.DictReader(io.StringIO(export.summary_csv([small], small))))
    assert tuple(rows[0]) == names(SUMMARY)
    assert {(row["arm"], row["service"]) for row in rows} >= {("corun", "resnet18"), ("train", "resnet18_16")}
    assert next(row for row in rows if row["role"] == "server")["p99_ms"] == "", "too few samples are empty, not zero"


def test_summary_of_a_sweep(tmp_path: Path) -> None:
    """The rows of a sweep have their cell in front; its JSON is a list of runs."""
    root = write_sweep(tmp_path / "sweep", [FakeRun(seed=seed, duration_s=SHORT) for seed in (0, 1)])
    runs = sorted(path for path in root.iterdir() if path.is_dir())
    rows = list(csv.DictReader(io.StringIO(export.summary_csv(runs, root))))
    assert {row["cell"] for row in rows} == {path.name for path in runs}
    answer = json.loads(json.dumps(export.summary_json(runs, root)))
    assert len(answer["runs"]) == 2


def test_summary_json(small: Path) -> None:
    """The JSON of a run has its arms, ratios, and every reason for doubt."""
    answer = json.loads(json.dumps(export.summary_json([small], small)))
    assert answer["valid"] is False
    assert any("not answered with OK" in reason for reason in answer["reasons"])
    assert answer["arms"]["corun"]["services"]["yolov5n"]["p50_ms"] > 0


def test_parquet_is_the_csv(small: Path) -> None:
    """Every table has a Parquet file with the same rows; instants are exact integers, empty cells null."""
    written = export.parquet(small)
    assert {path.with_suffix(".csv") for path in written} == set(small.rglob("*.csv"))
    table = pyarrow.parquet.read_table(small / "infer_client" / "resnet18.parquet").to_pydict()
    back = read(small).infer_client["resnet18"]
    assert table["t_intended_ns"] == back["t_intended_ns"].tolist()
    assert all(
        (value is None) == (stamp == 0) for value, stamp in zip(table["t_rx_ns"], back["t_rx_ns"], strict=True)
    )
    assert None in table["t_rx_ns"]
    assert pyarrow.parquet.read_schema(small / "profile.parquet").field("psi_io_full_us").type == "int64"


def test_parquet_of_a_cut_file(tmp_path: Path) -> None:
    """A row that a kill cut is left out of the Parquet file too."""
    path = write_run(tmp_path / "run", FakeRun(duration_s=SHORT, stop_after=1))
    source = path / "profile.csv"
    whole = source.read_bytes()
    source.write_bytes(whole[:-5])
    export.parquet(path)
    rows = whole.count(b"\n") - 1
    assert pyarrow.parquet.read_table(path / "profile.parquet").num_rows == rows - 1


# Trace


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30)), max_size=40))
def test_lanes(spans: list[tuple[int, int]]) -> None:
    """Intervals of one lane never overlap, and there are as many lanes as intervals overlap at the worst instant."""
    spans = sorted(spans)
    begin, end = [a for a, _ in spans], [a + length for a, length in spans]
    given_lanes = list(trace.lanes(begin, end))
    by_lane = defaultdict(list)
    for lane, a, b in zip(given_lanes, begin, end, strict=True):
        by_lane[lane].append((a, b))
    for mine in by_lane.values():
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(mine))
    positive = [(a, b) for a, b in zip(begin, end, strict=True) if b > a]
    worst = max((sum(x <= a < y for x, y in positive) for a, _ in positive), default=0)
    assert len(by_lane) <= max(worst, 0) + 1 + (len(spans) - len(positive))


def test_trace_follows_the_format(small: Path) -> None:
    """Every event has what its phase needs, times are finite numbers, and every track has a name."""
    events = json.loads(trace.write_trace(small).read_text())["traceEvents"]
    named = {event["pid"] for event in events if event["ph"] == "M" and event["name"] == "process_name"}
    needed = {
        "X": {"ts", "dur", "name", "cat"},
        "C": {"ts", "args", "name"},
        "i": {"ts", "s", "name"},
        "M": {"args", "name"},
    }
    for event in events:
        assert event.keys() >= {"ph", "pid", "tid"} | needed[event["ph"]]
        assert event["pid"] in named
        assert math.isfinite(event.get("ts", 0.0))
        assert event.get("dur", 0.0) >= 0
    assert {event["ph"] for event in events} == set(needed)


def test_trace_has_every_request(small: Path, run: Run) -> None:
    """Each request is one event; its stages lie inside it on its lane, in order, and do not overlap."""
    events = json.loads(trace.write_trace(small).read_text())["traceEvents"]
    tables = read(small).infer_client
    requests = [event for event in events if event.get("cat") == "request"]
    assert len(requests) == sum(len(table["id"]) for table in tables.values())
    lost = sum(int((table["status"] != "OK").sum()) for table in tables.values())
    assert sum(event["name"] == "LOST" for event in requests) == lost > 0
    stages = defaultdict(list)
    for event in (event for event in events if event.get("cat") == "stage"):
        assert event["name"] in NAMES
        stages[event["pid"], event["tid"]].append(event)
    for request in (request for request in requests if request["name"] != "LOST"):
        end = request["ts"] + request["dur"]
        inside = [s for s in stages[request["pid"], request["tid"]] if request["ts"] - 1 <= s["ts"] < end]
        assert inside
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in itertools.pairwise(inside))
        assert inside[-1]["ts"] + inside[-1]["dur"] <= end + 1e-3


def test_trace_of_a_killed_run(tmp_path: Path) -> None:
    """A run without a complete window has a trace of what there is."""
    path = write_run(tmp_path / "run", FakeRun(duration_s=SHORT, stop_after=0))
    events = json.loads(trace.write_trace(path).read_text())["traceEvents"]
    assert any(event["ph"] == "i" for event in events)


def test_counters_are_steps(small: Path) -> None:
    """A counter's value stands at the beginning of the interval it describes: the trainer's share before its window is 0."""
    run = read(small)
    events = json.loads(trace.write_trace(small).read_text())["traceEvents"]
    cpu = [event for event in events if event["ph"] == "C" and event["name"].startswith("CPU")]
    first_train = (run.select("train")[0].start_ns - run.windows[0].start_ns) / 1e3
    assert np.allclose([event["args"]["trainer"] for event in cpu if event["ts"] < first_train - 1e6], 0)
    assert max(event["args"]["trainer"] for event in cpu) > 1
