"""Compares two sets of runs: slower, faster, no difference, or cannot tell.

The unit is one repeat of one run, never a request: requests of one queue are not independent, and resampling them
calls two identical services different four times in five. A side is a run directory (its repeats are the units) or a
directory of runs, for example a sweep; runs of one cell count together. Sides are paired when they have the same
schedules and repeats. With one repeat a side there is no spread to judge by and the answer is "cannot tell".

Many figures are compared at once, so each p-value is also given after Holm's correction over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from corun.errors import InputError
from corun.report.page import short_label
from corun.report.summary import Row, Summary, summarise
from corun.report.sweep_page import is_sweep, run_directories
from corun.report.validity import check
from corun.stats.compare import ALPHA, Comparison, Verdict, compare_runs, holm
from corun.stats.intervals import minimum_length

Better = Literal["lower", "higher"]

ARMS = ("alone", "train", "corun")
DESCRIBED = ("config", "sharing", "threads", "hardware", "versions", "git")


def _answers(row: Row) -> float | None:
    """Requests answered with OK per second of the window."""
    return row["ok"] / row["requests"] * row["intended_rate"] if row["requests"] else None


@dataclass(frozen=True)
class Figure:
    """What is compared: its name and unit, whose it is, which direction is better, and where a row has it."""

    name: str
    unit: str
    role: str
    better: Better
    of: Callable[[Row], float | None]


FIGURES = (
    Figure("p50", "ms", "server", "lower", itemgetter("p50_ms")),
    Figure("p90", "ms", "server", "lower", itemgetter("p90_ms")),
    Figure("p95", "ms", "server", "lower", itemgetter("p95_ms")),
    Figure("p99", "ms", "server", "lower", itemgetter("p99_ms")),
    Figure("answers", "1/s", "server", "higher", _answers),
    Figure("training", "samples/s", "trainer", "higher", itemgetter("train_samples_per_s")),
)


@dataclass(frozen=True)
class Unit:
    """One repeat of one run: its rows of the summary, and what it is paired by."""

    schedule: str
    repeat: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Side:
    """The units of one directory by cell, one manifest of each cell, and how many flags its runs carry."""

    path: Path
    cells: Mapping[str, tuple[Unit, ...]]
    manifests: Mapping[str, dict[str, Any]]
    doubts: int


@dataclass(frozen=True)
class Line:
    """One figure of both sides: typical values (geometric means over the units), comparison, p after Holm."""

    cell: str
    arm: str
    who: str
    figure: str
    unit: str
    baseline: float | None
    candidate: float | None
    paired: bool
    result: Comparison
    p_holm: float | None = None


@dataclass(frozen=True)
class Result:
    """All figures compared, cells that only one side has, and what differs between the sides' manifests."""

    baseline: Side
    candidate: Side
    margin: float
    lines: tuple[Line, ...]
    unmatched: tuple[str, ...]
    differences: tuple[tuple[str, Any, Any], ...]
    notes: tuple[str, ...]


def compare(baseline: Path, candidate: Path, margin: float = 0.05) -> Result:
    """Compare two directories; InputError when one is no run, or when they have nothing in common."""
    sides = load(baseline), load(candidate)
    pairs = _matched(*sides)
    lines = [line for cell, units in pairs.items() for line in _lines(cell, *units, margin)]
    if not lines:
        raise InputError(
            f"{baseline} and {candidate} have nothing in common to compare",
            [f"{side.path}: {', '.join(side.cells) or 'no complete window'}" for side in sides],
        )
    return Result(
        *sides,
        margin,
        tuple(_corrected(lines)),
        tuple(sorted(sides[0].cells.keys() ^ sides[1].cells.keys())) if pairs.keys() <= sides[0].cells.keys() else (),
        tuple(_differences(*sides)),
        tuple(_notes(lines, pairs)),
    )


def load(path: Path) -> Side:
    """Read a run, or every run of a directory."""
    cells: dict[str, list[tuple[Any, Unit]]] = {}
    manifests: dict[str, dict[str, Any]] = {}
    doubts = 0
    for folder in run_directories(path) if is_sweep(path) else [path]:
        summary = summarise(folder)
        doubts += len(check(summary))
        cell = cell_name(summary.manifest)
        manifests.setdefault(cell, summary.manifest)
        seed = (summary.manifest.get("config") or {}).get("seed", 0)
        cells.setdefault(cell, []).extend(((seed, unit.repeat), unit) for unit in _units(summary))
    ordered = {cell: tuple(unit for _, unit in sorted(rows, key=lambda row: row[0])) for cell, rows in cells.items()}
    return Side(path, ordered, manifests, doubts)


def cell_name(manifest: Mapping[str, Any]) -> str:
    """What ran beside what and at which rates: runs with the same name are repeats of each other."""
    rates = [f"{entry['rate']:g}/s" for entry in (manifest.get("config") or {}).get("services", [])]
    return f"{short_label(dict(manifest))} ({', '.join(rates)})" if rates else short_label(dict(manifest))


def _units(summary: Summary) -> Iterator[Unit]:
    schedule = str(summary.manifest.get("schedule_sha256", summary.run))
    repeats = sorted({row["repeat"] for row in summary.rows if row["repeat"] is not None})
    for repeat in repeats:
        yield Unit(schedule, repeat, tuple(row for row in summary.rows if row["repeat"] == repeat))


