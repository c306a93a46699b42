"""The signature figure of a run: requests, training steps, CPU and GPU shares and events on one time axis.

    latency   one dot per request at its intended send time, log axis, one panel per service; rolling p99
    training  steps per second, a step over the edge of a bin counts by its share
    CPU       cores in use by role, from the counters of process.csv; the rest of the host above it
    GPU       SM share by role where it is known, utilisation of each GPU, power

Everything is stamped with one clock, so "p99 rose when the trainer's share did" is read off vertically.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from corun.clock import NS_PER_S
from corun.report.exhibit import Data, Exhibit, missing
from corun.report.look import Look, grid, height, plain_log
from corun.report.shares import Shares, cpu_shares, gpu_shares, power
from corun.run.read import Run, Table, Window, select

Floats = NDArray[np.float64]

KEY, TITLE = "timeline", "Timeline"
DOTS = 5000
SERVICES = 6
ROLLING_REQUESTS = (200, 100, 50)
ROLLING_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0)
TABLE_ROWS = 240
INVISIBLE = 0.01
MARKED = {"fault": "fault", "policy": "policy change", "checkpoint": "checkpoint", "epoch": "epoch"}


@dataclass(frozen=True)
class Latency:
    """The dots of one service: seconds, ms and arm of each; seconds of requests without an answer; rolling p99."""

    service: str
    seconds: Floats
    ms: Floats
    arm: NDArray[np.object_]
    unanswered: Floats
    rolling: tuple[tuple[str, Floats, Floats], ...]
    rolling_s: float | None
    thinned: int
    said: str


@dataclass(frozen=True)
class Marker:
    """One event worth a mark."""

    seconds: float
    kind: str
    detail: str


@dataclass(frozen=True)
class Timeline:
    """Everything the figure shows; seconds count from the start of the first window."""

    origin_ns: int
    end_s: float
    windows: tuple[Window, ...]
    services: tuple[Latency, ...]
    left_out: tuple[str, ...]
    steps: tuple[tuple[Floats, Floats], ...]
    cpu: Shares | None
    gpu: Shares | None
    power: Shares | None
    markers: tuple[Marker, ...]

    def span(self, window: Window) -> tuple[float, float]:
        """Begin and end of a window in seconds."""
        return (window.start_ns - self.origin_ns) / NS_PER_S, (window.stop_ns - self.origin_ns) / NS_PER_S


def exhibit(run: Run) -> Exhibit:
    """The timeline of a run, or why there is none."""
    if not run.windows:
        return missing(KEY, TITLE, "There is no timeline: the run ended before its first window was over.")
    timeline = make(run)
    return Exhibit(
        KEY, TITLE, _caption(timeline), _alt(timeline), lambda f, look: draw(timeline, f, look), _data(run)
    )


def make(run: Run) -> Timeline:
    """Reduce a run (at least one window) to what the figure shows."""
    origin_ns = min(window.start_ns for window in run.windows)
    end_ns = max(window.stop_ns for window in run.windows)
    services = [_latency(name, table, run.windows, origin_ns) for name, table in requests(run)]
    worst = sorted(services, key=lambda s: -(np.quantile(s.ms, 0.99) if len(s.ms) else 0.0))[:SERVICES]
    kept = tuple(service for service in services if service in worst)
    return Timeline(
        origin_ns,
        (end_ns - origin_ns) / NS_PER_S,
        run.windows,
        kept,
        tuple(service.service for service in services if service not in worst),
        tuple(_steps(run, window, origin_ns) for window in run.select("train") + run.select("corun")),
        cpu_shares(run, origin_ns, end_ns),
        gpu_shares(run, origin_ns, end_ns),
        power(run, origin_ns, end_ns),
        _markers(run, origin_ns, end_ns),
    )


def requests(run: Run) -> list[tuple[str, Table]]:
    """The client's table of each service, in the configuration's order; loops as if each inference were a request."""
    loops = [
        (name, {**table, "t_intended_ns": table["t_start_ns"], "sojourn_ms": table["latency"]})
        for name, table in run.infer_loop.items()
        if len(table.get("t_start_ns", ()))
    ]
    return [(name, run.infer_client[name]) for name in run.services] + loops


def _latency(name: str, table: Table, windows: Sequence[Window], origin_ns: int) -> Latency:
    ok = select(table, table["status"] == "OK")
    seconds = (ok["t_intended_ns"] - origin_ns) / NS_PER_S
    failed = select(table, table["status"] != "OK")
    rolling_s = _rolling_width(ok, windows)
    lines = [
        (window.arm, *_rolling(select(ok, ok["segment"] == window.segment), window, origin_ns, rolling_s))
        for window in windows
        if rolling_s and window.seconds >= 2 * rolling_s and (ok["segment"] == window.segment).any()
    ]
    keep = thin(ok["sojourn_ms"], DOTS)
    return Latency(
        name,
        seconds[keep],
        ok["sojourn_ms"][keep],
        ok["arm"][keep],
        (failed["t_intended_ns"] - origin_ns) / NS_PER_S,
        tuple(lines),
        rolling_s if lines else None,
        len(seconds) - int(keep.sum()),
        _said(name, ok),
    )


def _said(name: str, ok: Table) -> str:
    """Median and slowest answer of each arm in words."""
    parts = []
    for arm in dict.fromkeys(ok["arm"]):
        ms = ok["sojourn_ms"][ok["arm"] == arm]
        parts.append(f"{name} {arm}: median {np.median(ms):.3g} ms, slowest {ms.max():.3g} ms.")
    return " ".join(parts) or f"{name}: no answer."


def _rolling_width(ok: Table, windows: Sequence[Window]) -> float | None:
    """Seconds that hold enough requests for a p99 to mean something; at most a third of a window."""
    longest = max(window.seconds for window in windows)
    per_s = max(float(np.sum(ok["segment"] == window.segment)) / window.seconds for window in windows)
    for requests in ROLLING_REQUESTS:
        for width in ROLLING_S:
            if width * per_s >= requests and width <= longest / 3:
                return width
    return None


def thin(ms: Floats, most: int) -> NDArray[np.bool_]:
    """Which of n dots to draw: all of the slowest hundredth, and every k-th of the others."""
    keep = np.ones(len(ms), dtype=bool)
    if len(ms) > most:
        keep[:] = False
        keep[:: -(-len(ms) // most)] = True
        keep |= ms >= np.quantile(ms, 0.99)
    return keep


def _rolling(rows: Table, window: Window, origin_ns: int, width_s: float) -> tuple[Floats, Floats]:
    """p99 of the requests due within width_s around each instant, never over the edge of the window."""
    order = np.argsort(rows["t_intended_ns"])
    at_s, ms = (rows["t_intended_ns"][order] - origin_ns) / NS_PER_S, rows["sojourn_ms"][order]
    begin = (window.start_ns - origin_ns) / NS_PER_S
    centres = np.linspace(begin + width_s / 2, begin + window.seconds - width_s / 2, 160)
    first, last = np.searchsorted(at_s, centres - width_s / 2), np.searchsorted(at_s, centres + width_s / 2)
    tails = [
        float(np.quantile(ms[a:b], 0.99, method="higher")) if b > a else np.nan
        for a, b in zip(first, last, strict=True)
    ]
    return centres, np.array(tails)


def _steps(run: Run, window: Window, origin_ns: int) -> tuple[Floats, Floats]:
    """Edges of the bins of one window in seconds, and optimiser steps per second in each."""
    width_s = max(1.0, sum(w.seconds for w in run.windows) / 400)
    edges_ns = np.linspace(window.start_ns, window.stop_ns, max(2, round(window.seconds / width_s) + 1))
    return (edges_ns - origin_ns) / NS_PER_S, binned_steps(run.train, edges_ns)


def binned_steps(train: Table, edges_ns: Floats) -> Floats:
    """Steps per second in each bin; a step counts in every bin by the share of its time it spent there."""
    begin, end = train["t_start_ns"].astype(np.float64), train["t_end_ns"].astype(np.float64)
    done = np.array([float(np.clip((edge - begin) / np.maximum(1.0, end - begin), 0, 1).sum()) for edge in edges_ns])
    return np.asarray(np.diff(done) / (np.diff(edges_ns) / NS_PER_S))


def _markers(run: Run, origin_ns: int, end_ns: int) -> tuple[Marker, ...]:
    events = run.events
    return tuple(
        Marker((int(t_ns) - origin_ns) / NS_PER_S, str(kind), str(detail))
        for t_ns, kind, detail in zip(events["t_ns"], events["kind"], events["detail"], strict=True)
        if kind in MARKED and origin_ns <= t_ns <= end_ns
    )


# Drawing


def draw(timeline: Timeline, figure: Figure, look: Look) -> None:
    """The panels, one above the other, on one time axis."""
    panels = [("latency", service) for service in timeline.services]
    heights = [1.55 if len(timeline.services) <= 2 else 1.2] * len(panels)
    for shown, tall in ((timeline.steps, 0.95), (timeline.cpu, 1.05), (timeline.gpu, 1.05), (timeline.power, 0.8)):
        heights += [tall] if shown else []
    height(figure, look, 0.85 + 1.08 * sum(heights))
    grid_spec = figure.add_gridspec(max(1, len(heights)), 1, height_ratios=heights or [1.0])
    axes = [figure.add_subplot(grid_spec[0])]
    axes += [figure.add_subplot(grid_spec[row], sharex=axes[0]) for row in range(1, len(heights))]
    rest = iter(axes)
    _latency_panels([next(rest) for _ in timeline.services], timeline, look)
    if timeline.steps:
        _steps_panel(next(rest), timeline, look)
    for shares, title in ((timeline.cpu, "CPU"), (timeline.gpu, "GPU"), (timeline.power, "Power")):
        if shares:
            _shares_panel(next(rest), shares, title, look)
    for ax in axes:
        _bands(ax, timeline, look)
    _time_axis(axes, timeline)
    figure.align_ylabels(axes)
    _legend(figure, timeline, look)


def _latency_panels(axes: list[Axes], timeline: Timeline, look: Look) -> None:
    finite = np.concatenate([service.ms for service in timeline.services] or [np.array([])])
    finite = finite[finite > 0]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (1.0, 10.0)
    for ax, service in zip(axes, timeline.services, strict=True):
        for arm in dict.fromkeys(service.arm):
            mine = service.arm == arm
            size = 5.0 if len(service.ms) < 1500 else 2.5
            ax.scatter(
                service.seconds[mine], service.ms[mine], s=size, color=look.arm(str(arm)), alpha=0.5, linewidths=0
            )
        for arm, seconds, tail in service.rolling:
            ax.plot(seconds, tail, color=look.ground, linewidth=3.2)
            ax.plot(seconds, tail, color=look.arm(arm), linewidth=1.7)
        ax.set_yscale("log")
        ax.set_ylim(low / 1.25, high * 1.6)
        if len(service.unanswered):
            ax.plot(
                service.unanswered,
                np.full(len(service.unanswered), high * 1.35),
                "x",
                color=look.alarm,
                markersize=4,
                markeredgewidth=1.1,
            )
        plain_log(ax, "y")
        grid(ax, "y")
        ax.set_title(service.service)
        ax.set_ylabel("latency, ms")


def _steps_panel(ax: Axes, timeline: Timeline, look: Look) -> None:
    arms = [window for window in timeline.windows if window.arm == "train"]
    arms += [window for window in timeline.windows if window.arm == "corun"]
    top = 0.0
    for window, (edges, rate) in zip(arms, timeline.steps, strict=True):
        ax.stairs(rate, edges, color=look.arm(window.arm), linewidth=1.5, baseline=None)
        top = max(top, float(rate.max(initial=0.0)))
    ax.set_ylim(0, top * 1.18 or 1.0)
    for marker in timeline.markers:
        if marker.kind in ("epoch", "checkpoint"):
            shape = "^" if marker.kind == "checkpoint" else "|"
            ax.plot(
                [marker.seconds], [0.035], shape, color=look.muted, markersize=5, transform=ax.get_xaxis_transform()
            )
    grid(ax, "y")
    ax.set_title("Training")
    ax.set_ylabel("steps/s")


def _shares_panel(ax: Axes, shares: Shares, title: str, look: Look) -> None:
    base = np.zeros(len(shares.seconds))
    for role, values in shares.stacked:
        if float(values.max(initial=0.0)) < INVISIBLE * shares.limit:
            continue
        ax.fill_between(
            shares.seconds,
            base,
            base + values,
            step="pre",
            color=look.role(role),
            alpha=0.85,
            linewidth=0,
            label=role,
        )
        base = base + values
    for number, (label, values) in enumerate(shares.lines):
        style = ("-", "--", ":", "-.")[number % 4]
        ax.step(shares.seconds, values, where="pre", color=look.ink, linewidth=1.1, linestyle=style, label=label)
    ax.set_ylim(0, shares.limit)
    grid(ax, "y")
    ax.set_title(title)
    ax.set_ylabel(shares.unit)
    tight: dict[str, Any] = (
        {"fontsize": 7.5, "columnspacing": 0.8, "handletextpad": 0.4} if look.narrow else {"fontsize": 8}
    )
    ax.legend(loc="lower right", bbox_to_anchor=(1.005, 0.99), ncols=8, borderaxespad=0, handlelength=1.0, **tight)


def _bands(ax: Axes, timeline: Timeline, look: Look) -> None:
    for window in timeline.windows:
        begin, end = timeline.span(window)
        ax.axvspan(begin, end, color=look.arm(window.arm), alpha=0.09 if look.dark else 0.055, linewidth=0, zorder=0)
    for marker in timeline.markers:
        if marker.kind in ("fault", "policy"):
            colour = look.alarm if marker.kind == "fault" else look.ink
            ax.axvline(marker.seconds, color=colour, linewidth=1.0, linestyle="--", zorder=3)


def _time_axis(axes: list[Axes], timeline: Timeline) -> None:
    for ax in axes[:-1]:
        ax.tick_params(axis="x", labelbottom=False)
    pad = 0.01 * max(timeline.end_s, 1.0)
    axes[-1].set_xlim(-pad, timeline.end_s + pad)
    axes[-1].set_xlabel("time since the first window, s")


def _legend(figure: Figure, timeline: Timeline, look: Look) -> None:
    arms = dict.fromkeys(window.arm for window in timeline.windows)
    handles: list[Line2D | Patch] = [Patch(color=look.arm(arm), label=arm) for arm in arms]
    grey: dict[str, Any] = {"color": look.muted, "linestyle": "none"}
    if timeline.services:
        handles.append(Line2D([], [], marker="o", markersize=3.5, label="request", **grey))
    widths = sorted({service.rolling_s for service in timeline.services if service.rolling_s})
    if widths:
        handles.append(
            Line2D([], [], color=look.muted, label=f"rolling p99 ({'/'.join(f'{w:g}' for w in widths)} s)")
        )
    if any(len(service.unanswered) for service in timeline.services):
        handles.append(Line2D([], [], marker="x", color=look.alarm, linestyle="none", label="no OK answer"))
    kinds = {marker.kind for marker in timeline.markers}
    for kind, shape in (("epoch", "|"), ("checkpoint", "^")):
        if kind in kinds and timeline.steps:
            handles.append(Line2D([], [], marker=shape, markersize=5, label=MARKED[kind], **grey))
    for kind, colour in (("fault", look.alarm), ("policy", look.ink)):
        if kind in kinds:
            handles.append(Line2D([], [], color=colour, linestyle="--", linewidth=1.0, label=MARKED[kind]))
    figure.legend(handles=handles, loc="outside upper left", ncols=3 if look.narrow else 9)


# Words and numbers


def _caption(timeline: Timeline) -> str:
    said = [
        "Each dot is one request at its intended send time; the shaded bands are the measured windows, "
        "their colour is the arm."
    ]
    widths = {service.rolling_s for service in timeline.services if service.rolling_s}
    if widths:
        said.append(
            "The rolling p99 is a guide for the eye: it rests on fewer requests than a quoted p99 needs and never "
            "crosses the edge of a window."
        )
    thinned = [service for service in timeline.services if service.thinned]
    if thinned:
        said.append("Dots are thinned, all of the slowest hundredth kept.")
    if timeline.left_out:
        said.append(
            f"Not shown: {', '.join(timeline.left_out)} (the {SERVICES} services with the longest tails are)."
        )
    if timeline.cpu is None:
        said.append("The profiler left no rows, so there are no CPU and GPU shares.")
    elif timeline.gpu is None:
        said.append("No GPU was seen by the profiler.")
    elif not timeline.gpu.stacked:
        said.append("The GPU could not be attributed to processes here.")
    return " ".join(said)


def _alt(timeline: Timeline) -> str:
    arms = ", ".join(dict.fromkeys(window.arm for window in timeline.windows))
    parts = [f"Timeline of {timeline.end_s:.0f} seconds with {len(timeline.windows)} windows ({arms})."]
    return " ".join([*parts, *(service.said for service in timeline.services)])


def _data(run: Run) -> Data:
    """One row per second (or coarser): requests, median and slowest answer per service, training, shares."""
    origin_ns = min(window.start_ns for window in run.windows)
    end_ns = max(window.stop_ns for window in run.windows)
    bin_ns = NS_PER_S * -(-(end_ns - origin_ns) // (NS_PER_S * TABLE_ROWS))
    edges = np.arange(origin_ns, end_ns + bin_ns, bin_ns)
    columns = ["from_s", "arm", "repeat"]
    cells: list[list[Any]] = []
    middles = (edges[:-1] + edges[1:]) // 2
    inside = [next((w for w in run.windows if w.start_ns <= t < w.stop_ns), None) for t in middles]
    cells.append([round(float(edge - origin_ns) / NS_PER_S, 3) for edge in edges[:-1]])
    cells.append([window.arm if window else "" for window in inside])
    cells.append([window.repeat if window else None for window in inside])
    for name, table in requests(run):
        ok = select(table, table["status"] == "OK")
        place = np.searchsorted(edges, ok["t_intended_ns"], side="right") - 1
        groups = [ok["sojourn_ms"][place == index] for index in range(len(middles))]
        columns += [f"{name} answers", f"{name} p50 ms", f"{name} max ms"]
        cells.append([len(group) for group in groups])
        cells.append([float(np.median(group)) if len(group) else None for group in groups])
        cells.append([float(group.max()) if len(group) else None for group in groups])
    if len(run.train["step"]):
        columns.append("training steps/s")
        cells.append([float(rate) for rate in binned_steps(run.train, edges.astype(np.float64))])
    for shares in (make(run, origin_ns, end_ns) for make in (cpu_shares, gpu_shares, power)):
        if shares:
            for label, values in shares.series():
                columns.append(f"{label} {shares.unit}")
                cells.append(_resampled(shares, values, middles, origin_ns))
    return Data(tuple(columns), list(zip(*cells, strict=True)))


def _resampled(shares: Shares, values: Floats, middles: NDArray[np.int64], origin_ns: int) -> list[float | None]:
    """The value of the tick interval each bin's middle lies in."""
    place = np.searchsorted(shares.seconds, (middles - origin_ns) / NS_PER_S)
    return [float(values[index]) if index < len(values) else None for index in place]
