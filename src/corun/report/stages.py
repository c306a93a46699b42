"""Where the time of a request goes: eleven stages from the intended send time to the reply, by arm.

    intended ─ client queue ─ tx ─ network out ─ rx ─ server queue ─ picked ─ batch wait ─ decode ─ preprocess ─
    host to device ─ device ─ device to host ─ postprocess ─ tx ─ network back ─ reply

The stages of a request sum to its sojourn, so their means sum to the mean sojourn. "Tail" is the mean over the
slowest hundredth (the requests at or above p99): which stage made the slow requests slow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from corun.clock import NS_PER_MS
from corun.report.exhibit import Data, Exhibit, missing, shown
from corun.report.look import Look, grid, height
from corun.run.read import Run, Table, select
from corun.stats.percentiles import percentile_of

Floats = NDArray[np.float64]

KEY, TITLE = "stages", "Where the time goes"
STAGES = (
    ("client queue", "t_intended_ns", "t_tx_start_ns"),
    ("network out", "t_tx_start_ns", "s_rx_done_ns"),
    ("server queue", "s_rx_done_ns", "s_picked_ns"),
    ("batch wait", "s_picked_ns", "s_batched_ns"),
    ("decode", "s_batched_ns", "s_decoded_ns"),
    ("preprocess", "s_decoded_ns", "s_preprocessed_ns"),
    ("host to device", "s_preprocessed_ns", "s_h2d_ns"),
    ("device", "s_h2d_ns", "s_device_ns"),
    ("device to host", "s_device_ns", "s_d2h_ns"),
    ("postprocess", "s_d2h_ns", "s_tx_ns"),
    ("network back", "s_tx_ns", "t_rx_ns"),
)
NAMES = tuple(name for name, _, _ in STAGES)
STAMPS = ("t_intended_ns", *(end for _, _, end in STAGES))
_COLOURS = {
    "client queue": "#8c2d04",
    "network out": "#b3bcc7",
    "server queue": "#e8833a",
    "batch wait": "#f5c26b",
    "decode": "#a5d8c3",
    "preprocess": "#3fa27c",
    "host to device": "#a8d3ef",
    "device": "#2f7fc0",
    "device to host": "#6fb1e0",
    "postprocess": "#a678b4",
    "network back": "#8793a1",
}


@dataclass(frozen=True)
class Breakdown:
    """Mean stage times in ms of one service in one arm, over all requests and over the slowest hundredth."""

    service: str
    arm: str
    requests: int
    mean: Floats
    tail: Floats | None
    p99: float | None


def exhibit(run: Run) -> Exhibit:
    """The stage breakdown of a run, or why there is none."""
    found = make(run)
    if not found:
        return missing(KEY, TITLE, "There is no stage breakdown: no request came back with the server's stamps.")
    caption = (
        "Mean time in each stage; the stages of a request sum to its latency from the intended send time. The tail is "
        "the mean over the slowest hundredth of the requests, quoted from 662 requests on."
    )
    return Exhibit(KEY, TITLE, caption, _alt(found), lambda f, look: draw(found, f, look), _data(found))


def make(run: Run) -> list[Breakdown]:
    """Breakdowns by service and arm, all repeats together, arms without an answer left out."""
    return [
        _breakdown(service, arm, rows)
        for service in run.services
        for arm in run.arms
        if len((rows := _stamped(run.infer_client[service], arm))["id"])
    ]


def _stamped(table: Table, arm: str) -> Table:
    """Answered requests of an arm that have the stamps at both ends of the server."""
    known = (table["s_rx_done_ns"] > 0) & (table["s_tx_ns"] > 0) & (table["t_rx_ns"] > 0)
    return select(table, known & (table["status"] == "OK") & (table["arm"] == arm))


def stage_ms(rows: Table) -> Floats:
    """Stage times (n, 11) in ms; a stage whose end was not stamped is 0 and its time is the next stage's."""
    stamps = np.array([rows[name] for name in STAMPS], dtype=np.int64)
    return np.asarray(np.diff(np.maximum.accumulate(stamps, axis=0), axis=0).T / NS_PER_MS)


def _breakdown(service: str, arm: str, rows: Table) -> Breakdown:
    times = stage_ms(rows)
    total = times.sum(axis=1)
    p99 = percentile_of(total, 99)
    tail = times[total >= p99].mean(axis=0) if p99 is not None else None
    return Breakdown(service, arm, len(times), times.mean(axis=0), tail, p99)


