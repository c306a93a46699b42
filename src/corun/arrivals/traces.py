"""Reads request traces from CSV files: the only file access of this package besides schedules.

    format        columns read                       what it becomes
    delays        one number a line, no header       gaps in s; the first request is due at 0
    azure-llm     TIMESTAMP                          stamps of 100 ns; LF or CRLF
    burstgpt      Timestamp                          whole seconds: each arrival spread over its second
    minutes       1, 2, 3 ... (per function)         sum over functions, arrivals uniform inside the minute

Columns are found by name, so every BurstGPT release reads alike. Rows are sorted by time, duplicates stay. A file
with malformed rows is refused with one error that names the first twenty and counts the rest; nothing is skipped
silently. Sources: Azure/AzurePublicDataset (Functions 2019, LLM 2023 and 2024), HPMLL/BurstGPT, and the delays that
Real-Time-Lab derived from Azure Functions 2019.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Final

import numpy as np

from corun.arrivals.processes import Seconds
from corun.arrivals.recorded import MinuteCounts, Trace
from corun.errors import InputError, suggest

__all__ = ["FORMATS", "azure_default", "default_rates", "delays_of_rates", "read"]

TRACE_VARIABLE: Final = "CORUN_TRACE"
SHOWN_PROBLEMS: Final = 20
BURSTGPT_RESOLUTION_S: Final = 1.0

Row = tuple[int, list[str]]

_STAMP = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d{1,9})?(?=(Z|\+00:00)?$)")
_DEFAULT_NAME = "azure_functions_2019_day01"


def read(path: Path, format: str = "auto") -> Trace | MinuteCounts:
    """Read a trace file; `auto` tells the format from the first line.

    Raises:
        InputError: no such file or format, a missing column, no data rows, or malformed rows (all of them counted).
    """
    if format != "auto" and format not in FORMATS:
        known = ["auto", *FORMATS]
        raise InputError(f'trace format "{format}" is not known{suggest(format, known)} (known: {", ".join(known)})')
    with _rows(path) as rows:
        number, header = next(rows, (1, []))
        if not header:
            raise InputError(f"{path}: the trace is empty")
        reader = FORMATS[_sniff(path, header) if format == "auto" else format]
        return reader(path, (number, header), rows)


def azure_default(environ: Mapping[str, str] = os.environ) -> Trace | MinuteCounts:
    """What rate 0 means: the trace that $CORUN_TRACE names, else the scaled day 1 of Azure Functions 2019.

    The packaged file holds 288 rates r; each is played for one second as r gaps of 1/r (mean 10.34 requests/s, one
    lap 288 s, dispersion 0.12: an evenly paced load without bursts).
    """
    chosen = environ.get(TRACE_VARIABLE, "")
    if chosen:
        return read(Path(chosen))
    return _of_delays(delays_of_rates(default_rates()), _DEFAULT_NAME)


def default_rates() -> tuple[int, ...]:
    """The 288 requests-per-second figures of the packaged trace, one for every fifth minute of the day."""
    text = resources.files("corun.arrivals").joinpath(f"data/{_DEFAULT_NAME}_rates.csv").read_text("ascii")
    return tuple(int(line) for line in text.split()[1:])


def delays_of_rates(rates: tuple[int, ...]) -> Seconds:
    """For each rate r, r gaps of 1/r s: one second of evenly spaced requests each."""
    counts = np.asarray(rates, dtype=np.int64)
    return np.repeat(1.0 / counts, counts)


def _sniff(path: Path, header: list[str]) -> str:
    names = {name.strip() for name in header}
    if "TIMESTAMP" in names:
        return "azure-llm"
    if "Timestamp" in names:
        return "burstgpt"
    if {"HashFunction", "1"} <= names:
        return "minutes"
    if header[0].startswith("version https://git-lfs"):
        raise InputError(f"{path}: a git-LFS pointer, not the trace itself; fetch the content with `git lfs pull`")
    if len(header) == 1 and _number(header[0]) is not None:
        return "delays"
    shown = ",".join(header)[:80]
    raise InputError(f'{path}: no known trace format begins with "{shown}"; name one of {", ".join(FORMATS)}')


def _read_delays(path: Path, first: Row, rows: Iterator[Row]) -> Trace:
    problems = _Problems(path)
    gaps: list[float] = []
    for line, cells in _chain(first, rows):
        gap = _number(cells[0])
        if len(cells) != 1:
            problems.add(line, f"{len(cells)} values where one delay in seconds is expected")
        elif gap is None or gap < 0:
            problems.add(line, f'"{cells[0]}" is not a delay in seconds')
        else:
            gaps.append(gap)
    problems.raise_if_any()
    if not sum(gaps) > 0:
        raise InputError(f"{path}: all delays are 0; the trace has no duration")
    return _of_delays(np.array(gaps), path.stem)


def _read_azure_llm(path: Path, first: Row, rows: Iterator[Row]) -> Trace:
    stamps_ns: list[int] = []
    problems = _Problems(path)
    for line, cell in _column(path, first, rows, "TIMESTAMP", problems):
        match = _STAMP.match(cell)
        try:
            if match is None:
                raise ValueError(cell)
            stamps_ns.append(int(np.datetime64(match[0], "ns").astype(np.int64)))
        except ValueError:
            problems.add(line, f'"{cell}" is not a stamp such as 2023-11-16 18:15:46.6805900')
    problems.raise_if_any()
    stamps = np.sort(np.array(stamps_ns, dtype=np.int64))
    return _of_stamps((stamps - stamps[:1]) / 1e9, path)


def _read_burstgpt(path: Path, first: Row, rows: Iterator[Row]) -> Trace:
    stamps_s: list[float] = []
    problems = _Problems(path)
    for line, cell in _column(path, first, rows, "Timestamp", problems):
        stamp_s = _number(cell)
        if stamp_s is None or stamp_s < 0:
            problems.add(line, f'"{cell}" is not a Timestamp in seconds from the first midnight')
        else:
            stamps_s.append(stamp_s)
    problems.raise_if_any()
    stamps = np.sort(np.array(stamps_s))
    whole = bool((stamps == np.floor(stamps)).all())
    return _of_stamps(stamps - stamps[:1], path, BURSTGPT_RESOLUTION_S if whole else 0.0)


def _read_minutes(path: Path, first: Row, rows: Iterator[Row]) -> MinuteCounts:
    names = [name.strip() for name in first[1]]
    columns = [place for place, name in enumerate(names) if name.isdecimal()]
    if [int(names[place]) for place in columns] != list(range(1, len(columns) + 1)) or not columns:
        raise InputError(f"{path}: the header must name the minutes 1, 2, 3 ... in order")
    begin, end = columns[0], columns[-1] + 1
    problems = _Problems(path)
    totals = np.zeros(end - begin, dtype=np.int64)
    for line, cells in rows:
        if len(cells) != len(names):
            problems.add(line, f"{len(cells)} values where the header has {len(names)}")
            continue
        try:
            counts = np.array(list(map(int, cells[begin:end])), dtype=np.int64)
        except (ValueError, OverflowError):
            problems.add(line, "a count is not a whole number")
            continue
        if counts.min() < 0:
            problems.add(line, "a count is negative")
        else:
            totals += counts
    problems.raise_if_any()
    return MinuteCounts(tuple(totals.tolist()), label=path.stem)


FORMATS: Final[dict[str, Callable[[Path, Row, Iterator[Row]], Trace | MinuteCounts]]] = {
    "delays": _read_delays,
    "azure-llm": _read_azure_llm,
    "burstgpt": _read_burstgpt,
    "minutes": _read_minutes,
}


def _of_delays(gaps_s: Seconds, label: str) -> Trace:
    """n gaps as n arrivals: the first at 0, each gap leading to the next arrival, the last one to the next lap."""
    ends_s = np.cumsum(gaps_s)
    return Trace(np.concatenate([[0.0], ends_s[:-1]]), float(ends_s[-1]), label)


def _of_stamps(offsets_s: Seconds, path: Path, spread_s: float = 0.0) -> Trace:
    """Arrivals with stamps; the lap ends one mean gap after the last so that repeating it keeps the mean rate."""
    if offsets_s.size < 2 or offsets_s[-1] <= 0:
        raise InputError(f"{path}: a trace needs arrivals at two different times at least")
    span_s = float(offsets_s[-1]) * offsets_s.size / (offsets_s.size - 1)
    return Trace(offsets_s, span_s, path.stem, spread_s=spread_s)


class _Problems:
    """Malformed rows of one file: the first twenty in words, the rest as a number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.shown: list[str] = []

    def add(self, line: int, text: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN_PROBLEMS:
            self.shown.append(f"line {line}: {text}")

    def raise_if_any(self) -> None:
        if not self.count:
            return
        more = self.count - len(self.shown)
        rest = [f"and {more} more"] if more else []
        rows = "row" if self.count == 1 else "rows"
        raise InputError(f"{self.path}: {self.count} malformed {rows}; correct or remove them", [*self.shown, *rest])


@contextmanager
def _rows(path: Path) -> Iterator[Iterator[Row]]:
    """The file's rows with their line numbers, blank lines left out; any failure to read is an InputError."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            yield ((reader.line_num, cells) for cells in reader if cells)
    except OSError as error:
        raise InputError(f"{path}: the trace cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV text file ({error}); unpack it if it is compressed") from error


def _column(path: Path, first: Row, rows: Iterator[Row], name: str, problems: _Problems) -> Iterator[tuple[int, str]]:
    """The cells of one named column with their line numbers; short and long rows become problems."""
    names = [column.strip() for column in first[1]]
    if name not in names:
        raise InputError(f'{path}: there is no column "{name}"{suggest(name, names)} (columns: {", ".join(names)})')
    place = names.index(name)
    for line, cells in rows:
        if len(cells) != len(names):
            problems.add(line, f"{len(cells)} values where the header has {len(names)}")
        else:
            yield line, cells[place].strip()


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _chain(first: Row, rows: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rows
