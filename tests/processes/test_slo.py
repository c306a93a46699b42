"""Exit codes a script can rely on: 0 promises kept, 3 not kept or not shown, 1 failed; resumed sweeps are judged too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.processes.tools import Program

Start = Callable[..., Program]
Ports = Callable[..., int]
WriteConfig = Callable[[dict[str, Any]], Path]

FAST = {"arch": "null", "rate": 60, "image_size": 32, "count": 4}


@pytest.mark.parametrize(
    ("slo", "code", "word"),
    [
        ({"p50_ms": 5000, "max_ms": 9000}, 0, "met"),
        ({"p50_ms": 0.001}, 3, "missed"),
        ({"p99_ms": 9000}, 3, "cannot tell"),
    ],
)
def test_promises_decide_the_exit_code(
    start: Start,
    free_port: Ports,
    write_config: WriteConfig,
    tmp_path: Path,
    slo: dict[str, float],
    code: int,
    word: str,
) -> None:
    """Kept is 0; missed, and too few requests to tell, are 3; table, JSON and slo.json have the verdict."""
    config = write_config({"infer": [{**FAST, "slo": slo}], "duration_s": 1.5, "port": free_port()})
    program = start("main.py", "--config", config, "--out", tmp_path / "result", "--json")
    assert program.wait() == code, program.output()
    answer = json.loads(program.output().splitlines()[-1])
    assert answer["slo"] == word
    assert {promise["word"] for promise in answer["promises"]} == {word}
    assert f"{word}" in program.output().partition("Promises")[2]
    (path,) = (tmp_path / "result").glob("*/slo.json")
    assert json.loads(path.read_text())["slo"] == word
    assert json.loads((path.parent / "manifest.json").read_text())["slo"] == {"null": slo}


def test_a_failed_cell_is_1_whatever_was_promised(
    start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """A cell that could not be measured is a failure, not a missed promise."""
    missing = {**FAST, "data": str(tmp_path / "nowhere"), "slo": {"p50_ms": 0.001}}
    config = write_config({"infer": [missing], "duration_s": 0.5, "port": free_port()})
    program = start("main.py", "--config", config, "--out", tmp_path / "result")
    assert program.wait() == 1, program.output()


def test_a_resumed_sweep_is_judged_by_the_promises_of_today(
    start: Start, free_port: Ports, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Promises are not part of what is measured: cells that are done stay done and answer to the new bounds."""
    grid = {"infer": [FAST, {**FAST, "rate": 70}], "duration_s": 1, "port": free_port()}
    first = start("main.py", "--config", write_config(grid), "--out", tmp_path / "result", "--quiet")
    assert first.wait() == 0, first.output()
    config = write_config({**grid, "slo": {"p50_ms": 0.001}})
    second = start("main.py", "--config", config, "--out", tmp_path / "result")
    assert second.wait() == 3, second.output()
    assert second.output().count("done before") == 2
