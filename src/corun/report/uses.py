"""What the processes of a run used in one window: CPU, memory and GPU, by role and name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from corun.report.counters import increase, numbers
from corun.run.read import Table, Window, select

Who = tuple[str, str]

_SAMPLED = ("nvml_sm", "exclusive")


@dataclass(frozen=True)
class Span:
    """One window as far as the profiler covers it."""

    window: Window
    begin_ns: int
    end_ns: int

    @property
    def clipped(self) -> Window:
        return replace(self.window, start_ns=self.begin_ns, stop_ns=self.end_ns)

    @property
    def nanoseconds(self) -> int:
        return self.end_ns - self.begin_ns

    def inside(self, t_ns: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Ticks whose reading describes time of this span."""
        return np.asarray((t_ns > self.begin_ns) & (t_ns <= self.end_ns))


@dataclass(frozen=True)
class Use:
    """What the processes of one role and name used in one window; None where it could not be read."""

    cpu_ns: float = 0.0
    runq_ns: float | None = None
    rss_mib: float | None = None
    gpu_share_pct: float | None = None
    gpu_mem_mib: float | None = None
    gpu_attr: str = ""
    sm_on: Mapping[str, float] = field(default_factory=dict)


def uses(process: Table, span: Span) -> dict[Who, Use]:
    """By role and name, in the order the processes were started."""
    found: dict[Who, Use] = {}
    keys = [(str(role), _text(name)) for role, name in zip(process["role"], process["name"], strict=True)]
    for who in dict.fromkeys(keys):
        mine = select(process, np.array([key == who for key in keys], dtype=bool))
        if ((mine["t_ns"] >= span.begin_ns) & (mine["t_ns"] <= span.end_ns)).any():
            found[who] = _use(mine, span)
    return found


def _text(name: object) -> str:
    """A name; a column of nothing but numbers was read as floats."""
    return f"{name:g}" if isinstance(name, float) else str(name)


def _use(rows: Table, span: Span) -> Use:
    inside = select(rows, span.inside(rows["t_ns"]))
    attr = next((str(cell) for cell in inside.get("gpu_attr", ()) if isinstance(cell, str) and cell), "")
    sm_on = _sm_on(inside) if attr in _SAMPLED else {}
    return Use(
        cpu_ns=_grown(rows, "cpu_ns", span) or 0.0,
        runq_ns=_grown(rows, "runq_wait_ns", span),
        rss_mib=_most(inside, "rss_mib"),
        gpu_share_pct=_gpu_share(rows, sm_on, attr, span),
        gpu_mem_mib=_most(inside, "gpu_mem_mib"),
        gpu_attr=attr,
        sm_on=sm_on,
    )


def _grown(rows: Table, column: str, span: Span) -> float | None:
    """Growth of a counter summed over the processes of rows."""
    counter = numbers(rows, column)
    grown = [
        increase(rows["t_ns"][mine], counter[mine], span.begin_ns, span.end_ns)
        for mine in (rows["pid"] == pid for pid in np.unique(rows["pid"]))
    ]
    known = [value for value in grown if value is not None]
    return sum(known) if known else None


def _most(rows: Table, column: str) -> float | None:
    """The largest sum over the processes at one tick."""
    values = numbers(rows, column)
    known = ~np.isnan(values)
    if not known.any():
        return None
    _, tick = np.unique(rows["tick"][known], return_inverse=True)
    return float(np.bincount(tick, weights=values[known]).max())


def _sm_on(inside: Table) -> dict[str, float]:
    """SM percent summed over ticks by GPU; a process on several GPUs counts on each with an equal part."""
    shares: dict[str, float] = {}
    for cell, percent in zip(inside["gpu"], numbers(inside, "gpu_sm_pct"), strict=True):
        if np.isnan(percent):
            continue
        gpus = [f"{cell:g}"] if isinstance(cell, float) else str(cell).split("+")
        for gpu in gpus:
            shares[gpu] = shares.get(gpu, 0.0) + float(percent) / len(gpus)
    return shares


def _gpu_share(rows: Table, sm_on: Mapping[str, float], attr: str, span: Span) -> float | None:
    if attr == "fdinfo":
        busy = _grown(rows, "gpu_busy_ns", span)
        return None if busy is None else 100 * busy / span.nanoseconds
    ticks = len(np.unique(rows["tick"][span.inside(rows["t_ns"])]))
    return sum(sm_on.values()) / ticks if sm_on and ticks else None
