"""One process' threads: CPU time, run-queue wait and context switches, summed over /proc/PID/task/*.

/proc/PID/schedstat and the switch counts of /proc/PID/status speak of the main thread only, and in a server
the main thread sleeps. So every thread's schedstat is read, and what a thread had counted when it ended is
kept: the sums never go down. A thread that was created and ended between two ticks is not seen here; it is
in cpu_user_ns and cpu_system_ns, which the kernel sums itself.

A thread's `status` costs ten times its `schedstat` (1.7 µs), and its switch counts cannot change without the
number of its time slices: it is read only when that number moved.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from corun.profile.kept import KeptFile

_VOLUNTARY = b"\nvoluntary_ctxt_switches:"
_INVOLUNTARY = b"\nnonvoluntary_ctxt_switches:"


@dataclass
class ThreadTotals:
    """Counters of one thread, or sums over threads."""

    run_ns: int = 0
    wait_ns: int = 0
    voluntary: int = 0
    involuntary: int = 0


class _Thread:
    def __init__(self, directory: Path) -> None:
        self._status_path = directory / "status"
        self._status: KeptFile | None = None
        self._schedstat = KeptFile(directory / "schedstat")
        self._slices = -1
        self.seen = ThreadTotals()

    def update(self) -> None:
        """Read the counters; ProcessLookupError when the thread has ended."""
        fields = self._schedstat.read(128).split()
        if len(fields) < 3:
            raise ProcessLookupError(f"{self._schedstat.path} is empty")
        self.seen.run_ns, self.seen.wait_ns, slices = int(fields[0]), int(fields[1]), int(fields[2])
        if slices != self._slices:
            self._update_switches()
            self._slices = slices

    def _update_switches(self) -> None:
        if self._status is None:
            self._status = KeptFile(self._status_path)
        text = self._status.read()
        self.seen.voluntary = _number_after(text, _VOLUNTARY)
        self.seen.involuntary = _number_after(text, _INVOLUNTARY)

    def close(self) -> None:
        self._schedstat.close()
        if self._status is not None:
            self._status.close()


def _number_after(text: bytes, key: bytes) -> int:
    start = text.index(key) + len(key)
    end = text.find(b"\n", start)
    return int(text[start : end if end >= 0 else None])


class Threads:
    """The threads of one process, found again whenever their number changes or one of them is gone.

    FileNotFoundError from the constructor where the kernel has no schedstat (CONFIG_SCHED_INFO).
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "task"
        os.stat(self._directory / directory.name / "schedstat")
        self._live: dict[int, _Thread] = {}
        self._ended = ThreadTotals()
        self._relist()

    def read(self, count: int) -> ThreadTotals:
        """Sums now; `count` is the number of threads the process says it has."""
        if count != len(self._live):
            self._relist()
        for number in list(self._update_all()):
            self._retire(number)
        return self._sum()

    def _update_all(self) -> Iterator[int]:
        """Update every thread and give back the numbers of those that have ended."""
        for number, thread in self._live.items():
            try:
                thread.update()
            except ProcessLookupError:
                yield number

    def _relist(self) -> None:
        numbers = {int(name) for name in os.listdir(self._directory)}
        for number in numbers - self._live.keys():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                self._live[number] = _Thread(self._directory / str(number))
        for number in self._live.keys() - numbers:
            self._retire(number)

    def _retire(self, number: int) -> None:
        thread = self._live.pop(number)
        _add(self._ended, thread.seen)
        thread.close()

    def _sum(self) -> ThreadTotals:
        total = ThreadTotals()
        _add(total, self._ended)
        for thread in self._live.values():
            _add(total, thread.seen)
        return total

    def close(self) -> None:
        for thread in self._live.values():
            thread.close()
        self._live.clear()


def _add(total: ThreadTotals, more: ThreadTotals) -> None:
    total.run_ns += more.run_ns
    total.wait_ns += more.wait_ns
    total.voluntary += more.voluntary
    total.involuntary += more.involuntary
