"""The watched processes and their children: one row of raw counters each tick while they live."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from corun.profile.fdinfo import DrmClients
from corun.profile.host import TICK_NS
from corun.profile.kept import KeptFile, under
from corun.profile.source import READ_ERRORS, Cell, Faults, Row
from corun.profile.threads import Threads
from corun.profile.watch import Watched

T = TypeVar("T")

_MIB = 1024 * 1024
_ENDED_STATES = frozenset({b"Z", b"X", b"x"})
SEVERAL = "+"
_NO_CHILDREN_OF = frozenset({"launcher", "profiler"})

_STATE, _PPID, _MAJOR_FAULTS, _UTIME, _STIME, _THREADS, _RSS = 0, 1, 9, 11, 12, 17, 21


class Ended(Exception):
    """The process is gone."""


class ProcessProbe:
    """Kept descriptors of one process; raises Ended from the constructor or from `read` once it is gone."""

    def __init__(self, root: Path, watched: Watched, faults: Faults, drm: bool = False) -> None:
        self.watched = watched
        self._faults = faults
        self._directory = under(root, f"/proc/{watched.pid}")
        try:
            self._stat = KeptFile(self._directory / "stat")
        except (FileNotFoundError, ProcessLookupError) as error:
            raise Ended from error
        children = self._directory / "task" / str(watched.pid) / "children"
        self._children = _optional(lambda: KeptFile(children))
        self._threads = _optional(lambda: Threads(self._directory))
        self._drm = _optional(lambda: DrmClients(self._directory)) if drm else None

    def read(self) -> Row:
        """The cells of this tick without those of the tick itself and of NVML."""
        fields = self._stat.read().rpartition(b")")[2].split()
        if len(fields) <= _RSS or fields[_STATE] in _ENDED_STATES:
            raise Ended
        user, system = int(fields[_UTIME]) * TICK_NS, int(fields[_STIME]) * TICK_NS
        row: Row = {
            "pid": self.watched.pid,
            "ppid": int(fields[_PPID]),
            "role": self.watched.role,
            "name": self.watched.name,
            "cpu_ns": user + system,
            "cpu_user_ns": user,
            "cpu_system_ns": system,
            "threads": int(fields[_THREADS]),
            "rss_mib": round(int(fields[_RSS]) * mmap.PAGESIZE / _MIB, 3),
            "major_faults": int(fields[_MAJOR_FAULTS]),
        }
        self._add("threads", lambda: self._thread_cells(int(fields[_THREADS])), row)
        self._add("fdinfo", self._drm_cells, row)
        return row

    def _add(self, part: str, cells: Callable[[], dict[str, Cell]], row: Row) -> None:
        """Add the cells of one part; its failure is counted, the end of the process is not a failure."""
        try:
            row |= cells()
        except ProcessLookupError as error:
            raise Ended from error
        except READ_ERRORS as error:
            self._faults.record(f"process {part}", error)

    def _thread_cells(self, count: int) -> dict[str, Cell]:
        if self._threads is None:
            return {}
        total = self._threads.read(count)
        return {
            "cpu_ns": total.run_ns,
            "runq_wait_ns": total.wait_ns,
            "ctx_voluntary": total.voluntary,
            "ctx_involuntary": total.involuntary,
        }

    def _drm_cells(self) -> dict[str, Cell]:
        use = self._drm.read() if self._drm else None
        if use is None:
            return {}
        return {"gpu_busy_ns": use.busy_ns, "gpu_mem_mib": use.memory_mib, "gpu_attr": "fdinfo"}

    def child_pids(self) -> list[int]:
        """Processes its main thread started and that still live; any thread's, where several roles are one process."""
        if self._children is None or self.watched.role in _NO_CHILDREN_OF:
            return []
        if SEVERAL in self.watched.role:
            return self._children_of_all_threads()
        with contextlib.suppress(*READ_ERRORS):
            return [int(pid) for pid in self._children.read().split()]
        return []

    def _children_of_all_threads(self) -> list[int]:
        found: list[int] = []
        for children in (self._directory / "task").glob("*/children"):
            with contextlib.suppress(*READ_ERRORS):
                found += [int(pid) for pid in children.read_bytes().split()]
        return found

    def close(self) -> None:
        for part in (self._stat, self._children, self._threads, self._drm):
            if part is not None:
                part.close()


def _optional(open_part: Callable[[], T]) -> T | None:
    """A part of a process that this kernel or this user may not be able to read."""
    try:
        return open_part()
    except READ_ERRORS:
        return None


class ProcessTable:
    """All watched processes. `tell` hears of starts and ends: (kind, role, name, detail)."""

    def __init__(
        self, root: Path, faults: Faults, tell: Callable[[str, str, str, str], None], drm: bool = False
    ) -> None:
        self._root = root
        self._faults = faults
        self._tell = tell
        self._drm = drm
        self._probes: dict[int, ProcessProbe] = {}

    def __len__(self) -> int:
        return len(self._probes)

    def exists(self, pid: int) -> bool:
        """Whether this process number is one of this machine's now."""
        return under(self._root, f"/proc/{pid}").exists()

    def watch(self, watched: Iterable[Watched]) -> None:
        """Follow these from now on; a process already followed takes its new role and name."""
        for one in watched:
            known = self._probes.get(one.pid)
            if known:
                known.watched = one
            else:
                self._open(one)

    def _open(self, watched: Watched) -> None:
        try:
            self._probes[watched.pid] = self._probe(watched)
        except Ended:
            self._tell("process_exit", watched.role, watched.name, f"pid {watched.pid} was gone before it was read")
        except READ_ERRORS as error:
            self._faults.record(f"process {watched.pid}", error)
        else:
            self._tell("process_start", watched.role, watched.name, f"pid {watched.pid}")

    def _probe(self, watched: Watched) -> ProcessProbe:
        return ProcessProbe(self._root, watched, self._faults, self._drm)

    def read(self) -> list[Row]:
        """One row per living process; those that ended are told and dropped, new children are followed."""
        rows = []
        for probe in list(self._probes.values()):
            try:
                rows.append(probe.read())
            except (Ended, ProcessLookupError):
                self._drop(probe.watched)
            except READ_ERRORS as error:
                self._faults.record(f"process {probe.watched.pid}", error)
        self._adopt_children()
        return rows

    def _drop(self, watched: Watched) -> None:
        self._probes.pop(watched.pid).close()
        self._tell("process_exit", watched.role, watched.name, f"pid {watched.pid}")

    def _adopt_children(self) -> None:
        for parent in list(self._probes.values()):
            for pid in parent.child_pids():
                if pid not in self._probes:
                    self._adopt(Watched(pid, parent.watched.role, parent.watched.name))

    def _adopt(self, watched: Watched) -> None:
        """Follow a child, unless it has ended already and only waits to be reaped."""
        with contextlib.suppress(Ended, *READ_ERRORS):
            child = self._probe(watched)
            try:
                child.read()
            except (Ended, *READ_ERRORS):
                child.close()
                raise
            self._probes[watched.pid] = child
            self._tell("process_start", watched.role, watched.name, f"pid {watched.pid}, a child")

    def close(self) -> None:
        for probe in self._probes.values():
            probe.close()
        self._probes.clear()