def _matched(a: Side, b: Side) -> dict[str, tuple[tuple[Unit, ...], tuple[Unit, ...]]]:
    """Cells of the same name; two single cells are compared whatever they are called."""
    both = {cell: (units, b.cells[cell]) for cell, units in a.cells.items() if cell in b.cells}
    if not both and len(a.cells) == len(b.cells) == 1:
        (first, units), (second, others) = *a.cells.items(), *b.cells.items()
        return {f"{first} | {second}": (units, others)}
    return both


def _lines(cell: str, a: Sequence[Unit], b: Sequence[Unit], margin: float) -> Iterator[Line]:
    alike = [(unit.schedule, unit.repeat) for unit in a] == [(unit.schedule, unit.repeat) for unit in b]
    for arm in ARMS:
        for who, role in _names(a, b, arm):
            for figure in (figure for figure in FIGURES if figure.role == role):
                before, after = (_values(units, arm, who, figure) for units in (a, b))
                paired = alike and len(before) == len(after)
                result = compare_runs(before, after, paired=paired, better=figure.better, margin=margin)
                yield Line(
                    cell, arm, who, figure.name, figure.unit, _typical(before), _typical(after), paired, result
                )


def _names(a: Sequence[Unit], b: Sequence[Unit], arm: str) -> list[tuple[str, str]]:
    """Name and role of whatever both sides have in this arm, in the order of the first."""
    sides = [
        dict.fromkeys((row["service"], row["role"]) for unit in units for row in unit.rows if row["arm"] == arm)
        for units in (a, b)
    ]
    return [name for name in sides[0] if name in sides[1]]


def _values(units: Sequence[Unit], arm: str, who: str, figure: Figure) -> list[float | None]:
    """The figure of every unit that has this arm."""
    rows = [row for unit in units for row in unit.rows if row["arm"] == arm and row["service"] == who]
    return [figure.of(row) for row in rows]


def _typical(values: Sequence[float | None]) -> float | None:
    """Geometric mean of the units that have the figure."""
    known = [value for value in values if value]
    return math.exp(sum(math.log(value) for value in known) / len(known)) if known else None


def _corrected(lines: Sequence[Line]) -> Iterator[Line]:
    tested = [line for line in lines if line.result.p is not None]
    adjusted = dict(zip(map(id, tested), holm([line.result.p or 0.0 for line in tested]), strict=True))
    for line in lines:
        yield replace(line, p_holm=adjusted.get(id(line)))


def chance(line: Line) -> bool:
    """A difference that is no longer one after correcting for how many figures were compared."""
    different = line.result.verdict in (Verdict.SLOWER, Verdict.FASTER)
    return different and line.p_holm is not None and line.p_holm > ALPHA


# What else differs


def _differences(a: Side, b: Side) -> Iterator[tuple[str, Any, Any]]:
    """Keys of the manifests whose values differ, for the first cell both have (or the only one of each)."""
    cell = next((cell for cell in a.manifests if cell in b.manifests), None)
    first = a.manifests[cell] if cell else next(iter(a.manifests.values()), {})
    second = b.manifests[cell] if cell else next(iter(b.manifests.values()), {})
    for part in DESCRIBED:
        left, right = dict(_flat(part, first.get(part))), dict(_flat(part, second.get(part)))
        for key in dict.fromkeys([*left, *right]):
            if left.get(key) != right.get(key):
                yield key, left.get(key), right.get(key)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """`config.services.0.rate` = 20 for every leaf."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _flat(f"{name}.{index}", inner)
    else:
        yield name, value


def _notes(lines: Sequence[Line], pairs: Mapping[str, tuple[Sequence[Unit], Sequence[Unit]]]) -> Iterator[str]:
    units = [unit for sides in pairs.values() for side in sides for unit in side]
    lengths = [row["ok"] for unit in units for row in unit.rows if row["role"] == "server"]
    needed = minimum_length(99)
    if lengths and min(lengths) < needed and any(line.result.ratio for line in lines if line.figure == "p99"):
        yield (
            f"the shortest repeat has {min(lengths)} answers; an interval of p99 that holds what it says needs about "
            f"{needed} a repeat: lengthen the windows before adding repeats"
        )
    if any(chance(line) for line in lines):
        yield f"† no longer a difference after Holm's correction over {len(lines)} figures: it may be chance"
    if min((len(side) for sides in pairs.values() for side in sides), default=0) < 2:
        yield "one repeat a side cannot tell: measure with repeat 5, or compare directories of several runs"


# Output


def as_json(result: Result) -> dict[str, Any]:
    """Everything as plain JSON values."""
    return {
        "baseline": str(result.baseline.path),
        "candidate": str(result.candidate.path),
        "margin": result.margin,
        "lines": [_line_json(line) for line in result.lines],
        "unmatched": list(result.unmatched),
        "differences": [{"key": key, "baseline": a, "candidate": b} for key, a, b in result.differences],
        "doubts": {"baseline": result.baseline.doubts, "candidate": result.candidate.doubts},
        "notes": list(result.notes),
    }


def _line_json(line: Line) -> dict[str, Any]:
    result, ratio = line.result, line.result.ratio
    return {
        "cell": line.cell,
        "arm": line.arm,
        "who": line.who,
        "figure": line.figure,
        "unit": line.unit,
        "baseline": line.baseline,
        "candidate": line.candidate,
        "runs": [result.baseline_runs, result.candidate_runs],
        "paired": line.paired,
        "verdict": str(result.verdict),
        "negligible": result.negligible,
        "ratio": ratio.point if ratio else None,
        "low": ratio.low if ratio else None,
        "high": ratio.high if ratio else None,
        "p": result.p,
        "p_holm": line.p_holm,
        "method": result.method,
        "smallest_detectable": result.detectable,
        "reason": result.reason,
    }
