"""A window while it runs, once a second: a panel on a terminal, a line now and then elsewhere, or JSON lines.

    tty          one rich panel, redrawn in place, gone when the window ends
    not a tty    one plain line every 10 s
    --json       one JSON object a second on stdout
    --quiet      nothing

What is shown is in corun.launch.watch. It runs inside the launcher's one poll, between two sleeps, and counts its
own CPU time; the run's manifest says what it cost. Whatever goes wrong here ends the display, never the run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from corun.clock import NS_PER_S, now_ns
from corun.launch.segments import Segment
from corun.launch.watch import MachineTail, Now, RingTail, TrainTail

PERIOD_NS = NS_PER_S
LINE_EVERY = 10
NEVER_NS = 1 << 62


class Display(Protocol):
    """Where a window is shown; `begin` and `end` enclose it."""

    def begin(self) -> None: ...

    def show(self, now: Now, tick: int) -> None: ...

    def end(self) -> None: ...


class Live:
    """Shows each window of a run on a display; `next_ns` is when it wants to be called again."""

    def __init__(self, display: Display, clock: Callable[[], int] = now_ns) -> None:
        self._display = display
        self._clock = clock
        self._window: _Window | None = None
        self._tails: _Tails | None = None
        self.next_ns = NEVER_NS
        self.ticks = 0
        self.cpu_ns = 0
        self.shown_ns = 0
        self.fault = ""

    def begin(self, run: Path, segment: Segment, services: Sequence[str], start_ns: int, stop_ns: int) -> None:
        """A window was armed; the first look is a second after its start."""
        if self.fault:
            return
        if self._tails is None:
            self._tails = _Tails(run)
            self.ticks = self.cpu_ns = self.shown_ns = 0
        self._window = _Window(run, segment, services, start_ns, stop_ns, self._tails)
        self.next_ns = start_ns + PERIOD_NS
        self.shown_ns += stop_ns - start_ns
        self._safely(self._display.begin)

    def tick(self) -> None:
        """Look and show, if it is time."""
        if self._clock() < self.next_ns or self._window is None:
            return
        began = time.thread_time_ns()
        window, now = self._window, self._clock()
        number = (now - window.start_ns) // PERIOD_NS
        self.next_ns = window.start_ns + (number + 1) * PERIOD_NS
        self._safely(lambda: self._display.show(window.look(now), number))
        self.ticks += 1
        self.cpu_ns += time.thread_time_ns() - began

    def end(self) -> None:
        """The window is over."""
        window, self._window = self._window, None
        self.next_ns = NEVER_NS
        if window is not None:
            window.close()
            self._safely(self._display.end)

    def _safely(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, ValueError) as error:
            self.fault = f"the live display ended: {error}"
            self.close()

    def close(self) -> None:
        """The run is over; another one may follow."""
        window, tails = self._window, self._tails
        self._window = self._tails = None
        self.next_ns = NEVER_NS
        for part in (window, tails):
            if part is not None:
                part.close()

    def cost(self) -> dict[str, Any]:
        """For the manifest: ticks, CPU time, and its share of a core while windows were shown."""
        share = 100 * self.cpu_ns / self.shown_ns if self.shown_ns else 0.0
        return {
            "ticks": self.ticks,
            "cpu_ms": round(self.cpu_ns / 1e6, 3),
            "pct_of_core": round(share, 4),
            "fault": self.fault,
        }


class _Tails:
    """The files that go through all windows of a run."""

    def __init__(self, run: Path) -> None:
        self.train = TrainTail(run / "train.csv")
        self.machine = MachineTail(run)

    def close(self) -> None:
        self.train.close()
        self.machine.close()


class _Window:
    """One window and its rings."""

    def __init__(
        self, run: Path, segment: Segment, services: Sequence[str], start_ns: int, stop_ns: int, tails: _Tails
    ) -> None:
        self.start_ns = start_ns
        self._stop_ns = stop_ns
        self._segment = segment
        self._tails = tails
        names = services if segment.serves else ()
        self._rings = [RingTail(run / "infer_client" / f"{name}.{segment.index}.ring", name) for name in names]

    def look(self, now_ns: int) -> Now:
        return Now(
            arm=self._segment.arm,
            repeat=self._segment.repeat,
            elapsed_s=(now_ns - self.start_ns) / NS_PER_S,
            left_s=max(0.0, (self._stop_ns - now_ns) / NS_PER_S),
            services=tuple(ring.read(self.start_ns, now_ns) for ring in self._rings),
            train=self._tails.train.read(self.start_ns, now_ns) if self._segment.trains else None,
            machine=self._tails.machine.read(),
        )

    def close(self) -> None:
        for ring in self._rings:
            ring.close()


def make_live(console: Console, say: Callable[[str], None], quiet: bool, json_to: IO[str] | None) -> Live | None:
    """The display that fits: JSON lines to `json_to` if given, nothing when quiet, else by what the console is."""
    if json_to is not None:
        return Live(JsonLines(json_to))
    if quiet:
        return None
    return Live(Panel(console) if console.is_terminal else Lines(say))


class JsonLines:
    """One JSON object per look."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def begin(self) -> None:
        pass

    def show(self, now: Now, tick: int) -> None:
        self._file.write(json.dumps({"live": asdict(now)}) + "\n")
        self._file.flush()

    def end(self) -> None:
        pass


