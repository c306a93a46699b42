"""Tools of the tests that start real processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src"


def wait_until(condition: Callable[[], Any], timeout_s: float = 180.0) -> Any:
    """Poll until the condition is true and return its value; fails the test when it never is."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s:g} s: {condition}")


class PortBlocks:
    """Blocks of ports below those that the kernel gives to outgoing connections, each one test's while it is held.

    Processes of one test run side by side and bind a port long after it was asked for: a block is reserved by a name
    in the kernel's abstract socket space, which goes when its holder does.
    """

    SIZE = 16

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    def __enter__(self) -> PortBlocks:
        return self

    def __exit__(self, *exc: object) -> None:
        for name in self._held:
            name.close()

    def take(self, count: int = 1) -> int:
        """The first of `count` free ports in a row."""
        first, end = 20_000, int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        blocks = range(first, end, self.SIZE)
        for block in (*blocks[os.getpid() % len(blocks) :], *blocks):
            if self._reserve(block):
                if all(map(_is_free, range(block, block + count))):
                    return block
                self._held.pop().close()
        raise AssertionError("no free ports")

    def _reserve(self, block: int) -> bool:
        name = socket.socket(socket.AF_UNIX)
        try:
            name.bind(f"\0corun-test-ports-{block}")
        except OSError:
            name.close()
            return False
        self._held.append(name)
        return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


class Program:
    """One of the project's programs, running."""

    def __init__(self, popen: subprocess.Popen[str], log: Path) -> None:
        self.popen = popen
        self._log = log

    @property
    def pid(self) -> int:
        return self.popen.pid

    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout_s: float = 500.0) -> int:
        return self.popen.wait(timeout_s)

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


Start = Callable[..., Program]
Ports = Callable[..., int]
WriteConfig = Callable[[dict[str, Any]], Path]
"""The fixtures start, free_port and write_config."""

TRAIN = {"arch": "squeezenet1_1", "data": "digits", "batch_size": 8, "image_size": 32, "count": 64}
"""A training job that takes steps within seconds, for a config.json."""


def rows_of(path: Path) -> list[dict[str, str]]:
    """All rows of a table."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def run_directory(root: Path) -> Path:
    """The one run in a directory of runs."""
    (path,) = (entry for entry in root.iterdir() if entry.is_dir())
    return path


def manifest_of(run: Path) -> dict[str, Any]:
    """What a run says of itself so far."""
    value: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return value


def pids_of(run: Path) -> dict[str, int]:
    """Every process a launcher has started, by role and name."""
    lines = (run / "processes.jsonl").read_text().splitlines()
    return {f"{row['role']} {row['name']}": row["pid"] for row in map(json.loads, lines)}


def in_a_window(root: Path) -> Path:
    """The one run in a directory of runs, once its first window has begun."""
    run: Path = wait_until(lambda: list(root.glob("*/events.csv")))[0].parent
    wait_until(lambda: "window_start" in (run / "events.csv").read_text())
    return run
