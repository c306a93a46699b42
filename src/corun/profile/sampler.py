"""One tick: read everything, write one row per GPU and process, and last the row of the tick itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from corun.clock import Anchor
from corun.profile.gpu import GpuUse
from corun.profile.grid import Grid, Tick
from corun.profile.processes import ProcessTable
from corun.profile.source import READ_ERRORS, Faults, HostSource, Row, Status
from corun.profile.tables import GPU, PROCESS, PROFILE
from corun.profile.watch import WatchFile
from corun.run.table import TableWriter


class GpuSource(Protocol):
    """All GPUs of the machine."""

    def read(self) -> tuple[list[Row], dict[int, GpuUse]]:
        """One row per GPU, and per process what it uses."""

    def status(self) -> Status:
        """What the probe found."""

    def close(self) -> None:
        """Give the driver back."""


@dataclass(frozen=True)
class Sources:
    """Everything that is read at a tick."""

    host: Sequence[HostSource]
    processes: ProcessTable
    gpus: GpuSource | None = None
    watch: WatchFile | None = None

    def close(self) -> None:
        """Close all of them."""
        for source in self.host:
            source.close()
        self.processes.close()
        if self.gpus:
            self.gpus.close()


@dataclass(frozen=True)
class Window:
    """One armed segment; rows inside [start_at_ns, stop_at_ns) carry its arm, repeat and number."""

    arm: str
    repeat: int
    segment: int
    start_at_ns: int
    stop_at_ns: int

    def cells(self, t_ns: int) -> Row:
        """The segment's cells at `t_ns`: `idle` outside the window."""
        if self.start_at_ns <= t_ns < self.stop_at_ns:
            return {"arm": self.arm, "repeat": self.repeat, "segment": self.segment}
        return IDLE


IDLE: Row = {"arm": "idle"}


@dataclass(frozen=True)
class SamplerStatistics:
    """How the profiler itself is doing."""

    ticks: int
    """Rows of profile.csv written so far."""
    missed: int
    """Ticks skipped because a reading stalled or the process was not run."""
    read_errors: int
    """Failed readings so far."""
    late_us_max: int
    """The latest tick, in µs after its deadline."""
    read_us_mean: float
    """Mean time the readings of one tick took."""
    processes: int
    """Processes followed now."""


class Tables:
    """The three files; a profile row is written last, so its presence says that its tick is whole."""

    def __init__(self, out: Path, host: Sequence[HostSource]) -> None:
        extra = [column for source in host for column in source.columns]
        self.profile = TableWriter(out / "profile.csv", [*PROFILE, *extra])
        self.gpu = TableWriter(out / "gpu.csv", GPU)
        self.process = TableWriter(out / "process.csv", PROCESS)

    def write(self, profile: Row, gpus: list[Row], processes: list[Row]) -> None:
        """The rows of one tick, each table flushed once."""
        self.process.rows(processes)
        self.gpu.rows(gpus)
        self.profile.row(profile)

    def close(self) -> None:
        for table in (self.profile, self.gpu, self.process):
            table.close()


class Sampler:
    """Reads a tick and writes its rows. `segment_at` gives the arm, repeat and segment cells at a time."""

    def __init__(
        self,
        sources: Sources,
        tables: Tables,
        faults: Faults,
        now_ns: Callable[[], int],
        anchor: Anchor,
        segment_at: Callable[[int], Row],
    ) -> None:
        self._sources = sources
        self._tables = tables
        self._faults = faults
        self._now_ns = now_ns
        self._anchor = anchor
        self._segment_at = segment_at
        self._namespace_checked = False
        self._ticks = self._missed = self._late_us_max = self._read_us = 0

    def sample(self, tick: Tick) -> None:
        """Read everything once; the readings that fail are empty cells."""
        t_ns = tick.deadline_ns + tick.late_ns
        stamp: Row = {**self._segment_at(t_ns), "tick": tick.number, "t_ns": t_ns}
        gpus, uses = self._read_gpus()
        processes = self._read_processes(uses)
        host = self._read_host()
        read_us = (self._now_ns() - t_ns) // 1000
        self._count(tick, read_us)
        own: Row = {
            "t_wall_ns": self._anchor.wall_at(t_ns),
            "late_us": tick.late_ns // 1000,
            "missed": tick.missed,
            "read_us": read_us,
            "read_errors": self._faults.total,
        }
        self._tables.write(stamp | own | host, [stamp | row for row in gpus], [stamp | row for row in processes])

    def _read_gpus(self) -> tuple[list[Row], dict[int, GpuUse]]:
        return self._sources.gpus.read() if self._sources.gpus else ([], {})

    def _read_processes(self, uses: dict[int, GpuUse]) -> list[Row]:
        if self._sources.watch:
            try:
                self._sources.processes.watch(self._sources.watch.new())
            except OSError as error:
                self._faults.record("watch", error)
        rows = self._sources.processes.read()
        self._warn_of_strangers(uses)
        return [_with_gpu(row, uses.get(pid)) if isinstance(pid := row["pid"], int) else row for row in rows]

    def _warn_of_strangers(self, uses: dict[int, GpuUse]) -> None:
        """Say once that NVML's process numbers are another namespace's: a container without the host's."""
        if uses and not self._namespace_checked:
            self._namespace_checked = True
            if not any(self._sources.processes.exists(pid) for pid in uses):
                self._faults.record(
                    "nvml", "process numbers on the GPU are not ours: run the container with --pid host"
                )

    def _read_host(self) -> Row:
        row: Row = {}
        for source in self._sources.host:
            try:
                source.read(row)
            except READ_ERRORS as error:
                self._faults.record(source.name, error)
        return row

    def _count(self, tick: Tick, read_us: int) -> None:
        self._ticks += 1
        self._missed += tick.missed
        self._late_us_max = max(self._late_us_max, tick.late_ns // 1000)
        self._read_us += read_us

    def statistics(self) -> SamplerStatistics:
        """The counts so far."""
        mean = round(self._read_us / self._ticks, 1) if self._ticks else 0.0
        return SamplerStatistics(
            self._ticks, self._missed, self._faults.total, self._late_us_max, mean, len(self._sources.processes)
        )


def _with_gpu(row: Row, use: GpuUse | None) -> Row:
    """A process row with NVML's cells; what fdinfo says about the same process is better and stays."""
    if use is None:
        return row
    return {**use.cells(), **row} if row.get("gpu_attr") else row | use.cells()


def run(
    grid: Grid,
    wait_until: Callable[[int], bool],
    now_ns: Callable[[], int],
    sample: Callable[[Tick], None],
    count: int = 0,
) -> None:
    """Sample on the grid until `wait_until` says stop (False) or `count` ticks are done (0 = no limit)."""
    done = 0
    while (not count or done < count) and wait_until(grid.next_deadline_ns(now_ns())):
        sample(grid.take(now_ns()))
        done += 1
