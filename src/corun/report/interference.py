"""Who slows whom in a sweep: each service's tail beside a training job or other services, over its tail without.

A condition is what stood on the machine together: a set of services, and a training job or none. A service's tail
in a condition is divided by its tail in the condition where it stood alone; where the sweep has none, by its tail
beside the same services without the training job. Neither matrix is symmetric, and that is the point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from corun.report.exhibit import Data, Exhibit, missing
from corun.report.look import Look, height
from corun.report.summary import Row, Summary

KEY, TITLE = "interference", "Who slows whom"
TRAIN_KEY, TRAIN_TITLE = "training-kept", "What training keeps"
PERCENTILES = ("p99_ms", "p95_ms", "p90_ms", "p50_ms")
LIMIT = 40
LEAST_REACH = math.log(1.5)


@dataclass(frozen=True)
class Condition:
    """One measured condition: the services that stood together, the training job, and each figure by service."""

    services: frozenset[str]
    trainer: str | None
    tails: Mapping[str, float]
    speed: float | None


@dataclass(frozen=True)
class Matrix:
    """cells[beside, who] = ratio; rows and columns in the order they are drawn."""

    beside: tuple[str, ...]
    who: tuple[str, ...]
    cells: Mapping[tuple[str, str], tuple[float, float, float]]


def exhibits(summaries: Sequence[Summary]) -> list[Exhibit]:
    """The heat maps of a sweep, or a sentence for each that has nothing to show."""
    figure = _figure(summaries)
    conditions = _conditions(summaries, figure)
    return [_tails(tails(conditions), figure.removesuffix("_ms")), _kept(kept(conditions))]


def _tails(matrix: Matrix, figure: str) -> Exhibit:
    if not matrix.cells:
        return missing(
            KEY, TITLE, "There is no heat map: no service was measured both with something beside it and without."
        )
    caption = (
        f"{figure} of the service in the column beside what the row names, over its {figure} alone. Read down a column "
        "to see what a service suffers from, along a row to see what a job does to others."
    )
    data = Data(("beside", "service", f"alone {figure} ms", f"beside {figure} ms", "ratio"), _rows(matrix))
    return Exhibit(KEY, TITLE, caption, _alt(matrix), lambda f, look: draw(matrix, f, look, True), data)


def _kept(matrix: Matrix) -> Exhibit:
    if not matrix.cells:
        return missing(TRAIN_KEY, TRAIN_TITLE, "No training job was measured both alone and beside services.")
    caption = "Training speed of the job in the column beside the services of the row, over its speed alone."
    data = Data(("beside", "training job", "alone samples/s", "beside samples/s", "ratio"), _rows(matrix))
    draws = lambda f, look: draw(matrix, f, look, False)  # noqa: E731
    return Exhibit(TRAIN_KEY, TRAIN_TITLE, caption, _alt(matrix), draws, data)


def _figure(summaries: Sequence[Summary]) -> str:
    """The furthest percentile that every service row of the sweep has."""
    rows = [row for summary in summaries for arm in ("alone", "corun") for row in summary.pooled(arm, "server")]
    return next((name for name in PERCENTILES if all(row[name] is not None for row in rows)), PERCENTILES[-1])


def _conditions(summaries: Sequence[Summary], figure: str) -> list[Condition]:
    rates = _rates(summaries)
    found = []
    for summary in summaries:
        config = summary.manifest.get("config") or {}
        labels = {
            entry["name"]: f"{entry['name']} at {entry['rate']:g}/s"
            if len(rates[entry["name"]]) > 1
            else entry["name"]
            for entry in config.get("services", [])
        }
        trainer = _trainer(config)
        for arm in ("alone", "corun", "train"):
            tails = _by_service(summary.pooled(arm, "server"), figure)
            speeds = [row["train_samples_per_s"] for row in summary.pooled(arm, "trainer")]
            if tails or speeds:
                services = frozenset() if arm == "train" else frozenset(labels.values())
                named = {labels.get(name, name): value for name, value in tails.items()}
                found.append(
                    Condition(services, None if arm == "alone" else trainer, named, speeds[0] if speeds else None)
                )
    return found


def _rates(summaries: Sequence[Summary]) -> dict[str, set[float]]:
    rates: dict[str, set[float]] = {}
    for summary in summaries:
        for entry in (summary.manifest.get("config") or {}).get("services", []):
            rates.setdefault(entry["name"], set()).add(entry["rate"])
    return rates


def _trainer(config: Mapping[str, object]) -> str | None:
    job, beside = config.get("train"), config.get("beside")
    if isinstance(job, dict):
        return f"training {job['arch']}_{job['batch_size']}"
    return f"training {beside}" if beside and beside != "none" else None


def _by_service(rows: list[Row], figure: str) -> dict[str, float]:
    return {row["service"]: row[figure] for row in rows if row[figure] is not None}


def tails(conditions: Sequence[Condition]) -> Matrix:
    """Ratio of each service's tail in every condition to the same without what stands beside it."""
    known: dict[tuple[frozenset[str], str | None, str], list[float]] = {}
    for condition in conditions:
        for service, value in condition.tails.items():
            known.setdefault((condition.services, condition.trainer, service), []).append(value)
    cells: dict[tuple[str, str], tuple[float, float, float]] = {}
    for (services, trainer, service), values in known.items():
        others = services - {service}
        alone = known.get((frozenset({service}), None, service))
        beside = [*sorted(others), *([trainer] if trainer else [])]
        if alone is None or not beside:
            alone = known.get((services, None, service)) if trainer else None
            beside = [trainer] if trainer else []
        if alone and beside:
            base, value = _middle(alone), _middle(values)
            cells[" + ".join(beside), service] = (base, value, value / base)
    return _matrix(cells)


