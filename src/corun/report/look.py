"""How figures look: four renderings of each (light and dark, wide and phone), colours safe for colour-blind readers.

Colour means one thing per figure. Arms, roles and stages use the palette of Okabe and Ito (2008, "Color
Universal Design"), lightened on a dark ground. Figures are drawn with matplotlib's Agg canvas on Figure objects
of their own; pyplot and its global state are never touched.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

Draw = Callable[[Figure, "Look"], None]

COLOURS: Final = 256
"""Colours of a stored PNG: an indexed image is a third of the size."""


@dataclass(frozen=True)
class Look:
    """One rendering. width in inches; text sizes in points, the same in all of them."""

    dark: bool = False
    narrow: bool = False

    @property
    def name(self) -> str:
        return ("dark" if self.dark else "light") + ("-phone" if self.narrow else "")

    @property
    def width(self) -> float:
        return 4.1 if self.narrow else 9.2

    @property
    def dpi(self) -> int:
        return 200 if self.narrow else 160

    @property
    def ground(self) -> str:
        return "#14171b" if self.dark else "#ffffff"

    @property
    def ink(self) -> str:
        return "#e4e7eb" if self.dark else "#1d2126"

    @property
    def muted(self) -> str:
        return "#9aa4b0" if self.dark else "#5a6472"

    @property
    def grid(self) -> str:
        return "#2b3138" if self.dark else "#e6e9ed"

    @property
    def alarm(self) -> str:
        return "#ff6b6b" if self.dark else "#c1121f"

    def arm(self, name: str) -> str:
        """Colour of an arm."""
        light, dark = {
            "alone": ("#0072b2", "#4db2e8"),
            "train": ("#008a66", "#2fc79d"),
            "corun": ("#d55e00", "#ff9248"),
        }.get(name, ("#777777", "#aaaaaa"))
        return dark if self.dark else light

    def role(self, name: str) -> str:
        """Colour of a process role in stacked shares."""
        light, dark = {
            "server": ("#3d9bd1", "#3d9bd1"),
            "trainer": ("#e69f00", "#d99a1c"),
            "client": ("#b76a92", "#c77fa6"),
            "profiler": ("#5b6470", "#8a95a3"),
            "other": ("#cfd5dc", "#3d454f"),
        }.get(name, ("#8f9aa7", "#6b7683"))
        return dark if self.dark else light


LOOKS: Final = tuple(Look(dark, narrow) for narrow in (False, True) for dark in (False, True))


def png(draw: Draw, look: Look) -> bytes:
    """Draw one rendering and return it as PNG."""
    with mpl.rc_context(_settings(look)):
        figure = Figure(figsize=(look.width, look.width / 2), dpi=look.dpi, layout="constrained")
        draw(figure, look)
        raw = io.BytesIO()
        figure.savefig(raw, format="png")
    raw.seek(0)
    small = io.BytesIO()
    Image.open(raw).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(small, "png", compress_level=7)
    return small.getvalue()


def _settings(look: Look) -> dict[str, Any]:
    return {
        "font.family": "DejaVu Sans",
        "font.size": 9.0,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 7.0,
        "axes.labelsize": 8.5,
        "axes.labelcolor": look.muted,
        "axes.edgecolor": look.muted,
        "axes.facecolor": look.ground,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "figure.facecolor": look.ground,
        "grid.color": look.grid,
        "grid.linewidth": 0.8,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "legend.handlelength": 1.2,
        "legend.columnspacing": 1.4,
        "lines.linewidth": 1.6,
        "text.color": look.ink,
        "xtick.color": look.muted,
        "ytick.color": look.muted,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "xtick.major.size": 3.0,
        "ytick.major.size": 3.0,
        "xtick.minor.size": 0.0,
        "ytick.minor.size": 0.0,
        "path.simplify": True,
    }


def grid(axes: Axes, axis: Literal["x", "y", "both"]) -> None:
    """Light lines along one axis, none on the other."""
    axes.grid(True, axis=axis, which="major")


def plain_log(axes: Axes, axis: str) -> None:
    """A log axis whose ticks read 1, 2, 5, 10 ... instead of powers of ten; fewer of them over many decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    target = axes.xaxis if axis == "x" else axes.yaxis
    low, high = sorted(target.get_view_interval())
    decades = high / low if low > 0 else 1.0
    subs = (1.0, 2.0, 5.0) if decades < 60 else (1.0, 3.0) if decades < 400 else (1.0,)
    target.set_major_locator(LogLocator(base=10.0, subs=subs, numticks=12))
    target.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    target.set_minor_locator(NullLocator())


def height(figure: Figure, look: Look, inches: float) -> None:
    """Set the height; the width is the look's."""
    figure.set_size_inches(look.width, inches)
