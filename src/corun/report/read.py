"""A run directory as arrays: one structured view per table, torn last rows left out."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corun.errors import InputError
from corun.run.records import Column

Table = dict[str, NDArray[Any]]


def read_table(path: Path, columns: Sequence[Column]) -> Table:
    """The named columns of a CSV file, each as one array of equal length.

    int and float cells become float64 (empty = NaN), except columns in ns, which stay exact int64 (empty = 0);
    str cells stay strings. A file that is missing has no rows. A row cut short by a kill is left out.
    """
    wanted = {column.name: column for column in columns}
    cells: dict[str, list[str]] = {name: [] for name in wanted}
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            missing = [name for name in wanted if name not in header]
            if missing:
                raise InputError(f"{path} lacks the columns {', '.join(missing)}; was it written by another version?")
            places = [(name, header.index(name)) for name in wanted]
            for row in reader:
                if len(row) == len(header):
                    for name, place in places:
                        cells[name].append(row[place])
    return {name: _array(values, wanted[name]) for name, values in cells.items()}


def _array(values: list[str], column: Column) -> NDArray[Any]:
    if column.kind == "str":
        return np.array(values, dtype=object)
    if column.unit == "ns" and column.kind == "int":
        return np.array([int(value) if value else 0 for value in values], dtype=np.int64)
    return np.array([float(value) if value else np.nan for value in values], dtype=np.float64)


def select(table: Table, mask: NDArray[np.bool_]) -> Table:
    """The rows where mask is true."""
    return {name: values[mask] for name, values in table.items()}