def kept(conditions: Sequence[Condition]) -> Matrix:
    """Ratio of the training speed beside services to the speed alone."""
    known: dict[tuple[frozenset[str], str], list[float]] = {}
    for condition in conditions:
        if condition.trainer and condition.speed:
            known.setdefault((condition.services, condition.trainer), []).append(condition.speed)
    cells: dict[tuple[str, str], tuple[float, float, float]] = {}
    for (services, trainer), values in known.items():
        alone = known.get((frozenset(), trainer))
        if services and alone:
            base, value = _middle(alone), _middle(values)
            cells[" + ".join(sorted(services)), trainer.removeprefix("training ")] = (base, value, value / base)
    return _matrix(cells)


def _middle(values: Sequence[float]) -> float:
    """Geometric mean: ratios of it are ratios of typical runs."""
    if len(values) == 1:
        return values[0]
    return math.exp(sum(math.log(value) for value in values) / len(values))


def _matrix(cells: Mapping[tuple[str, str], tuple[float, float, float]]) -> Matrix:
    beside = sorted({row for row, _ in cells}, key=lambda label: (label.count(" + "), label))[:LIMIT]
    who = sorted({column for _, column in cells})[:LIMIT]
    return Matrix(tuple(beside), tuple(who), cells)


# Drawing


def draw(matrix: Matrix, figure: Figure, look: Look, high_is_bad: bool) -> None:
    """A square per pair with its ratio in words; colour from blue (better) over the ground (same) to orange."""
    labels = max(len(label) for label in matrix.who)
    beside_inches = 0.085 * max(len(part) for label in matrix.beside for part in _wrapped(label, look).split("\n"))
    slanted = 0.09 * labels > (look.width - beside_inches - 0.2) / len(matrix.who)
    height(figure, look, 0.35 + 0.36 * len(matrix.beside) + (min(1.6, 0.075 * labels) if slanted else 0.3))
    ax = figure.subplots()
    values = np.full((len(matrix.beside), len(matrix.who)), np.nan)
    for row, beside in enumerate(matrix.beside):
        for column, who in enumerate(matrix.who):
            if (beside, who) in matrix.cells:
                values[row, column] = math.log(matrix.cells[beside, who][2])
    reach = max(LEAST_REACH, float(np.nanmax(np.abs(values))))
    ends = [look.arm("alone"), look.grid, look.arm("corun")]
    colours = LinearSegmentedColormap.from_list("ratio", ends if high_is_bad else ends[::-1])
    norm = Normalize(-reach, reach)
    ax.imshow(np.ma.masked_invalid(values), cmap=colours, norm=norm, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if math.isnan(value):
            ax.text(column, row, "–", ha="center", va="center", color=look.muted, fontsize=8.5)
        else:
            ink = _ink(colours(norm(value)))
            ax.text(column, row, f"×{math.exp(value):.2f}", ha="center", va="center", color=ink, fontsize=8.5)
    ax.set_xticks(
        range(len(matrix.who)),
        matrix.who,
        rotation=35 if slanted else 0,
        ha="right" if slanted else "center",
        rotation_mode="anchor" if slanted else "default",
    )
    ax.set_yticks(range(len(matrix.beside)), [_wrapped(label, look) for label in matrix.beside])
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.set_xticks(np.arange(len(matrix.who) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(matrix.beside) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color=look.ground, linewidth=2)
    ax.set_xlabel("service" if high_is_bad else "training job")


def _ink(ground: tuple[float, float, float, float]) -> str:
    """Black or white, whichever reads better on a colour (relative luminance, WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in ground[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#15181c" if luminance > 0.179 else "#ffffff"


def _wrapped(label: str, look: Look) -> str:
    return label.replace(" + ", " +\n") if look.narrow else label


def _rows(matrix: Matrix) -> list[tuple[object, ...]]:
    return [(beside, who, *numbers) for (beside, who), numbers in sorted(matrix.cells.items())]


def _alt(matrix: Matrix) -> str:
    worst = sorted(matrix.cells.items(), key=lambda item: -abs(math.log(item[1][2])))[:4]
    told = "; ".join(f"{who} beside {beside}: ×{ratio:.2f}" for (beside, who), (_, _, ratio) in worst)
    return f"Heat map with {len(matrix.beside)} rows and {len(matrix.who)} columns. Largest changes: {told}."
