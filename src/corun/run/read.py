"""Reads a run back: every table of its directory as arrays, or as pandas frames when asked for.

    run = corun.run.read.read("result/20261121-101500-1a2b3c")
    run.infer_client["resnet18"]["sojourn_ms"]      # one numpy array per column
    run.select("corun", 0)                          # windows of an arm, of one repeat

A run that was killed reads like any other: the last row of a file counts only when it was written whole.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corun.clock import NS_PER_S
from corun.errors import InputError
from corun.run.directory import read_manifest
from corun.run.records import EVENTS, INFER_CLIENT, INFER_SERVER, TRAIN, Column

Table = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Window:
    """One measured window of a run, [start_ns, stop_ns) on CLOCK_MONOTONIC."""

    segment: int
    arm: str
    repeat: int
    start_ns: int
    stop_ns: int

    @property
    def seconds(self) -> float:
        return (self.stop_ns - self.start_ns) / NS_PER_S


@dataclass(frozen=True)
class Run:
    """One run directory. A table is a dict of equally long arrays (or a DataFrame with `frames`).

    Tables nobody wrote are there with no rows and, for the profiler's, no columns.
    """

    path: Path
    manifest: dict[str, Any]
    windows: tuple[Window, ...]
    infer_client: Mapping[str, Any] = field(default_factory=dict)
    infer_server: Mapping[str, Any] = field(default_factory=dict)
    infer_loop: Mapping[str, Any] = field(default_factory=dict)
    train: Any = field(default_factory=dict)
    profile: Any = field(default_factory=dict)
    gpu: Any = field(default_factory=dict)
    process: Any = field(default_factory=dict)
    events: Any = field(default_factory=dict)

    def select(self, arm: str, repeat: int | None = None) -> tuple[Window, ...]:
        """The windows of one arm, of one repeat when it is given."""
        return tuple(
            window for window in self.windows if window.arm == arm and (repeat is None or window.repeat == repeat)
        )

    @property
    def services(self) -> tuple[str, ...]:
        """Names of the services that have rows at their client, in the configuration's order."""
        asked = [str(entry.get("name")) for entry in (self.manifest.get("config") or {}).get("services", [])]
        known = [name for name in asked if name in self.infer_client]
        return tuple(dict.fromkeys([*known, *self.infer_client]))

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms that were measured, in the order alone, train, corun."""
        found = {window.arm for window in self.windows}
        return tuple(arm for arm in ("alone", "train", "corun") if arm in found)


def read(path: Path | str, frames: bool = False) -> Run:
    """Read a run directory, whatever state it is in; InputError when it is none or a table is damaged.

    frames: tables as pandas DataFrames (NaN and <NA> for empty cells) instead of dicts of arrays.
    """
    path = Path(path)
    manifest = read_manifest(path)
    view = _frame if frames else _as_is
    return Run(
        path,
        manifest,
        windows(manifest),
        infer_client={name: view(table) for name, table in _folder(path / "infer_client", INFER_CLIENT)},
        infer_server={name: view(table) for name, table in _folder(path / "infer_server", INFER_SERVER)},
        infer_loop={file.stem: view(read_any(file)) for file in sorted((path / "infer_loop").glob("*.csv"))},
        train=view(read_table(path / "train.csv", TRAIN)),
        events=view(read_table(path / "events.csv", EVENTS)),
        **{name: view(read_any(path / f"{name}.csv")) for name in ("profile", "gpu", "process")},
    )


def windows(manifest: Mapping[str, Any]) -> tuple[Window, ...]:
    """The windows a manifest says were measured, in order."""
    return tuple(
        Window(entry["index"], entry["arm"], entry["repeat"], entry["start_ns"], entry["stop_ns"])
        for entry in manifest.get("segments", [])
    )


def read_table(path: Path, columns: Sequence[Column]) -> Table:
    """The named columns of a CSV file, each as one array of equal length.

    int and float cells become float64 (empty = NaN), except instants in ns, which stay exact int64 (empty = 0);
    str cells stay strings. A file that is missing has no rows. A row cut short by a kill is left out.
    """
    header, rows = _rows(path)
    if header:
        missing = [column.name for column in columns if column.name not in header]
        if missing:
            raise InputError(f"{path} lacks the columns {', '.join(missing)}; was it written by another version?")
    places = {name: place for place, name in enumerate(header)}
    return {column.name: _array(path, column, [row[places[column.name]] for row in rows]) for column in columns}


def read_any(path: Path) -> Table:
    """All columns of a table whose columns depend on the machine, the profiler's for instance.

    A column is numeric when each of its cells is a number or empty; `t_ns` and other instants are exact int64.
    """
    header, rows = _rows(path)
    table: Table = {}
    for place, name in enumerate(header):
        cells = [row[place] for row in rows]
        kind = "int" if _is_instant(name) else "float" if _numeric(cells) else "str"
        table[name] = _array(path, Column(name, "ns" if kind == "int" else "", kind, ""), cells)
    return table


def select(table: Table, mask: NDArray[np.bool_]) -> Table:
    """The rows where mask is true."""
    return {name: values[mask] for name, values in table.items()}


def _folder(path: Path, columns: Sequence[Column]) -> list[tuple[str, Table]]:
    return [(file.stem, read_table(file, columns)) for file in sorted(path.glob("*.csv"))]


def _as_is(table: Table) -> Table:
    return table


def _rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and whole rows: a last line without its line end was cut, even when no cell is missing."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    reader = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    header = next(reader, [])
    return header, [row for row in reader if len(row) == len(header)]


def _array(path: Path, column: Column, cells: list[str]) -> NDArray[Any]:
    if column.kind == "str":
        return np.array(cells, dtype=object)
    try:
        if column.unit == "ns" and column.kind == "int":
            return np.array([int(cell) if cell else 0 for cell in cells], dtype=np.int64)
        return np.array([float(cell) if cell else np.nan for cell in cells], dtype=np.float64)
    except ValueError as error:
        raise InputError(f"{path}, column {column.name}: {error}") from error


def _is_instant(name: str) -> bool:
    return name == "t_ns" or (name.startswith("t_") and name.endswith("_ns"))


def _numeric(cells: Sequence[str]) -> bool:
    try:
        for cell in cells:
            if cell:
                float(cell)
    except ValueError:
        return False
    return True


def _frame(table: Table) -> Any:
    """A table as DataFrame; an instant of 0 is a missing one."""
    import pandas as pd

    frame = pd.DataFrame(table)
    for name in frame.columns:
        if frame[name].dtype == np.int64:
            frame[name] = frame[name].astype("Int64").mask(frame[name] == 0)
    return frame