class Lines:
    """A plain line every LINE_EVERY looks."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def begin(self) -> None:
        pass

    def show(self, now: Now, tick: int) -> None:
        if tick % LINE_EVERY == 0:
            self._say(line(now))

    def end(self) -> None:
        pass


class Panel:
    """A rich panel redrawn in place, without a thread of its own."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: RichLive | None = None

    def begin(self) -> None:
        self._live = RichLive(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def show(self, now: Now, tick: int) -> None:
        if self._live is not None:
            self._live.update(panel(now), refresh=True)

    def end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


# Words


def line(now: Now) -> str:
    """A window at one instant as one line of text."""
    parts = [f"{now.arm} {now.elapsed_s:.0f} s, {now.left_s:.0f} s left"]
    for service in now.services:
        errors = f", {service.errors} errors" if service.errors else ""
        parts.append(
            f"{service.name} {service.rate:.1f}/s, p50 {_ms(service.p50_ms)} p99 {_ms(service.p99_ms)} "
            f"max {_ms(service.max_ms)} ms, {service.in_flight} in flight{errors}"
        )
    return "; ".join([*parts, *_below(now)])


def _below(now: Now) -> list[str]:
    """Training and machine."""
    parts = []
    if now.train:
        loss = "" if now.train.loss is None else f", loss {now.train.loss:.3g}"
        parts.append(f"training {now.train.steps_per_s:.2f} steps/s, {now.train.samples_per_s:.1f} samples/s{loss}")
    machine = now.machine
    roles = ", ".join(f"{role} {cores:.2f}" for role, cores in machine.roles.items() if cores >= 0.005)
    if machine.host_cores is not None:
        parts.append(f"CPU {machine.host_cores:.2f} cores" + f" ({roles})" * bool(roles))
    for gpu, (util, power) in machine.gpus.items():
        parts.append(f"GPU {gpu} {_ms(util)} %" + ("" if power is None else f" {power:.0f} W"))
    return parts


def panel(now: Now) -> RenderableType:
    """The same as a table of services with lines below."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column(f"{now.arm} (repeat {now.repeat + 1}), {now.left_s:.0f} s left", no_wrap=True)
    for name in ("answers/s", "p50 ms", "p99 ms", "max ms", "in flight", "errors"):
        table.add_column(name, justify="right", no_wrap=True)
    for service in now.services:
        latencies = (_ms(value) for value in (service.p50_ms, service.p99_ms, service.max_ms))
        counts = (str(service.in_flight), str(service.errors))
        table.add_row(service.name, f"{service.rate:.1f}", *latencies, *counts)
    return Group(table, *(Text(part) for part in _below(now)))


def _ms(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"


__all__ = ["Display", "JsonLines", "Lines", "Live", "Panel", "line", "make_live", "panel"]
