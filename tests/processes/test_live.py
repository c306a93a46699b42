"""What a person sees while a run is measured, in a terminal and without one, and what the harness alone costs."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.processes.tools import SRC, Program

Start = Callable[..., Program]
Ports = Callable[..., int]
WriteConfig = Callable[[dict[str, Any]], Path]

TRAIN = {"arch": "squeezenet1_1", "data": "digits", "batch_size": 8, "image_size": 32, "count": 64}
FAST = {"arch": "null", "rate": 40, "image_size": 32, "count": 4}


def _run(root: Path) -> Path:
    (path,) = (entry for entry in root.iterdir() if entry.is_dir())
    return path


def _json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def test_json_lines_while_running(start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path) -> None:
    """--json: one object a second with services, training and CPU, then the answer; what it cost is in the manifest."""
    config = write_config(
        {"train": [TRAIN], "infer": [FAST], "duration_s": 4.5, "port": free_port(), "arms": ["alone", "corun"]}
    )
    program = start("main.py", "--config", config, "--out", tmp_path / "result", "--json")
    assert program.wait() == 0, program.output()
    lines = program.output().splitlines()
    looks = [json.loads(line)["live"] for line in lines if line.startswith('{"live"')]
    assert {look["arm"] for look in looks} == {"alone", "corun"}
    assert all(look["left_s"] < 4.5 for look in looks)
    last = [look for look in looks if look["arm"] == "corun"][-1]
    (service,) = last["services"]
    assert (service["name"], service["errors"]) == ("null", 0)
    assert service["rate"] > 0
    assert service["p50_ms"] > 0
    assert last["train"]["samples_per_s"] > 0
    assert {"server", "trainer", "client"} <= set(last["machine"]["roles"])
    assert looks[0]["train"] is None
    assert set(json.loads(lines[-1])["arms"]) == {"alone", "corun"}
    cost = _json(_run(tmp_path / "result") / "manifest.json")["live"]
    assert cost["ticks"] == len(looks)
    assert cost["fault"] == ""


def test_quiet_shows_the_tables_only(
    start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """--quiet: no progress, no looks; the tables and the path of the run remain."""
    config = write_config({"infer": [FAST], "duration_s": 1, "port": free_port()})
    program = start("main.py", "--config", config, "--out", tmp_path / "result", "--quiet")
    assert program.wait() == 0, program.output()
    assert "starting" not in program.output()
    assert "Latency in ms" in program.output()
    assert f"run: {tmp_path}" in program.output()
    assert "live" not in _json(_run(tmp_path / "result") / "manifest.json")


def test_a_panel_on_a_terminal(free_port: Ports, write_config: WriteConfig, tmp_path: Path) -> None:
    """On a terminal the window is a panel redrawn in place; the tables follow when it is gone."""
    config = write_config({"infer": [FAST], "duration_s": 4, "port": free_port()})
    master, slave = pty.openpty()
    program = subprocess.Popen(
        [sys.executable, str(SRC / "main.py"), "--config", str(config), "--out", str(tmp_path / "result")],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"},
    )
    os.close(slave)
    try:
        shown = _everything(master)
        assert program.wait(500) == 0, shown
    finally:
        program.kill()
        program.wait()
        os.close(master)
    assert shown.count("answers/s") >= 2
    assert "\x1b[2K" in shown
    assert shown.rindex("answers/s") < shown.index("Latency in ms")


def _everything(master: int) -> str:
    """What was written to a terminal until its last user closed it."""
    parts = []
    while True:
        try:
            parts.append(os.read(master, 65536))
        except OSError:
            return b"".join(parts).decode(errors="replace")


def test_the_harness_is_calibrated_once_and_stored_with_every_run(
    start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Each cell of a grid has the same calibration.json with quotable percentiles; the answer shows it too."""
    grid = {"infer": [FAST, {**FAST, "rate": 50}], "duration_s": 0.5, "port": free_port(), "calibrate": True}
    program = start("main.py", "--config", write_config(grid), "--out", tmp_path / "result", "--json")
    assert program.wait() == 0, program.output()
    assert program.output().count("calibrating") == 1
    files = list((tmp_path / "result").glob("sweep-*/*/calibration.json"))
    first, second = (_json(path) for path in files)
    assert first == second == json.loads(program.output().splitlines()[-1])["calibration"]
    assert first["status"] == "complete"
    assert first["requests"] > 662
    assert 0 < first["slip_p50_us"] <= first["slip_p99_us"] <= first["slip_max_us"]
    assert 0 < first["response_p50_us"] <= first["response_p99_us"]
    assert _json(files[0].parent / "validity.json")["calibration"] == first


def test_no_calibrate(start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path) -> None:
    """--no-calibrate overrides the file, and nothing is stored."""
    config = write_config({"infer": [FAST], "duration_s": 0.5, "port": free_port(), "calibrate": True})
    program = start("main.py", "--config", config, "--out", tmp_path / "result", "--no-calibrate")
    assert program.wait() == 0, program.output()
    assert "calibrating" not in program.output()
    assert not (_run(tmp_path / "result") / "calibration.json").exists()
