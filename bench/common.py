"""What every benchmark does with its figures: keep them with the machine they came from, print them last."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from corun.registry import home
from corun.run.directory import git_state, hardware, versions, write_json

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores, kernel, library versions and load: what a figure is worth nothing without."""
    return {**hardware(), "versions": versions(), "load_average": [round(load, 2) for load in os.getloadavg()]}


def store(name: str, figures: Mapping[str, Any], details: Mapping[str, Any] | None = None) -> Path:
    """Write bench/results/<name>.json: figures as printed, details behind them, date, command and machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    module = sys.modules["__main__"].__spec__
    write_json(
        path,
        {
            "name": name,
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": " ".join(["python -m", module.name if module else name, *sys.argv[1:]]),
            "figures": dict(figures),
            "details": dict(details or {}),
            "machine": machine(),
            "git": git_state(home()),
        },
    )
    return path


def last_line(figures: Mapping[str, Any]) -> None:
    """The figures as one JSON object, the last line of every benchmark's output."""
    print(json.dumps(figures), flush=True)
