"""Which processes to follow: given by hand, or in a JSON-lines file the launcher appends to.

    {"pid": 4711, "role": "server", "name": "resnet50", "t_ns": 123456789}

The file may not exist yet, and its last line may still be half written; only whole lines are taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from corun.errors import InputError


@dataclass(frozen=True)
class Watched:
    """One process with the part it plays."""

    pid: int
    role: str
    name: str


def parse_pid(text: str) -> Watched:
    """`server:resnet50=4711` as typed after --pid; InputError otherwise."""
    label, equals, pid = text.rpartition("=")
    role, colon, name = label.partition(":")
    if not (equals and colon and role and name and pid.isdigit() and int(pid) > 0):
        raise InputError(f'bad --pid "{text}": write ROLE:NAME=PID, e.g. server:resnet50=4711')
    return Watched(int(pid), role, name)


def parse_line(line: str) -> Watched:
    """One row of the watch file; ValueError says what is wrong with it. Other keys are ignored."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("a row must be a JSON object")
    pid, role, name = row.get("pid"), row.get("role"), row.get("name", "")
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        raise ValueError(f"pid must be a positive number, not {json.dumps(pid)}")
    if not isinstance(role, str) or not role or not isinstance(name, str):
        raise ValueError(f"role and name must be texts, not {json.dumps(role)} and {json.dumps(name)}")
    return Watched(pid, role, name)


class WatchFile:
    """The rows appended since the last look; a stat(2) per tick while nothing changes."""

    def __init__(self, path: Path, fault: Callable[[Exception], None]) -> None:
        self._path = path
        self._fault = fault
        self._offset = 0

    def new(self) -> list[Watched]:
        """Processes named since the last call; a file that became shorter is read from its start."""
        try:
            size = os.stat(self._path).st_size
        except FileNotFoundError:
            return []
        if size == self._offset:
            return []
        if size < self._offset:
            self._offset = 0
        return self._rows(self._read_whole_lines())

    def _read_whole_lines(self) -> str:
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace")

    def _rows(self, text: str) -> list[Watched]:
        rows = []
        for line in filter(str.strip, text.splitlines()):
            try:
                rows.append(parse_line(line))
            except ValueError as error:
                self._fault(error)
        return rows
