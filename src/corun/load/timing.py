"""Waiting for an absolute instant as exactly as this machine permits, and saying which way was taken.

The operating system owns the tail of a sender: a thread that asks to be woken at T is woken at T plus timer
slack plus a scheduling delay. The ladder, best rung first (measured p50 / p99 lateness at 1000 requests/s):

    spin-fifo        SCHED_FIFO, timer to T - 200 µs, then poll until T       0.1 /  20 µs   17 % of a core
    spin-exclusive   the same without FIFO, on a core that is ours alone      0.5 /  20 µs   17 %
    timerfd          timerfd with 1 ns slack in the sender's epoll set          1 /  40 µs    2.5 %
    select           relative microsecond timeouts: no timerfd here             3 /  40 µs    2.5 %

The lower two set their timer early by what this machine takes at the least to wake a thread (`lead_ns`, the 10th
percentile of some probes, 25 µs at most). Most wake-ups are past T even so, the others poll for the few µs left:
measured p50 from 27 to 1 µs at no CPU, and beside two busy processes p90 from 22 to 1 µs. That is not the spin of
the upper rungs: 200 µs of it on a shared core use up the thread's share of the scheduler, p90 300 µs, and spinning
all the time under FIFO is throttled by the kernel for 22-50 ms. FIFO preempts what is being measured on a shared
core: only on request.

A client with nothing in flight sleeps in clock_nanosleep(TIMER_ABSTIME) instead: no descriptor to watch then.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from corun.clock import NS_PER_S, now_ns
from corun.errors import InputError
from corun.process import set_timer_slack

PRIORITIES = ("none", "auto", "fifo")
FIFO_PRIORITY = 10
SLACK_NS = 1
SPIN_NS = 200_000
SPIN_SHARE = 0.2
LEAD_MAX_NS = 25_000
LEAD_PROBES = 40
LEAD_GAP_NS = 1_000_000
EXCLUSIVE_PROBE_NS = 20_000_000
EXCLUSIVE_GAP_NS = 50_000

_CLOCK_MONOTONIC = 1
_TIMER_ABSTIME = 1
_TFD_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
_MCL_CURRENT = 1

_libc = ctypes.CDLL(None, use_errno=True)
_Timespec = ctypes.c_long * 2
_Itimerspec = ctypes.c_long * 4


@dataclass(frozen=True)
class Timing:
    """How this process waits; stored with every segment.

    lead_ns: how much earlier the timer is set than wanted, against the time a wake-up takes. spin_ns: the same
    on the spinning rungs, where it is waited for by polling. refused: rung or measure -> why it was not taken.
    """

    rung: str
    policy: str
    slack_ns: int = SLACK_NS
    lead_ns: int = 0
    spin_ns: int = 0
    cores: tuple[int, ...] = ()
    memory_locked: bool = False
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def early_ns(self) -> int:
        """How long before a deadline the timer fires."""
        return max(self.lead_ns, self.spin_ns)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def prepare(
    priority: str = "none", cores: Sequence[int] = (), rate: float = 0.0, sys_root: Path = Path("/sys")
) -> Timing:
    """Apply slack, affinity, memory lock and priority to this process and choose its rung.

    priority: "none" leaves the scheduler alone, "auto" takes SCHED_FIFO if permitted, "fifo" insists on it.
    rate: mean requests/s, bounds the spin. Raises InputError for an unknown priority, a FIFO that is
    refused, or cores this process may not use.
    """
    if priority not in PRIORITIES:
        raise InputError(f'unknown priority "{priority}"; use one of {", ".join(PRIORITIES)}')
    refused: dict[str, str] = {}
    set_timer_slack(SLACK_NS)
    _pin(cores)
    locked = _lock_memory(refused)
    fifo = _take_fifo(priority, refused)
    rung = _choose_rung(fifo, refused, sys_root)
    spins = rung.startswith("spin")
    return Timing(
        rung=rung,
        policy="fifo" if fifo else "other",
        lead_ns=0 if spins else min(wake_lead_ns(), spin_budget_ns(rate)),
        spin_ns=spin_budget_ns(rate) if spins else 0,
        cores=tuple(sorted(os.sched_getaffinity(0))),
        memory_locked=locked,
        refused=refused,
    )


def spin_budget_ns(rate: float) -> int:
    """Longest spin before each send that keeps spinning below SPIN_SHARE of a core at `rate` requests/s."""
    return SPIN_NS if rate <= 0 else min(SPIN_NS, int(SPIN_SHARE * NS_PER_S / rate))


def wake_lead_ns() -> int:
    """What a timed wake-up takes on this machine at the least: 10th percentile of the probes, LEAD_MAX_NS at most."""
    late = []
    for _ in range(LEAD_PROBES):
        deadline = now_ns() + LEAD_GAP_NS
        sleep_until_ns(deadline)
        late.append(now_ns() - deadline)
    return max(0, min(sorted(late)[LEAD_PROBES // 10], LEAD_MAX_NS))


def _choose_rung(fifo: bool, refused: dict[str, str], sys_root: Path) -> str:
    timerfd = _timerfd_works()
    if timerfd:
        if fifo:
            return "spin-fifo"
        reason = why_not_exclusive(sys_root)
        if not reason:
            return "spin-exclusive"
        refused["spin-exclusive"] = reason
        return "timerfd"
    refused["timerfd"] = "the kernel refuses timerfd_create"
    return "select"


def _pin(cores: Sequence[int]) -> None:
    if not cores:
        return
    try:
        os.sched_setaffinity(0, cores)
    except (OSError, OverflowError) as error:
        usable = sorted(os.sched_getaffinity(0))
        raise InputError(f"cannot run on cores {list(cores)}: {error}; this process may use {usable}") from error


def _lock_memory(refused: dict[str, str]) -> bool:
    """mlockall(2) of what is mapped now, so that no page of the sender is paged out."""
    if _libc.mlockall(_MCL_CURRENT) == 0:
        return True
    refused["mlockall"] = os.strerror(ctypes.get_errno())
    return False


def _take_fifo(priority: str, refused: dict[str, str]) -> bool:
    if priority == "none":
        refused["spin-fifo"] = "not asked for (--priority none)"
        return False
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(FIFO_PRIORITY))
    except OSError as error:
        if priority == "fifo":
            raise InputError(
                f"SCHED_FIFO is refused: {error.strerror}; run with CAP_SYS_NICE or raise RLIMIT_RTPRIO, "
                "or use --priority auto"
            ) from error
        refused["spin-fifo"] = f"SCHED_FIFO: {error.strerror}"
        return False
    return True


def why_not_exclusive(sys_root: Path = Path("/sys")) -> str:
    """Why no core is ours alone, or "" when one is: pinned, isolated by the kernel, and measured undisturbed."""
    cores = os.sched_getaffinity(0)
    if len(cores) != 1:
        return f"may run on {len(cores)} cores; an exclusive one is isolated (isolcpus) and given by --cores"
    (core,) = cores
    try:
        isolated = parse_cpu_list((sys_root / "devices/system/cpu/isolated").read_text())
    except (OSError, ValueError):
        isolated = set()
    if core not in isolated:
        return f"core {core} is not isolated from other processes (isolcpus)"
    gap = _longest_gap_ns(EXCLUSIVE_PROBE_NS)
    if gap > EXCLUSIVE_GAP_NS:
        return f"core {core} is isolated but was away for {gap // 1000} µs while probed"
    return ""


def parse_cpu_list(text: str) -> set[int]:
    """The kernel's list format, "0,2-4" -> {0, 2, 3, 4}; ValueError on anything else."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def _longest_gap_ns(duration_ns: int) -> int:
    longest, last = 0, now_ns()
    end = last + duration_ns
    while last < end:
        now = now_ns()
        longest, last = max(longest, now - last), now
    return longest


