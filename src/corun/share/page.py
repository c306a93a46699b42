"""The shared page: what services tell the trainer and what the policy tells it, without a system call.

    word   0  magic        3 micro          6 bell (futex word)     9 last windowed p99, ns
           1  mode         4 threads        7 trainer sleeps
           2  duty         5 trainer beat   8 windows judged
    byte 128  pending[slot]   requests read from a socket and not answered yet
         640  beat[slot]      CLOCK_MONOTONIC ns, renewed five times a second while the service lives
        1152  arrived[slot]   requests ever
        1664  recorded[slot]  latencies ever written to the ring
        2176  pid[slot]
    byte 4096 rings[slot]     the last 1,024 latencies of each service, ns

Every word has one writing process, so nothing is locked between processes: a service owns its slot, the trainer
its own words, and whoever runs the policy the knobs (the bell may be rung by all: it only has to change). Words are aligned 8-byte stores, hence never torn. The
question the trainer asks before every micro-step, "is anything pending?", is one comparison of 512 bytes. A
service that died with requests pending stops renewing its beat, and its slot no longer counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from corun.clock import NS_PER_MS
from corun.errors import InputError
from corun.share import futex

SLOTS = 64
RING = 1024
BEAT_PERIOD_NS = 200 * NS_PER_MS
STALE_AFTER_NS = 800 * NS_PER_MS

_MAGIC = 0x31_50_4E_55_52_4F_43  # "CORUNP1"
_WORD = 8
_MODE, _DUTY, _MICRO, _THREADS, _TRAINER_BEAT, _BELL, _SLEEPS, _WINDOWS, _P99 = range(1, 10)
_PENDING = 128 // _WORD
_BEAT = _PENDING + SLOTS
_ARRIVED = _BEAT + SLOTS
_RECORDED = _ARRIVED + SLOTS
_PID = _RECORDED + SLOTS
_RINGS = 4096 // _WORD
SIZE = 4096 + SLOTS * RING * _WORD

_PENDING_BYTES = slice(_PENDING * _WORD, (_PENDING + SLOTS) * _WORD)
_NOTHING = bytes(SLOTS * _WORD)

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Knobs:
    """What the policy asks of the trainer.

    micro: micro-batches a step is cut into. duty: share of the time the trainer works, 0 < duty <= 1.
    threads: intra-op threads, 0 = as it was started.
    """

    micro: int = 1
    duty: float = 1.0
    threads: int = 0

    def __post_init__(self) -> None:
        if self.micro < 1 or not 0 < self.duty <= 1 or self.threads < 0:
            raise InputError(
                f"impossible knobs {self}", ["micro >= 1", "0 < duty <= 1", "threads >= 0 (0 = as started)"]
            )


class Page:
    """One mapped page; `create` makes the file and `close` of that object removes it, `open` joins it.

    Usage::

        with Page.create() as page:
            start_server("--announce", f"{page.path}:0")
            start_trainer("--gate-options", json.dumps({"page": str(page.path)}))
    """

    def __init__(self, path: Path, map_: mmap.mmap, owner: bool) -> None:
        self.path = path
        self._owner = owner
        self._map = map_
        self._words = memoryview(map_).cast("q")
        self._reals = memoryview(map_).cast("d")
        self._bell = ctypes.c_uint32.from_buffer(map_, _BELL * _WORD)

    @classmethod
    def create(cls, directory: Path | None = None) -> Page:
        """A fresh page under /dev/shm, or the temporary directory where there is none; knobs at rest."""
        home = directory or (SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir()))
        path = home / f"corun-{os.getpid()}-{secrets.token_hex(4)}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, SIZE)
            page = cls(path, mmap.mmap(fd, SIZE), owner=True)
        finally:
            os.close(fd)
        page.set_knobs(Knobs())
        page._words[0] = _MAGIC
        return page

    @classmethod
    def open(cls, path: Path | str) -> Page:
        """Join an existing page; InputError when the file is missing or no page of this version."""
        path = Path(path)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(
                f"cannot open the shared page {path}: {error.strerror}; is its launcher gone?"
            ) from error
        try:
            if os.fstat(fd).st_size != SIZE:
                raise InputError(f"{path} is not a shared page of this version")
            page = cls(path, mmap.mmap(fd, SIZE), owner=False)
        finally:
            os.close(fd)
        if page._words[0] != _MAGIC:
            page.close()
            raise InputError(f"{path} is not a shared page of this version")
        return page

    def close(self) -> None:
        """Unmap; its creator also removes the file. A second call does nothing."""
        if self._map.closed:
            return
        del self._bell
        self._words.release()
        self._reals.release()
        self._map.close()
        if self._owner:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Knobs: written by whoever runs the policy, read by the trainer

    @property
    def knobs(self) -> Knobs:
        return Knobs(int(self._words[_MICRO]), float(self._reals[_DUTY]), int(self._words[_THREADS]))

    def set_knobs(self, knobs: Knobs) -> None:
        """Takes effect at the trainer's next step (micro) or next stop (threads, duty)."""
        self._words[_MICRO] = knobs.micro
        self._reals[_DUTY] = knobs.duty
        self._words[_THREADS] = knobs.threads

    @property
    def duty(self) -> float:
        return float(self._reals[_DUTY])

    @property
    def mode(self) -> int:
        """Which rules the gate follows, as bits of `gates.Mode`."""
        return int(self._words[_MODE])

    @mode.setter
    def mode(self, mode: int) -> None:
        self._words[_MODE] = mode
        self.ring_bell()

    # A service's slot

    def claim(self, slot: int, pid: int, now: int) -> None:
        """Start a slot afresh for a service, whatever a predecessor left there."""
        if not 0 <= slot < SLOTS:
            raise InputError(f"slot {slot} does not exist: a page has slots 0 to {SLOTS - 1}, one a service")
        self._words[_PENDING + slot] = 0
        self._words[_PID + slot] = pid
        self._words[_BEAT + slot] = now

    def set_pending(self, slot: int, pending: int) -> None:
        self._words[_PENDING + slot] = pending

    def beat(self, slot: int, now: int) -> None:
        self._words[_BEAT + slot] = now

    def count_arrival(self, slot: int) -> None:
        self._words[_ARRIVED + slot] += 1

    def record(self, slot: int, latency_ns: int) -> None:
        """Append to the slot's ring; the count is raised last, so a reader never sees an unwritten entry."""
        written = self._words[_RECORDED + slot]
        self._words[_RINGS + slot * RING + written % RING] = latency_ns
        self._words[_RECORDED + slot] = written + 1

    # What the trainer asks

    @property
    def busy(self) -> bool:
        """A request is pending somewhere, dead services included: the question of the fast path."""
        return self._map[_PENDING_BYTES] != _NOTHING

    def waiting_slots(self, now: int, stale_ns: int = STALE_AFTER_NS) -> list[int]:
        """Slots with a pending request whose service is alive."""
        return [
            slot
            for slot, pending in enumerate(self._words[_PENDING : _PENDING + SLOTS])
            if pending > 0 and now - self._words[_BEAT + slot] <= stale_ns
        ]

    def stale_slots(self, now: int, stale_ns: int = STALE_AFTER_NS) -> list[int]:
        """Slots that say pending and whose service has stopped renewing its beat."""
        return [
            slot
            for slot, pending in enumerate(self._words[_PENDING : _PENDING + SLOTS])
            if pending > 0 and now - self._words[_BEAT + slot] > stale_ns
        ]

    def pending(self, slot: int) -> int:
        return int(self._words[_PENDING + slot])

    @property
    def arrivals(self) -> int:
        """Requests that ever arrived, all services together."""
        return sum(self._words[_ARRIVED : _ARRIVED + SLOTS])

    def latencies_since(self, cursors: Sequence[int]) -> tuple[list[int], list[int]]:
        """Latencies (ns) recorded after `cursors` (one a slot, as returned before), and the new cursors.

        A slot that recorded more than its ring holds gives its last 1,024.
        """
        words, found, now_at = self._words, [], list(self._words[_RECORDED : _RECORDED + SLOTS])
        for slot, (begin, end) in enumerate(zip(cursors, now_at, strict=True)):
            ring = _RINGS + slot * RING
            found += [words[ring + index % RING] for index in range(max(begin, end - RING), end)]
        return found, now_at

    def cursors(self) -> list[int]:
        """Where every ring stands now."""
        return list(self._words[_RECORDED : _RECORDED + SLOTS])

    # What the trainer says

    def trainer_beat(self, now: int) -> None:
        self._words[_TRAINER_BEAT] = now

    @property
    def last_trainer_beat(self) -> int:
        return int(self._words[_TRAINER_BEAT])

    def judged(self, p99_ns: int) -> None:
        """A window ended with this p99 (0 = no reply in it)."""
        self._words[_P99] = p99_ns
        self._words[_WINDOWS] += 1

    @property
    def last_p99_ns(self) -> int:
        return int(self._words[_P99])

    # Sleeping and waking

    @contextlib.contextmanager
    def asleep(self) -> Iterator[int]:
        """Announce a sleep and give the bell to wait for; look again inside before sleeping."""
        self._words[_SLEEPS] = 1
        try:
            yield self._bell.value
        finally:
            self._words[_SLEEPS] = 0

    def sleep(self, bell: int, timeout_ns: int) -> None:
        """Sleep until the bell is rung or `timeout_ns` have passed."""
        futex.wait(self._bell, bell, timeout_ns)

    @property
    def somebody_sleeps(self) -> bool:
        """Whether a trainer stands inside `asleep`."""
        return bool(self._words[_SLEEPS])

    def rung(self, bell: int) -> bool:
        """Whether the bell was rung since `asleep` gave it."""
        return bool(self._bell.value != bell)

    def ring_bell(self) -> None:
        """Wake the trainer if it sleeps; a memory read if it does not."""
        if self._words[_SLEEPS]:
            self._bell.value = (self._bell.value + 1) & 0xFFFF_FFFF
            futex.wake(self._bell)
