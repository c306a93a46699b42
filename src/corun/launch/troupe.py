"""Processes that stay, and windows in which any of them work: what a planner's stage and a benchmark of policies share.

    window   ARM those who take part ─ START ─ sleep ─ DRAIN ─ what they recorded in it
    close    STOP to all, the last one started first

Whoever is not in a window sleeps in a system call: resident, not running.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from corun.clock import NS_PER_MS, NS_PER_S, now_ns
from corun.errors import CorunError, RunFault
from corun.launch.children import Child, Family
from corun.launch.control import ControlSocket
from corun.launch.window import channel_of
from corun.load.ring import Records, read_ring
from corun.run.read import read_table
from corun.run.records import TRAIN
from corun.share.foreign import Reading, foreign_cores, own_cores, read_cpu
from corun.share.host import Host
from corun.wire import Status
from corun.wire.messages import Arm, Drain, Start, Stop

ARM_AHEAD_S: Final = 0.4
ANSWER_S: Final = 30.0
NO_ROWS: Final = (0, 0)


@dataclass(frozen=True)
class Window:
    """One that is over: its number, its ends, and the CPU's readings at them."""

    number: int
    start_ns: int
    stop_ns: int
    before: Reading
    after: Reading

    @property
    def foreign_cores(self) -> float:
        """Cores that others used in it."""
        return foreign_cores(self.before, self.after)

    def own_cores(self, pids: Iterable[int]) -> float:
        """Cores that these processes used in it."""
        return own_cores(self.before, self.after, pids)


class Troupe:
    """Children that report to one control socket; a context. out: where they write. drain_s: for the last replies."""

    def __init__(self, out: Path, drain_s: float) -> None:
        self.out, self.host = out, Host()
        self._drain_s, self._number, self._stack = drain_s, 0, ExitStack()

    def __enter__(self) -> Self:
        self.control = self._stack.enter_context(ControlSocket())
        self.family = self._stack.enter_context(Family(self.out))
        return self

    def __exit__(self, *exc: object) -> None:
        for child in reversed(self.family.children):
            with suppress(CorunError, OSError):
                channel_of(child).request(Stop("no more windows"), ANSWER_S)
        self._stack.close()

    def window(
        self,
        playing: Sequence[Child],
        arm: str,
        repeat: int,
        seconds: float,
        rows: Mapping[str, tuple[int, int]],
    ) -> Window:
        """One window of these children; rows: of the schedule, by name of the client that sends them.

        Clients come first in `playing`: they stop sending before anybody else is drained.
        RunFault: a child died or did not answer; the troupe is of no use afterwards.
        """
        self._number += 1
        start_ns = now_ns() + round(ARM_AHEAD_S * NS_PER_S)
        stop_ns = start_ns + round(seconds * NS_PER_S)
        try:
            for child in playing:
                mine = rows.get(child.name, NO_ROWS) if child.role == "client" else NO_ROWS
                message = Arm(arm, repeat, self._number, start_ns, stop_ns, *mine)
                channel_of(child).request(message, ANSWER_S)
            for child in playing:
                channel_of(child).request(Start(self._number), ANSWER_S)
            before, after = (self._cpu_at(instant_ns) for instant_ns in (start_ns, stop_ns))
            for child in playing:
                channel_of(child).request(Drain(round(self._drain_s * 1000)), self._drain_s + ANSWER_S)
        except (CorunError, OSError) as error:
            time.sleep(ARM_AHEAD_S)
            self.family.require_alive()
            raise RunFault(f"a window of {arm} failed: {error}") from error
        self.family.require_alive()
        return Window(self._number, start_ns, stop_ns, before, after)

    def _cpu_at(self, instant_ns: int) -> Reading:
        time.sleep(max(0.0, (instant_ns - now_ns()) / NS_PER_S))
        return read_cpu([os.getpid()], self.host, now_ns())

    def records(self, client: str, window: Window) -> Records | None:
        """What a client recorded in a window, which is forgotten on disk; None when it had nothing to send."""
        ring = self.out / "infer_client" / f"{client}.{window.number}.ring"
        if not ring.exists():
            return None
        records = read_ring(ring)
        ring.unlink()
        return records

    def samples_per_s(self, window: Window, out: Path | None = None) -> float:
        """Training samples/s inside a window; a step across its border counts by the part inside.

        out: the trainer's directory, where it is not the troupe's.
        """
        steps = read_table((out or self.out) / "train.csv", TRAIN)
        mine = steps["segment"] == window.number
        begin, end = steps["t_start_ns"][mine], steps["t_end_ns"][mine]
        ends = window.start_ns, window.stop_ns
        inside = np.clip(end, *ends) - np.clip(begin, *ends)
        shares = inside / np.maximum(1, end - begin)
        return float((steps["samples"][mine] * shares).sum() * NS_PER_S / (window.stop_ns - window.start_ns))


def sojourns_ms(records: Records) -> NDArray[np.float64]:
    """From the intended send until the reply; a request without a reply waited for ever."""
    sojourns = (records["t_rx"] - records["t_intended"]) / NS_PER_MS
    return np.asarray(np.where(records["status"] == Status.OK, sojourns, np.inf), dtype=np.float64)
