"""Two pictures of a training run as PNG: learning curves, and forecasts against what came."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from corun.predict.data import NS
from corun.predict.levels import BASELINE, Level
from corun.predict.series import Field

__all__ = ["forecasts", "learning_curves"]

SHOWN_ROWS: Final = 200
COLOURS: Final = {"lstm": "#1f77b4", "dlinear": "#d62728", BASELINE: "#7f7f7f"}
UNITS: Final = {"inter_arrival_s": "s", "request_tokens": "tokens", "response_tokens": "tokens"}


def learning_curves(path: Path, levels: Mapping[str, Level]) -> Path:
    """Pinball loss by epoch on train and on the early-stopping part, one panel a level; the kept epoch is marked."""
    figure = Figure(figsize=(5.2 * len(levels), 3.4), layout="constrained")
    for axes, (level, outcome) in zip(figure.subplots(1, len(levels), squeeze=False)[0], levels.items(), strict=True):
        for name, curve in outcome.curves.items():
            epochs = np.arange(1, len(curve.train) + 1)
            axes.plot(epochs, curve.train, color=COLOURS.get(name), linestyle=":", label=f"{name} train")
            axes.plot(epochs, curve.early, color=COLOURS.get(name), label=f"{name} held out")
            axes.plot(curve.best_epoch + 1, curve.early[curve.best_epoch], "o", color=COLOURS.get(name))
        axes.set(title=f"{level} level", xlabel="epoch", ylabel="pinball loss (standardised logs)")
        axes.legend(fontsize=8)
    return _write(figure, path)


def forecasts(path: Path, outcome: Level, fields: tuple[Field, ...]) -> Path:
    """The last 200 test rows of every target: what came, each model's median, and the recommended one's interval."""
    shown = outcome.shown
    last = slice(-SHOWN_ROWS, None)
    seconds = (shown.t_ns[last] - shown.t_ns[last][0]) / NS
    figure = Figure(figsize=(9, 2.5 * len(fields)), layout="constrained")
    panels = figure.subplots(len(fields), 1, squeeze=False, sharex=True)[:, 0]
    for place, (axes, field) in enumerate(zip(panels, fields, strict=True)):
        axes.plot(seconds, shown.actual[last, place], ".", color="black", markersize=3, label="came")
        for name, levels in shown.levels.items():
            axes.plot(seconds, levels[last, place, 2], color=COLOURS.get(name), linewidth=1, label=name)
            if name == outcome.recommended:
                ends = levels[last, place]
                axes.fill_between(seconds, ends[:, 0], ends[:, 4], color=COLOURS.get(name), alpha=0.2, linewidth=0)
        unit = UNITS.get(field.name, "per window")
        axes.set(ylabel=f"{field.name} [{unit}]")
        axes.set_ylim(0, float(np.quantile(shown.actual[last, place], 0.99)) * 1.2 + 1e-9)
    panels[0].set_title(f"test part, last {seconds.size} rows; recommended: {outcome.recommended}")
    panels[0].legend(fontsize=8, ncols=4)
    panels[-1].set_xlabel("s")
    return _write(figure, path)


def _write(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)
    return path
