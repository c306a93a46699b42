"""The figure of accuracy over time, with the instants at which the weights changed."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from corun.clock import NS_PER_S
from corun.report.accuracy import WINDOW_S, Second, overall, seconds
from corun.report.exhibit import Data, Exhibit
from corun.report.look import Look, grid
from corun.run.read import Run

KEY, TITLE = "accuracy", "Accuracy"


def exhibits(run: Run) -> list[Exhibit]:
    """The figure, for a run whose requests carry labels; [] for others."""
    rows = seconds(run)
    if not rows:
        return []
    origin_ns = min(window.start_ns for window in run.windows)
    changes = changes_s(run, origin_ns)
    said = "; ".join(
        f"{service}: {found['accuracy']:.1%} of {found['requests']:,.0f} labelled requests"
        for service, found in overall(rows).items()
    )
    caption = (
        f"Share of right first answers in each second. {said}. Dashed: {len(changes)} "
        f"change{'s' * (len(changes) != 1)} of weights."
    )
    return [
        Exhibit(KEY, TITLE, caption, caption, lambda f, look: _draw(rows, changes, origin_ns, f, look), _data(rows))
    ]


def changes_s(run: Run, origin_ns: int) -> list[float]:
    """Seconds from origin_ns at which a server put other weights in place, earlier ones left out."""
    kinds = np.isin(run.events["kind"].astype(str), ["swap", "rollback"]) & (run.events["role"] == "server")
    inside = (run.events["t_ns"] - origin_ns)[kinds] / NS_PER_S
    return [float(second) for second in inside if second >= 0]


def _draw(rows: list[Second], changes: list[float], origin_ns: int, figure: Figure, look: Look) -> None:
    axes = figure.add_subplot()
    for number, service in enumerate(dict.fromkeys(row.service for row in rows)):
        mine = [row for row in rows if row.service == service]
        middles = [(row.t_ns - origin_ns) / NS_PER_S + WINDOW_S / 2 for row in mine]
        axes.plot(middles, [row.accuracy for row in mine], color=f"C{number}", linewidth=1.6, label=service)
    for second in changes:
        axes.axvline(second, linestyle="--", linewidth=0.8, color=look.muted)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("seconds")
    axes.set_ylabel("right answers")
    axes.legend(loc="lower left")
    grid(axes, "y")


def _data(rows: list[Second]) -> Data:
    columns = ("service", "second", "requests", "right", "accuracy", "weights")
    return Data(
        columns, [(row.service, row.t_s, row.n, row.correct, row.accuracy, row.weights_version) for row in rows]
    )
