"""How fast training is, alone and beside the services, with one dot per repeat."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure

from corun.report.exhibit import Data, Exhibit, missing, shown
from corun.report.look import Look, grid, height
from corun.report.summary import Row, Summary
from corun.stats.intervals import Estimate, ratio_interval, t_interval

KEY, TITLE = "training", "Training speed"


@dataclass(frozen=True)
class Speed:
    """Samples per second of one arm: all repeats together, each repeat, and the interval over repeats."""

    arm: str
    pooled: float
    repeats: tuple[float, ...]
    interval: Estimate
    steps: int


def exhibit(summary: Summary) -> Exhibit:
    """Training speed by arm, or why there is none."""
    speeds = make(summary)
    if not speeds:
        why = "No training job was part of this run." if not _job(summary) else "The trainer left no complete window."
        return missing(KEY, TITLE, f"There is no training speed: {why}")
    return Exhibit(KEY, TITLE, _caption(speeds), _alt(speeds), lambda f, look: draw(speeds, f, look), _data(speeds))


def make(summary: Summary) -> list[Speed]:
    """Training speed of the arms that trained."""
    return [speed for arm in ("train", "corun") for speed in _speed(summary, arm)]


def _speed(summary: Summary, arm: str) -> list[Speed]:
    pooled = [row for row in summary.pooled(arm, "trainer") if row["train_samples_per_s"] is not None]
    if not pooled:
        return []
    repeats = [row["train_samples_per_s"] for row in _repeats(summary.rows, arm)]
    return [
        Speed(arm, pooled[0]["train_samples_per_s"], tuple(repeats), t_interval(repeats), pooled[0]["train_steps"])
    ]


def _repeats(rows: list[Row], arm: str) -> list[Row]:
    mine = [row for row in rows if row["role"] == "trainer" and row["arm"] == arm and row["repeat"] is not None]
    return sorted(mine, key=lambda row: row["repeat"])


def kept(speeds: list[Speed]) -> Estimate:
    """corun / train with its interval over repeats, or why there is none."""
    train, corun = (next((s.repeats for s in speeds if s.arm == arm), ()) for arm in ("train", "corun"))
    paired = len(train) == len(corun)
    return ratio_interval(train, corun, paired=paired)


def draw(speeds: list[Speed], figure: Figure, look: Look) -> None:
    """One bar per arm, one dot per repeat, whiskers for the interval."""
    height(figure, look, 0.75 + 0.42 * len(speeds))
    ax = figure.subplots()
    for place, speed in enumerate(reversed(speeds)):
        ax.barh(place, speed.pooled, 0.62, color=look.arm(speed.arm), alpha=0.8)
        if len(speed.repeats) > 1:
            ax.plot(speed.repeats, [place] * len(speed.repeats), "o", color=look.ink, markersize=3, alpha=0.7)
        interval = speed.interval.interval
        if interval:
            ax.plot([interval.low, interval.high], [place, place], color=look.ink, linewidth=1.2)
        right = max([speed.pooled, *speed.repeats, *([interval.high] if interval else [])])
        ax.annotate(
            shown(speed.pooled), (right, place), (5, 0), textcoords="offset points", va="center", color=look.muted
        )
    ax.set_yticks(range(len(speeds)), [speed.arm for speed in reversed(speeds)])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(-0.5, len(speeds) - 0.5)
    ax.set_xlim(0, ax.get_xlim()[1] * 1.1)
    ax.set_xlabel("training samples/s")
    grid(ax, "x")


def _job(summary: Summary) -> bool:
    return bool((summary.manifest.get("config") or {}).get("train"))


def _caption(speeds: list[Speed]) -> str:
    said = ["Samples of the steps inside the measured windows, per second."]
    repeats = max(len(speed.repeats) for speed in speeds)
    if repeats > 1:
        said.append(f"Dots are the {repeats} repeats, whiskers the 95 % t-interval over them.")
    else:
        said.append("One repeat: there is no interval.")
    if len(speeds) == 2:
        estimate = kept(speeds)
        ratio = f"Beside the services training runs at {speeds[1].pooled / speeds[0].pooled:.0%} of its own speed"
        if estimate.interval:
            ratio += f" (95 % interval {estimate.interval.low:.0%} to {estimate.interval.high:.0%})"
        said.append(f"{ratio}.")
    return " ".join(said)


def _alt(speeds: list[Speed]) -> str:
    return "Training speed: " + ", ".join(f"{s.arm} {shown(s.pooled)} samples/s" for s in speeds) + "."


def _data(speeds: list[Speed]) -> Data:
    rows: list[tuple[object, ...]] = []
    for speed in speeds:
        interval = speed.interval.interval
        bounds = (interval.low, interval.high) if interval else (None, None)
        rows.append((speed.arm, "all", speed.pooled, *bounds, speed.steps))
        rows += [(speed.arm, index, value, None, None, None) for index, value in enumerate(speed.repeats)]
    return Data(("arm", "repeat", "samples/s", "low", "high", "steps"), rows)
