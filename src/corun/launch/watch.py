"""What a running window looks like, read from files its processes write anyway: nobody is asked, nobody is disturbed.

    services    the clients' record rings (infer_client/<service>.<segment>.ring): slots of the last seconds
    training    the tail of train.csv
    CPU, GPU    the tails of process.csv, profile.csv and gpu.csv, one tick of the profiler old

Asking a server for its statistics would take its interpreter's lock from the model thread; its rows and the rings
are in the page cache already. Rings are read, not mapped: a file that is cut while it is read ends the read.
"""

from __future__ import annotations

import csv
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corun.clock import NS_PER_MS, NS_PER_S
from corun.load.ring import HEAD_SIZE, SLOT_DTYPE, SLOT_SIZE, UNSENT, Records, layout
from corun.stats.percentiles import percentile_of
from corun.wire import Status

RECENT_S = 10.0
CHUNK_SLOTS = 2048
MAX_LAG_SLOTS = 20_000
TAIL_BYTES = 1 << 20
_BUSY = ("cpu_user_ns", "cpu_nice_ns", "cpu_system_ns", "cpu_irq_ns", "cpu_softirq_ns")


@dataclass(frozen=True)
class ServiceNow:
    """One service over the last seconds: answers per second, latencies in ms from the intended send time.

    Percentiles are None below their sample floor. in_flight: due and not answered. errors: since the window began.
    """

    name: str
    rate: float
    p50_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    in_flight: int
    errors: int


@dataclass(frozen=True)
class TrainNow:
    """Training over the last seconds."""

    steps_per_s: float
    samples_per_s: float
    loss: float | None


@dataclass(frozen=True)
class MachineNow:
    """Cores in use by role and on the whole host, and (utilisation %, power W) of each GPU; None = not known."""

    roles: Mapping[str, float]
    host_cores: float | None
    gpus: Mapping[str, tuple[float | None, float | None]]


@dataclass(frozen=True)
class Now:
    """A window at one instant."""

    arm: str
    repeat: int
    elapsed_s: float
    left_s: float
    services: tuple[ServiceNow, ...]
    train: TrainNow | None
    machine: MachineNow


class RingTail:
    """The recent slots of one client's ring; a ring that is not there yet has none."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        self._fd: int | None = None
        self._count = self._offset = 0
        self._first = 0
        self._errors_before = 0

    def read(self, start_ns: int, now_ns: int) -> ServiceNow:
        """Slots due in the last RECENT_S, and older ones while they are not answered."""
        slots = self._slots(now_ns)
        recent_ns = max(start_ns, now_ns - round(RECENT_S * NS_PER_S))
        answered = slots["t_rx"] != 0
        ok = slots[answered & (slots["status"] == Status.OK) & (slots["t_rx"] > recent_ns)]
        latency = (ok["t_rx"] - ok["t_intended"]) / NS_PER_MS
        now = ServiceNow(
            name=self._name,
            rate=len(ok) * NS_PER_S / max(now_ns - recent_ns, 1),
            p50_ms=percentile_of(latency, 50),
            p99_ms=percentile_of(latency, 99),
            max_ms=float(latency.max()) if len(ok) else None,
            in_flight=int((~answered).sum()),
            errors=self._errors_before + _errors(slots),
        )
        self._forget(slots, answered, recent_ns)
        return now

    def _slots(self, now_ns: int) -> Records:
        """From the first slot that still matters to the last one that is due."""
        chunks, index = [], self._first
        while self._open() and index < self._count:
            wanted = min(CHUNK_SLOTS, self._count - index) * SLOT_SIZE
            data = os.pread(self._fd or 0, wanted, self._offset + index * SLOT_SIZE)
            chunk = np.frombuffer(data, SLOT_DTYPE, len(data) // SLOT_SIZE)
            due = chunk[(chunk["t_intended"] != 0) & (chunk["t_intended"] <= now_ns)]
            chunks.append(due)
            index += len(due)
            if len(due) < CHUNK_SLOTS:
                break
        return np.concatenate(chunks) if chunks else np.empty(0, SLOT_DTYPE)

    def _open(self) -> bool:
        if self._fd is None:
            try:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
            self._count, self._offset = layout(os.pread(self._fd, HEAD_SIZE, 0))
        return self._count > 0

    def _forget(self, slots: Records, answered: np.ndarray[tuple[int], np.dtype[np.bool_]], recent_ns: int) -> None:
        """Step over what will not change any more and is no longer recent; a long backlog is cut."""
        keep = ~answered | (slots["t_rx"] > recent_ns)
        first = int(np.argmax(keep)) if keep.any() else len(slots)
        first = max(first, len(slots) - MAX_LAG_SLOTS)
        self._errors_before += _errors(slots[:first])
        self._first += first

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _errors(slots: Records) -> int:
    """Answered with something else than OK."""
    return int(
        ((slots["status"] != Status.OK) & (slots["status"] != Status.LOST) & (slots["status"] != UNSENT)).sum()
    )


class FileTail:
    """New whole rows of a CSV file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None
        self._rest = b""
        self._places: dict[str, int] = {}

    def rows(self, columns: Sequence[str]) -> Iterator[list[str]]:
        """The named cells of each new row; an absent column has empty cells."""
        for row in csv.reader(self._lines()):
            if not self._places:
                self._places = {name: place for place, name in enumerate(row)}
                continue
            if len(row) == len(self._places):
                yield [row[self._places[name]] if name in self._places else "" for name in columns]

    def _lines(self) -> list[str]:
        if self._fd is None:
            try:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return []
        text = self._rest
        while data := os.read(self._fd, TAIL_BYTES):
            text += data
        whole, newline, self._rest = text.rpartition(b"\n")
        return whole.decode("utf-8", "replace").split("\n") if newline else []

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class TrainTail:
    """Steps of the last RECENT_S from train.csv."""

    def __init__(self, path: Path) -> None:
        self._file = FileTail(path)
        self._steps: deque[tuple[int, float]] = deque()
        self._loss: float | None = None

    def read(self, start_ns: int, now_ns: int) -> TrainNow:
        for end, samples, loss in self._file.rows(("t_end_ns", "samples", "loss")):
            self._steps.append((int(end), float(samples)))
            self._loss = float(loss) if loss else None
        since = max(start_ns, now_ns - round(RECENT_S * NS_PER_S))
        while self._steps and self._steps[0][0] <= since:
            self._steps.popleft()
        seconds = max(now_ns - since, 1) / NS_PER_S
        samples_per_s = sum(count for _, count in self._steps) / seconds
        return TrainNow(len(self._steps) / seconds, samples_per_s, self._loss)

    def close(self) -> None:
        self._file.close()


