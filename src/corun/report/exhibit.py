"""A figure with everything a reader needs to check it: title, caption, alt text and the numbers behind it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from corun.report.look import Draw


@dataclass(frozen=True)
class Data:
    """The numbers of a figure as a table; None is an empty cell."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]

    def csv(self) -> str:
        """The table as CSV text."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([shown(cell, exact=True) for cell in row] for row in self.rows)
        return text.getvalue()


@dataclass(frozen=True)
class Exhibit:
    """One figure of a report. draw is None when there is nothing to draw; the caption then says why."""

    key: str
    title: str
    caption: str
    alt: str = ""
    draw: Draw | None = None
    data: Data | None = None


def missing(key: str, title: str, why: str) -> Exhibit:
    """An exhibit that says in a sentence why it is not there."""
    return Exhibit(key, title, why)


def shown(value: Any, exact: bool = False) -> str:
    """A cell as text: missing is empty, floats have 3 or more significant digits (6 decimals when exact)."""
    if value is None:
        return ""
    if isinstance(value, float):
        if value != value:
            return ""
        if exact:
            return f"{value:.6f}".rstrip("0").rstrip(".")
        return (
            f"{value:,.0f}"
            if abs(value) >= 1000
            else f"{value:.1f}"
            if abs(value) >= 10
            else f"{value:.2f}"
            if abs(value) >= 1
            else f"{value:.3g}"
        )
    return str(value)
