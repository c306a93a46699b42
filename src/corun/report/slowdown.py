"""How much slower each service is beside training: the ratio corun / alone of its percentiles, with an interval.

With repeats the interval is the paired t-interval on the logarithms of the repeats' ratios: the arms of one
repeat share their arrivals. With one repeat there is only the wobble inside the two windows; it is estimated by
block bootstrap in each and combined on the log scale by MOVER (Donner and Zou 2012, "Closed-form confidence
intervals for functions of the normal mean and standard deviation"):

    ln(corun / alone) - sqrt((c - c_low)^2 + (a_high - a)^2)  ..  + sqrt((c_high - c)^2 + (a - a_low)^2)

It says nothing about the next run and is labelled so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from corun.report.exhibit import Data, Exhibit, missing
from corun.report.look import Look, grid, height
from corun.report.summary import Row, Summary
from corun.run.read import Run
from corun.stats.bootstrap import block_bootstrap
from corun.stats.intervals import Interval, minimum_length, ratio_interval

Floats = NDArray[np.float64]

KEY, TITLE = "slowdown", "Slowdown beside training"
PERCENTILES = (50.0, 90.0, 95.0, 99.0)
ALPHAS = (0.4, 0.6, 0.8, 1.0)
MOST_SAMPLES = 20_000
WITHIN = "within one run"


@dataclass(frozen=True)
class Slowdown:
    """corun / alone of one percentile of one service; bounds and method are None where there is no interval."""

    service: str
    percentile: float
    ratio: float
    low: float | None
    high: float | None
    method: str
    alone_ms: float | None
    corun_ms: float | None

    @property
    def name(self) -> str:
        return f"p{self.percentile:g}"


def exhibit(run: Run, summary: Summary) -> Exhibit:
    """The slowdown of every service, or why there is none."""
    found = make(run, summary)
    if not found:
        return missing(KEY, TITLE, f"There is no slowdown: {_why_not(run)}")
    return Exhibit(KEY, TITLE, _caption(found), _alt(found), lambda f, look: draw(found, f, look), _data(found))


def _why_not(run: Run) -> str:
    absent = [arm for arm in ("alone", "corun") if arm not in run.arms]
    if absent:
        return f"it compares the arms alone and corun, and {' and '.join(absent)} was not measured."
    return "no service has enough answers in both arms for even a median."


def make(run: Run, summary: Summary) -> list[Slowdown]:
    """Ratios of all services and percentiles that both arms have."""
    return [
        found
        for service in run.services
        for percentile in PERCENTILES
        if (found := _slowdown(run, summary, service, percentile)) is not None
    ]


def _slowdown(run: Run, summary: Summary, service: str, percentile: float) -> Slowdown | None:
    name = f"p{percentile:g}_ms"
    pooled = {arm: _value(summary.pooled(arm, "server"), service, name) for arm in ("alone", "corun")}
    alone, corun = pooled["alone"], pooled["corun"]
    if not alone or corun is None:
        return None
    repeats = {arm: _repeats(summary.rows, arm, service) for arm in ("alone", "corun")}
    many = min(len(rows) for rows in repeats.values()) > 1
    interval, method = _over_repeats(repeats, percentile) if many else _within(run, service, percentile)
    ratio = interval.point if interval else corun / alone
    low, high = (interval.low, interval.high) if interval else (None, None)
    return Slowdown(service, percentile, ratio, low, high, method, alone, corun)


def _value(rows: list[Row], service: str, name: str) -> float | None:
    return next((row[name] for row in rows if row["service"] == service), None)


def _repeats(rows: list[Row], arm: str, service: str) -> dict[int, Row]:
    return {
        row["repeat"]: row
        for row in rows
        if row["arm"] == arm and row["service"] == service and row["repeat"] is not None
    }


def _over_repeats(repeats: dict[str, dict[int, Row]], percentile: float) -> tuple[Interval | None, str]:
    name = f"p{percentile:g}_ms"
    both = sorted(repeats["alone"].keys() & repeats["corun"].keys())
    sides = [[repeats[arm][repeat][name] for repeat in both] for arm in ("alone", "corun")]
    if any(value is None for side in sides for value in side):
        return None, f"no interval: a repeat has too few requests for {name.removesuffix('_ms')}"
    estimate = ratio_interval(*sides, paired=True)
    if estimate.interval is None:
        return None, f"no interval: {estimate.reason}"
    least = min(repeats[arm][repeat]["ok"] for arm in repeats for repeat in both)
    needed = minimum_length(percentile)
    short = f"; {least} requests a repeat, an honest interval needs {needed}" if least < needed else ""
    return estimate.interval, f"paired t over {len(both)} repeats{short}"


def _within(run: Run, service: str, percentile: float) -> tuple[Interval | None, str]:
    table = run.infer_client[service]
    sides = []
    for number, arm in enumerate(("alone", "corun")):
        rows = (table["status"] == "OK") & (table["arm"] == arm)
        ordered = table["sojourn_ms"][rows][np.argsort(table["t_intended_ns"][rows], kind="stable")]
        if len(ordered) > MOST_SAMPLES:
            return None, f"no interval: one repeat, and more than {MOST_SAMPLES:,} requests to resample"
        estimate = block_bootstrap(ordered, percentile, np.random.default_rng([7, number]), replicates=400)
        if estimate.interval is None:
            return None, f"no interval: {estimate.reason}"
        sides.append(estimate.interval)
    return mover_ratio(*sides), f"{WITHIN}: block bootstrap, says nothing about the next run"


def mover_ratio(alone: Interval, corun: Interval) -> Interval:
    """corun / alone from the two sides' intervals (all positive), by MOVER on the log scale."""
    a_low, a, a_high = (math.log(value) for value in (alone.low, alone.point, alone.high))
    c_low, c, c_high = (math.log(value) for value in (corun.low, corun.point, corun.high))
    low = c - a - math.hypot(c - c_low, a_high - a)
    high = c - a + math.hypot(c_high - c, a - a_low)
    return Interval(math.exp(low), math.exp(high), math.exp(c - a), "MOVER of block bootstraps", corun.k, WITHIN)


