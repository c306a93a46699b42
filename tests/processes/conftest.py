"""Real processes for the tests in this directory: free ports, the programs, and nothing left running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.processes.tools import SRC, PortBlocks, Program


@pytest.fixture
def free_port() -> Iterator[Callable[..., int]]:
    """A port with `count` free ports from it on, which no other test is given while this one runs."""
    with PortBlocks() as ports:
        yield ports.take


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start `src/<script> arguments...`; whatever still runs at the end is killed."""
    running: list[subprocess.Popen[str]] = []

    def run(script: str, *arguments: object, prefix: tuple[str, ...] = (), **environment: str) -> Program:
        log = tmp_path / f"output-{len(running)}.txt"
        with open(log, "w") as output:
            popen = subprocess.Popen(
                [*prefix, sys.executable, str(SRC / script), *map(str, arguments)],
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=tmp_path,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200", **environment},
            )
        running.append(popen)
        return Program(popen, log)

    yield run
    for popen in running:
        if popen.poll() is None:
            popen.kill()
        popen.wait()


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Write a config.json; the harness is calibrated only where a test asks for it."""

    def write(value: dict[str, Any]) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"calibrate": False, **value}))
        return path

    return write