# Drawing


def draw(found: list[Breakdown], figure: Figure, look: Look) -> None:
    """Stacked bars of means, and of the tail beside or below them, each on its own scale."""
    tails = any(row.tail is not None for row in found)
    panels = 2 if tails else 1
    services = len(dict.fromkeys(row.service for row in found))
    tall = 0.42 + 0.27 * len(found) + (0.2 * services if look.narrow else 0.0)
    if look.narrow:
        height(figure, look, 1.15 + panels * (tall + 0.45))
        axes = figure.subplots(panels, 1, squeeze=False).ravel()
    else:
        height(figure, look, 1.15 + tall)
        axes = figure.subplots(1, panels, squeeze=False, sharey=True).ravel()
    stages = _worth_showing(found)
    _bars(axes[0], found, [row.mean for row in found], stages, look)
    axes[0].set_title("mean of all requests")
    if tails:
        _bars(axes[1], found, [row.tail for row in found], stages, look)
        axes[1].set_title("mean of the slowest 1 %")
    handles = [Patch(color=_COLOURS[NAMES[stage]], label=NAMES[stage]) for stage in stages]
    figure.legend(handles=handles, loc="outside upper left", ncols=3 if look.narrow else 6)


def _worth_showing(found: list[Breakdown]) -> list[int]:
    """Stages that are at least 0.3 % of some bar; the others are in the table only."""
    bars = [row.mean for row in found] + [row.tail for row in found if row.tail is not None]
    largest = np.max([bar / bar.sum() for bar in bars], axis=0)
    return [stage for stage in range(len(STAGES)) if largest[stage] >= 0.003]


def _bars(ax: Axes, found: list[Breakdown], bars: list[Floats | None], stages: list[int], look: Look) -> None:
    places = _places(found, 1.75 if look.narrow else 1.5)
    longest = max(float(bar.sum()) for bar in bars if bar is not None)
    for place, bar in zip(places, bars, strict=True):
        if bar is None:
            ax.text(0, place, " n/a: too few requests", va="center", fontsize=8, color=look.muted)
            continue
        left = 0.0
        for stage in stages:
            width = float(bar[stage])
            ax.barh(place, width, 0.8, left=left, color=_COLOURS[NAMES[stage]], edgecolor=look.ground, linewidth=0.5)
            left += width
        ax.text(left + 0.01 * longest, place, shown(float(bar.sum())), va="center", fontsize=8, color=look.muted)
    for index, row in enumerate(found):
        if look.narrow and _first(found, index):
            ax.text(0, places[index] + 0.48, row.service, fontsize=8.5, color=look.ink, va="bottom")
    wide = [f"{row.service}  {row.arm}" if _first(found, index) else row.arm for index, row in enumerate(found)]
    ax.set_yticks(places, [row.arm for row in found] if look.narrow else wide)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(min(places) - 0.65, max(places) + (1.1 if look.narrow else 0.65))
    ax.set_xlim(0, longest * 1.13)
    ax.set_xlabel("ms")
    grid(ax, "x")


def _first(found: list[Breakdown], index: int) -> bool:
    return index == 0 or found[index - 1].service != found[index].service


def _places(found: list[Breakdown], gap: float) -> list[float]:
    """Bars from top to bottom, a gap between services."""
    places, at = [], 0.0
    for index in range(len(found)):
        at -= gap if index and _first(found, index) else 1.0
        places.append(at)
    return places


# Words and numbers


def _alt(found: list[Breakdown]) -> str:
    parts = ["Stacked bars of the time in each stage."]
    for row in found:
        most = int(np.argmax(row.mean))
        parts.append(
            f"{row.service} {row.arm}: mean {row.mean.sum():.3g} ms, most of it {NAMES[most]} ({row.mean[most]:.3g} ms)."
        )
    return " ".join(parts)


def _data(found: list[Breakdown]) -> Data:
    rows: list[tuple[object, ...]] = []
    for row in found:
        rows.append(
            (row.service, row.arm, "mean", row.requests, *(float(v) for v in row.mean), float(row.mean.sum()))
        )
        if row.tail is not None:
            tail = (float(v) for v in row.tail)
            rows.append((row.service, row.arm, "slowest 1 %", row.requests, *tail, float(row.tail.sum())))
    return Data(("service", "arm", "over", "requests", *(f"{name} ms" for name in NAMES), "sum ms"), rows)