# Drawing


def draw(found: list[Slowdown], figure: Figure, look: Look) -> None:
    """Bars from 1 (no change) to the ratio, whiskers for the interval."""
    services = list(dict.fromkeys(row.service for row in found))
    columns = 1 if look.narrow else min(3, len(services))
    rows = -(-len(services) // columns)
    tall = max(len([row for row in found if row.service == service]) for service in services)
    height(figure, look, 0.25 + rows * (0.62 + 0.27 * tall))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for ax, service in zip(axes, services, strict=False):
        _panel(ax, [row for row in found if row.service == service], look)
        ax.set_ylim(ax.get_ylim()[1] - tall, ax.get_ylim()[1])
        ax.set_title(service)
    low, high = _limits(found)
    axes[0].set_xlim(low, high)
    for ax in axes[len(services) :]:
        ax.set_visible(False)
    for index, ax in enumerate(axes[: len(services)]):
        if index + columns >= len(services):
            ax.set_xlabel("corun / alone")
            ax.tick_params(axis="x", labelbottom=True)


def _panel(ax: Axes, rows: list[Slowdown], look: Look) -> None:
    limits = _limits(rows)
    for place, row in enumerate(reversed(rows)):
        alpha = dict(zip(PERCENTILES, ALPHAS, strict=True))[row.percentile]
        ax.barh(place, row.ratio - 1, 0.66, left=1, color=look.arm("corun"), alpha=alpha)
        right = max(1.0, row.ratio)
        if row.low is not None and row.high is not None:
            within = row.method.startswith(WITHIN)
            style = (0, (1.5, 1.2)) if within else "-"
            ax.plot([row.low, row.high], [place, place], color=look.ink, linewidth=1.2, linestyle=style)
            if not within:
                ax.plot([row.low, row.high], [place, place], "|", color=look.ink, markersize=5)
            right = max(right, min(row.high, limits[1]))
        text: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8.5, "color": look.ink}
        ax.annotate(f"×{row.ratio:.2f}", (right, place), (5, 0), annotation_clip=False, **text)
    ax.axvline(1, color=look.muted, linewidth=0.8)
    ax.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(-0.5, len(rows) - 0.5)
    ax.spines["left"].set_visible(False)
    grid(ax, "x")


def _limits(found: list[Slowdown]) -> tuple[float, float]:
    """Room for every bar; a whisker much longer than the bars is cut."""
    ratios = [row.ratio for row in found]
    highs = [row.high for row in found if row.high is not None]
    lows = [row.low for row in found if row.low is not None]
    top = min(max([*ratios, *highs, 1.0]), 1.0 + 3.0 * max(0.1, max(ratios) - 1.0))
    bottom = max(min([*ratios, *lows, 1.0]), 0.0)
    span = top - bottom
    return max(0.0, bottom - 0.04 * span), top + 0.24 * span


# Words and numbers


def _caption(found: list[Slowdown]) -> str:
    methods = dict.fromkeys(row.method for row in found)
    said = ["Latency beside training over latency alone; 1 is no change."]
    if any(method.startswith(WITHIN) for method in methods):
        said.append(
            "Dotted whiskers are the wobble within this one run (block bootstrap); they say nothing about the next "
            "run: repeat the run for an interval that does."
        )
    if any(method.startswith("paired t") for method in methods):
        said.append(
            "Bars are geometric means of the repeats' ratios, whiskers their 95 % t-intervals; the ratio of all repeats "
            "together, in the table above, may differ a little."
        )
    if any("an honest interval needs" in method for method in methods):
        said.append("Some repeats are shorter than such an interval needs, so it may be too narrow (see the data).")
    if any(method.startswith("no interval") for method in methods):
        said.append("Bars without whiskers have no interval (the data says why).")
    return " ".join(said)


def _alt(found: list[Slowdown]) -> str:
    parts = ["Ratios of latency beside training to latency alone."]
    for service in dict.fromkeys(row.service for row in found):
        ratios = ", ".join(f"{row.name} ×{row.ratio:.2f}" for row in found if row.service == service)
        parts.append(f"{service}: {ratios}.")
    return " ".join(parts)


def _data(found: list[Slowdown]) -> Data:
    columns = ("service", "percentile", "alone ms", "corun ms", "ratio", "low", "high", "interval")
    rows = [
        (row.service, row.name, row.alone_ms, row.corun_ms, row.ratio, row.low, row.high, row.method) for row in found
    ]
    return Data(columns, rows)
