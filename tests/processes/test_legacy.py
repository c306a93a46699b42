"""main.py --legacy: the honest load and the original's side by side, from real processes."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.processes.tools import Program


def test_the_originals_load_is_measured_beside_the_honest_one(
    start: Callable[..., Program],
    free_port: Callable[..., int],
    write_config: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
) -> None:
    """A closed loop that rests after each reply sends fewer requests than it was asked for; the open loop sends all."""
    service = {"arch": "null", "rate": 20, "extra": {"service_ms": 40}}
    config = write_config({"infer": [service], "arms": ["alone"], "duration_s": 4, "port": free_port()})
    done = start("main.py", "--config", config, "--legacy", "--quiet", "--no-report", "--out", tmp_path / "out")
    assert done.wait() == 0, done.output()
    with next((tmp_path / "out").glob("*/legacy.csv")).open(newline="") as file:
        honest, original = csv.DictReader(file)
    assert (honest["load"], original["load"]) == ("open loop", "original")
    assert int(original["requests"]) < 0.8 * int(honest["requests"])
    assert "handshake" in done.output()
