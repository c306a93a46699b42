"""How long the tail is: the share of requests that waited longer, on a log axis, by arm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from corun.report.exhibit import Data, Exhibit, missing
from corun.report.look import Look, grid, height, plain_log
from corun.report.timeline import requests
from corun.run.read import Run
from corun.stats.percentiles import PERCENTILES, percentile_of

Floats = NDArray[np.float64]

KEY, TITLE = "tail", "Latency distribution"
SOLID = 10
POINTS = 800
ARMS = ("alone", "corun")


@dataclass(frozen=True)
class Tail:
    """The sorted sojourn times in ms of one service, by arm."""

    service: str
    by_arm: Mapping[str, Floats]


def exhibit(run: Run) -> Exhibit:
    """The distributions of a run, or why there are none."""
    tails = make(run)
    if not tails:
        return missing(KEY, TITLE, "There is no latency distribution: no request was answered with OK.")
    caption = (
        "How large a share of the requests waited longer than x (from the intended send time). A line further right "
        f"is slower; its thin end rests on fewer than {SOLID} requests and says little. All repeats together."
    )
    return Exhibit(KEY, TITLE, caption, _alt(tails), lambda f, look: draw(tails, f, look), _data(tails))


def make(run: Run) -> list[Tail]:
    """Sojourn times by service and arm, services without an answer left out."""
    tails = []
    for service, table in requests(run):
        by_arm = {
            arm: np.sort(table["sojourn_ms"][(table["status"] == "OK") & (table["arm"] == arm)]) for arm in run.arms
        }
        kept = {arm: values for arm, values in by_arm.items() if len(values)}
        if kept:
            tails.append(Tail(service, kept))
    return tails


def exceedance(values: Floats) -> Floats:
    """Share of the samples that are larger than each of the sorted values, the last one given half a sample."""
    n = len(values)
    return np.asarray((n - np.arange(1, n + 1) + 0.5) / n)


def draw(tails: list[Tail], figure: Figure, look: Look) -> None:
    """One panel per service, latency across, share that waited longer down a log axis."""
    columns = 1 if look.narrow else min(3, len(tails))
    rows = -(-len(tails) // columns)
    height(figure, look, 0.6 + rows * (2.5 if columns < 3 else 2.3))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    least = min(float(exceedance(values)[-1]) for tail in tails for values in tail.by_arm.values())
    for ax, tail in zip(axes, tails, strict=False):
        for arm, values in tail.by_arm.items():
            _line(ax, values, look.arm(arm))
        ax.set_title(tail.service)
    for ax in axes[: len(tails)]:
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(least / 1.3, 1.15)
        _share_axis(ax, least)
        plain_log(ax, "x")
        grid(ax, "both")
    for ax in axes[len(tails) :]:
        ax.set_visible(False)
    for index, ax in enumerate(axes[: len(tails)]):
        if index % columns == 0:
            ax.set_ylabel("slower requests")
        if index + columns >= len(tails):
            ax.set_xlabel("latency, ms")
            ax.tick_params(axis="x", labelbottom=True)
    arms = dict.fromkeys(arm for tail in tails for arm in tail.by_arm)
    handles = [Line2D([], [], color=look.arm(arm), label=arm, linewidth=2) for arm in arms]
    figure.legend(handles=handles, loc="outside upper left", ncols=4)


def _line(ax: Axes, values: Floats, colour: str) -> None:
    share = exceedance(values)
    keep = np.unique(np.geomspace(1, len(values), min(POINTS, len(values))).astype(int))
    places = len(values) - keep[::-1]
    solid = places[places <= max(0, len(values) - SOLID)]
    ax.plot(values[places], share[places], color=colour, linewidth=0.9, alpha=0.75)
    ax.plot(values[solid], share[solid], color=colour, linewidth=2.0)


def _share_axis(ax: Axes, least: float) -> None:
    """Ticks at the percentiles people quote."""
    marks = [(1.0, "all"), (0.5, "50 % (p50)"), (0.1, "10 % (p90)"), (0.01, "1 % (p99)"), (0.001, "0.1 % (p99.9)")]
    shown = [(share, label) for share, label in marks if share >= least / 1.3]
    ax.set_yticks([share for share, _ in shown], [label for _, label in shown])
    ax.set_yticks([], minor=True)


def _alt(tails: list[Tail]) -> str:
    parts = ["Share of requests that waited longer than a given time, by arm."]
    for tail in tails:
        for arm, values in tail.by_arm.items():
            p99 = percentile_of(values, 99)
            known = f"p99 {p99:.3g} ms" if p99 is not None else f"slowest {values[-1]:.3g} ms"
            parts.append(f"{tail.service} {arm}: median {np.median(values):.3g} ms, {known}.")
    return " ".join(parts)


def _data(tails: list[Tail]) -> Data:
    """Exact percentiles by service and arm; empty below their floor."""
    names = tuple(f"p{percentile:g} ms" for percentile in PERCENTILES)
    rows = [
        (tail.service, arm, len(values), *(percentile_of(values, p) for p in PERCENTILES), float(values[-1]))
        for tail in tails
        for arm, values in tail.by_arm.items()
    ]
    return Data(("service", "arm", "requests", *names, "max ms"), rows)