class MachineTail:
    """CPU by role and GPU use by the profiler's newest two ticks."""

    def __init__(self, run: Path) -> None:
        self._process, self._profile, self._gpu = (
            FileTail(run / f"{name}.csv") for name in ("process", "profile", "gpu")
        )
        self._last: dict[str, tuple[int, int]] = {}
        self._host: tuple[int, int] | None = None
        self._now = MachineNow({}, None, {})

    def read(self) -> MachineNow:
        """Unchanged until the profiler has written another tick."""
        roles = self._roles()
        if roles:
            self._now = MachineNow(roles, self._host_cores(), self._gpus())
        return self._now

    def _roles(self) -> dict[str, float]:
        cores: dict[str, dict[str, float]] = {}
        for t_ns, pid, role, cpu_ns in self._process.rows(("t_ns", "pid", "role", "cpu_ns")):
            if not cpu_ns:
                continue
            at, used = int(t_ns), int(cpu_ns)
            before_at, before_used = self._last.get(pid, (0, 0))
            if before_at and at > before_at:
                cores.setdefault(role, {})[pid] = (used - before_used) / (at - before_at)
            self._last[pid] = (at, used)
        return {role: sum(pids.values()) for role, pids in cores.items()}

    def _host_cores(self) -> float | None:
        cores = self._now.host_cores
        for t_ns, *cells in self._profile.rows(("t_ns", *_BUSY)):
            if not all(cells):
                continue
            at, used = int(t_ns), sum(map(int, cells))
            if self._host and at > self._host[0]:
                cores = (used - self._host[1]) / (at - self._host[0])
            self._host = (at, used)
        return cores

    def _gpus(self) -> dict[str, tuple[float | None, float | None]]:
        gpus = dict(self._now.gpus)
        for gpu, util, power in self._gpu.rows(("gpu", "util_gpu_pct", "power_mw")):
            gpus[gpu] = (float(util) if util else None, float(power) / 1000 if power else None)
        return gpus

    def close(self) -> None:
        for file in (self._process, self._profile, self._gpu):
            file.close()


__all__ = ["FileTail", "MachineNow", "MachineTail", "Now", "RingTail", "ServiceNow", "TrainNow", "TrainTail"]
