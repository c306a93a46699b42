"""What every process of a run does to itself: threads, death with its parent, stop signals, timer slack."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from types import FrameType

PR_SET_PDEATHSIG = 1
PR_SET_TIMERSLACK = 29

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent_pid: int | None = None) -> None:
    """Ask the kernel to SIGKILL this process when its parent dies (prctl(2), PR_SET_PDEATHSIG).

    The parent may have died before the call; `parent_pid` closes that race.
    """
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent_pid is not None and os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def set_timer_slack(slack_ns: int) -> None:
    """Timer slack of this thread in ns; the kernel's default of 50 µs is added to every sleep."""
    _libc.prctl(PR_SET_TIMERSLACK, slack_ns, 0, 0, 0)


def thread_environment(threads: int) -> dict[str, str]:
    """Environment that gives numerical libraries of a child `threads` threads."""
    return dict.fromkeys(THREAD_VARIABLES, str(threads))


def set_threads(threads: int) -> None:
    """Thread counts of this process' numerical libraries; call before importing numpy or torch."""
    os.environ.update(thread_environment(threads))


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def clock_id() -> str:
    """Whose CLOCK_MONOTONIC this process reads: the kernel's boot and the time namespace. Equal = one clock."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
    except OSError:
        return f"{os.uname().nodename}, pid {os.getpid()}"
    try:
        return f"{boot} {os.readlink('/proc/self/ns/time')}"
    except OSError:
        return boot


class StopFlag:
    """A request to stop: a flag and a readable descriptor, set from any thread."""

    def __init__(self) -> None:
        self.requested = False
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        """Readable once a stop was requested."""
        return self._read_fd

    def request(self) -> None:
        """Ask for the stop from inside."""
        if not self.requested:
            self.requested = True
            os.write(self._write_fd, b"x")

    def close(self) -> None:
        """Release the descriptors; nobody may ask any more."""
        os.close(self._read_fd)
        os.close(self._write_fd)


class StopSignal(StopFlag):
    """SIGTERM and the first SIGINT become a flag and a readable descriptor; the second SIGINT kills.

    Main thread only. Usage::

        with StopSignal() as stop:
            while not stop.requested:
                select.select([stop.fileno()], [], [], 1.0)
    """

    def __init__(self) -> None:
        super().__init__()
        self.signal_number: int | None = None
        self._previous: dict[int, signal.Handlers | int | Callable[[int, FrameType | None], object] | None] = {}

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
        self.request()

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.close()
