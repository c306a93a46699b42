"""Sweeps that are stopped and started again: every cell measured once, none lost, none repeated."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.processes.tools import ROOT, Program, wait_until

Start = Callable[..., Program]
Ports = Callable[..., int]
WriteConfig = Callable[[dict[str, Any]], Path]

MODELS = ("idle_a", "idle_b", "idle_c")
PLUGIN = """
from dataclasses import replace
from corun.registry import load_plugin
(NULL,) = load_plugin("models", "null").MODELS

def build(name):
    def serve(options):
        servable = NULL.serve(options)
        servable.info = replace(servable.info, model=name)
        return servable
    return replace(NULL, name=name, serve=serve)

MODELS = tuple(build(name) for name in {names!r})
"""


@pytest.fixture
def home(tmp_path: Path) -> str:
    """A CORUN_HOME whose models answer at once, so that a cell takes no longer than its processes."""
    path = tmp_path / "home"
    (path / "models").mkdir(parents=True)
    for name in ("src", "datasets"):
        (path / name).symlink_to(ROOT / name)
    (path / "models" / "null.py").symlink_to(ROOT / "models" / "null.py")
    (path / "models" / "idle.py").write_text(PLUGIN.format(names=MODELS))
    return str(path)


def _sweep(root: Path) -> Path:
    (path,) = root.glob("sweep-*")
    return path


def _complete(sweep: Path) -> dict[Path, bytes]:
    """The manifests that say complete, as they are on disk."""
    found = {path: path.read_bytes() for path in sweep.glob("*/manifest.json")}
    return {path: text for path, text in found.items() if json.loads(text)["status"] == "complete"}


def _index(sweep: Path) -> list[dict[str, str]]:
    with open(sweep / "index.csv", newline="") as file:
        return list(csv.DictReader(file))


def _launchers(sweep: Path) -> dict[str, list[int]]:
    """Which processes measured each cell: a cell that was measured again has its last one only."""
    found: dict[str, list[int]] = {}
    for path in sweep.glob("*/processes.jsonl"):
        rows = map(json.loads, path.read_text().splitlines())
        found[path.parent.name] = [row["pid"] for row in rows if row["role"] == "launcher"]
    return found


@pytest.mark.timeout(1200)
def test_a_killed_client_sweep_goes_on_where_it_stopped(
    start: Start, free_port: Ports, home: str, tmp_path: Path
) -> None:
    """3 models choose 2, 2 rates, 2 repeats: killed in the middle, started again, 12 cells and none twice."""
    port = free_port(2)
    start("multi_server.py", "--num", 2, "--port", port, "--out", tmp_path / "servers", CORUN_HOME=home)
    arguments = ("--models", *MODELS, "--comb", 2, "--rates", 30, 60, "--repeat", 2, "--duration", 0.3)
    arguments += ("--port", port, "--image-size", 32, "--out", tmp_path / "result")

    logs = tmp_path / "servers" / "logs"
    wait_until(lambda: sum("ready" in log.read_text() for log in logs.glob("*.log")) == 2)
    first = start("multi_client.py", *arguments, CORUN_HOME=home)
    wait_until(lambda: len(list((tmp_path / "result").glob("sweep-*/*/summary.csv"))) >= 3, 500)
    first.signal(signal.SIGKILL)
    first.wait()
    sweep = _sweep(tmp_path / "result")
    done = _complete(sweep)
    assert 2 <= len(done) < 12

    second = start("multi_client.py", *arguments, CORUN_HOME=home)
    assert second.wait() == 0, second.output()
    assert second.output().count("done before") == len(done)
    assert len(_complete(sweep)) == 12
    assert {path: path.read_bytes() for path in done} == done
    measured_by = _launchers(sweep)
    assert len(measured_by) == 12
    assert all(len(pids) == 1 for pids in measured_by.values())
    assert {cell for cell, pids in measured_by.items() if pids == [first.pid]} == {path.parent.name for path in done}
    assert sum(pids == [second.pid] for pids in measured_by.values()) == 12 - len(done)
    rows = _index(sweep)
    assert {row["cell"] for row in rows} == set(measured_by)
    assert [row["status"] for row in rows] == ["complete"] * 12

    third = start("multi_client.py", *arguments, CORUN_HOME=home)
    assert third.wait() == 0
    assert third.output().count("done before") == 12
    assert _launchers(sweep) == measured_by


def test_the_cells_of_a_client_sweep_are_all_different(start: Start, home: str, tmp_path: Path) -> None:
    """--dry-run lists every combination at every rate and repeat, and makes nothing."""
    arguments = ("--models", *MODELS, "--comb", 2, "--rates", 30, 60, "--repeat", 2, "--out", tmp_path / "result")
    program = start("multi_client.py", *arguments, "--dry-run", CORUN_HOME=home)
    assert program.wait() == 0
    assert "12 cells, about" in program.output()
    for pair in ("idle_a, idle_b", "idle_a, idle_c", "idle_b, idle_c"):
        assert program.output().count(pair) == 4
    assert not (tmp_path / "result").exists()


@pytest.mark.timeout(1200)
def test_an_interrupted_grid_goes_on_and_fresh_measures_again(
    start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Two pairs: Ctrl-C in the second keeps the first; the next start measures the second only; --fresh both."""
    services = [{"arch": "null", "rate": rate, "image_size": 32, "count": 4} for rate in (40, 80)]
    config = write_config({"infer": services, "duration_s": 3, "port": free_port()})
    arguments = ("--config", config, "--no-calibrate", "--out", tmp_path / "result")

    dry = start("main.py", *arguments, "--dry-run")
    assert dry.wait() == 0
    assert "2 cells, about" in dry.output()
    assert not (tmp_path / "result").exists()

    first = start("main.py", *arguments)
    wait_until(lambda: list((tmp_path / "result").glob("sweep-*/index.csv")))
    sweep = _sweep(tmp_path / "result")
    wait_until(lambda: any("window_start" in path.read_text() for path in _second(sweep, "events.csv")))
    first.signal(signal.SIGINT)
    assert first.wait() == 130, first.output()
    done = _complete(sweep)
    assert len(done) == 1
    assert [row["status"] for row in _index(sweep)] == ["complete", "interrupted"]

    second = start("main.py", *arguments)
    assert second.wait() == 0, second.output()
    assert second.output().count("done before") == 1
    assert {path: path.read_bytes() for path in done} == done
    complete = _complete(sweep)
    assert len(complete) == 2
    assert [row["status"] for row in _index(sweep)] == ["complete"] * 2

    fresh = start("main.py", *arguments, "--fresh")
    assert fresh.wait() == 0, fresh.output()
    assert "done before" not in fresh.output()
    again = _complete(sweep)
    assert again.keys() == complete.keys()
    assert all(again[path] != complete[path] for path in complete)
    assert all(pids == [fresh.pid] for pids in _launchers(sweep).values())


def _second(sweep: Path, name: str) -> list[Path]:
    """That file in cells that are not complete yet."""
    done = {path.parent for path in _complete(sweep)}
    return [path for path in sweep.glob(f"*/{name}") if path.parent not in done]