def sleep_until_ns(deadline_ns: int) -> None:
    """Sleep until CLOCK_MONOTONIC reads deadline_ns, or until a signal was handled (the caller looks again)."""
    if deadline_ns > now_ns():
        at = _Timespec(*divmod(deadline_ns, NS_PER_S))
        _libc.clock_nanosleep(_CLOCK_MONOTONIC, _TIMER_ABSTIME, at, None)


def _timerfd_create() -> int:
    """A timerfd on CLOCK_MONOTONIC (os.timerfd_create is Python 3.13's); OSError where there is none."""
    if hasattr(os, "timerfd_create"):
        return int(os.timerfd_create(time.CLOCK_MONOTONIC, flags=_TFD_FLAGS))
    try:
        fd = int(_libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_FLAGS))
    except AttributeError as error:
        raise OSError(errno.ENOSYS, "no timerfd_create in this C library") from error
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def _timerfd_works() -> bool:
    try:
        os.close(_timerfd_create())
    except OSError:
        return False
    return True


class Waiter(Protocol):
    """One deadline and any number of descriptors, waited for together."""

    def register(self, fd: int, mask: int) -> None: ...

    def modify(self, fd: int, mask: int) -> None: ...

    def unregister(self, fd: int) -> None: ...

    def arm(self, deadline_ns: int) -> None:
        """Wake at this instant, or early by the waiter's `early_ns`; 0: at none."""

    def wait(self) -> list[tuple[int, int]]:
        """Block until the deadline or a descriptor; (fd, mask) of the latter. Early and empty wakes are allowed."""

    def close(self) -> None: ...


