"""Tables on disk: one CSV row at a time, flushed as it is made, so a killed run keeps all of them."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corun.clock import now_ns
from corun.errors import RunFault
from corun.run.records import EVENTS, Column, names


class TableWriter:
    """Rows of one table; with `append` an existing file goes on below its last whole row.

    A full disk raises RunFault once with the path; rows written so far stay readable.
    """

    def __init__(self, path: Path | str, columns: Sequence[str] | Sequence[Column], append: bool = False) -> None:
        self.path = Path(path)
        self.columns = tuple(column.name if isinstance(column, Column) else column for column in columns)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not (append and self.path.exists() and self.path.stat().st_size)
        self._file = open(self.path, "w" if fresh else "a", newline="", encoding="utf-8")  # noqa: SIM115
        self._writer = csv.writer(self._file, lineterminator="\n")
        if fresh:
            self._begin()

    def _begin(self) -> None:
        """Write the header; a file that does not take it is not kept open."""
        try:
            self.row(self.columns)
        except RunFault:
            with contextlib.suppress(OSError):
                self._file.close()
            raise

    def row(self, values: Sequence[Any] | Mapping[str, Any]) -> None:
        """Write and flush one row; None is an empty cell."""
        self.rows((values,))

    def rows(self, many: Sequence[Sequence[Any] | Mapping[str, Any]]) -> None:
        """Write several rows with one flush."""
        try:
            for values in many:
                cells = [values.get(name) for name in self.columns] if isinstance(values, Mapping) else values
                self._writer.writerow([_one_line(cell) for cell in cells])
            self._file.flush()
        except OSError as error:
            raise RunFault(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise RunFault(f"cannot write {self.path}: {error.strerror or error}") from error

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _one_line(cell: Any) -> Any:
    """Text without carriage returns: the csv module leaves them unquoted, and a reader ends the row there."""
    return cell.replace("\r", " ") if isinstance(cell, str) and "\r" in cell else cell


class EventLog:
    """Appends to events.csv from any process: each row is one write(2) on an O_APPEND descriptor."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        if os.fstat(self._fd).st_size == 0:
            os.write(self._fd, (",".join(names(EVENTS)) + "\n").encode())

    def write(self, kind: str, role: str, name: str = "", detail: str = "", t_ns: int | None = None) -> None:
        """Append one event, stamped now unless t_ns is given."""
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(
            (now_ns() if t_ns is None else t_ns, kind, role, name, " ".join(detail.split()))
        )
        try:
            os.write(self._fd, line.getvalue().encode())
        except OSError as error:
            raise RunFault(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        os.close(self._fd)