class TimerfdWaiter:
    """epoll with a timerfd in it.

    An expired timer stays readable until it is armed anew, so between `T - early_ns` and T every wait returns
    at once: that is the spin, and replies are read during it.
    """

    def __init__(self, early_ns: int = 0) -> None:
        self._epoll = select.epoll()
        self._timer = _timerfd_create()
        self._epoll.register(self._timer, select.EPOLLIN)
        self.register = self._epoll.register
        self.modify = self._epoll.modify
        self.unregister = self._epoll.unregister
        self._poll = self._epoll.poll
        self._settime = _libc.timerfd_settime
        self._settime.argtypes = (ctypes.c_int, ctypes.c_int, _Itimerspec, ctypes.c_void_p)
        self._spec = _Itimerspec()
        self._early_ns = early_ns
        self._armed = 0

    def arm(self, deadline_ns: int) -> None:
        if deadline_ns == self._armed:
            return
        self._armed = deadline_ns
        spec = self._spec
        spec[2], spec[3] = divmod(max(1, deadline_ns - self._early_ns), NS_PER_S) if deadline_ns else (0, 0)
        self._settime(self._timer, _TIMER_ABSTIME, spec, None)

    def wait(self) -> list[tuple[int, int]]:
        timer = self._timer
        return [event for event in self._poll() if event[0] != timer]

    def close(self) -> None:
        self._epoll.close()
        os.close(self._timer)


class SelectWaiter:
    """epoll inside select(2), whose relative timeout has microseconds; epoll's own has milliseconds."""

    def __init__(self, early_ns: int = 0) -> None:
        self._early_ns = early_ns
        self._epoll = select.epoll()
        self.register = self._epoll.register
        self.modify = self._epoll.modify
        self.unregister = self._epoll.unregister
        self._armed = 0

    def arm(self, deadline_ns: int) -> None:
        self._armed = deadline_ns

    def wait(self) -> list[tuple[int, int]]:
        timeout = max(0.0, (self._armed - self._early_ns - now_ns()) / NS_PER_S) if self._armed else None
        select.select([self._epoll], [], [], timeout)
        return self._epoll.poll(0)

    def close(self) -> None:
        self._epoll.close()


def make_waiter(timing: Timing) -> Waiter:
    """The waiter of the rung."""
    return (SelectWaiter if timing.rung == "select" else TimerfdWaiter)(timing.early_ns)
