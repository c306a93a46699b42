"""A schedule: every due instant of a segment, decided before it starts.

One seed decides everything. Each stream owns a branch of the seed tree, so what one stream draws never depends on
which other streams exist, on how many processes send, or on the order in which they start:

    SeedSequence(seed) ── repeat r ── stream k ──┬── arrivals
                                                 └── payloads

The arm of an experiment is not in the tree: `alone` and `corun` of one repeat face the very same arrivals, which
makes their comparison a paired one. Instants are int64 ns from the segment's start; the schedule is hashed, stored
as .npy and replayed bit for bit. Processes that share a stream get parts of one schedule; no process ever draws its
own (a generator per process with a common seed sends in step and inflates p99 up to ninefold).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from corun.arrivals.processes import MAX_ARRIVALS, Process
from corun.errors import InputError

__all__ = [
    "ROW",
    "UNPLANNED_NS",
    "Schedule",
    "Stream",
    "join",
    "load",
    "make",
    "merge",
    "save",
]

ROW: Final = np.dtype([("intended_ns", "<i8"), ("stream", "<u4"), ("id", "<u8"), ("payload", "<u4")])
"""One request: due instant (ns from the segment's start), stream, id within the stream, payload index."""

UNPLANNED_NS: Final = -1
"""`intended_ns` of a request without a due instant: one row per loop of a closed-loop stream."""

MAX_DURATION_S: Final = 366 * 86_400

Rows = NDArray[Any]

_MAGIC: Final = b"\x93NUMPY\x01\x00"
_HEADER: Final = re.compile(
    rb"\{'descr': %s, 'fortran_order': False, 'shape': \((\d{1,15}),\), \} *\n" % re.escape(repr(ROW.descr).encode())
)


@dataclass(frozen=True)
class Stream:
    """One load stream: its number (stable, names its branch of the seed tree), process, and number of payloads."""

    number: int
    process: Process
    payloads: int = 1

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.number < 2**32:
            problems.append(f"number must be in 0..2^32-1, not {self.number}")
        if not 1 <= self.payloads <= 2**32:
            problems.append(f"payloads must be in 1..2^32, not {self.payloads}")
        if problems:
            raise InputError(f"stream {self.number} is not a load stream", problems)


@dataclass(frozen=True, eq=False)
class Schedule:
    """Rows of `ROW`, read only. Equal schedules have equal rows, hence equal hashes."""

    rows: Rows

    def __post_init__(self) -> None:
        rows = np.ascontiguousarray(self.rows, dtype=ROW)
        rows = rows.view()
        rows.setflags(write=False)
        object.__setattr__(self, "rows", rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.rows.tobytes() == other.rows.tobytes()

    def __hash__(self) -> int:
        return hash(self.sha256)

    @property
    def sha256(self) -> str:
        """SHA-256 over the rows' bytes (24 a row, little endian), independent of the file that holds them."""
        return hashlib.sha256(self.rows.tobytes()).hexdigest()

    @property
    def intended_ns(self) -> NDArray[np.int64]:
        """Due instants, ns from the segment's start (n,)."""
        return np.asarray(self.rows["intended_ns"], dtype=np.int64)

    @property
    def streams(self) -> tuple[int, ...]:
        """Numbers of the streams that have at least one row, ascending."""
        return tuple(int(number) for number in np.unique(self.rows["stream"]))

    @property
    def is_open_loop(self) -> bool:
        """Whether every request has a due instant."""
        return not (self.rows["intended_ns"] == UNPLANNED_NS).any()

    def of_stream(self, number: int) -> Schedule:
        """The rows of one stream, in their order; empty when it has none."""
        return Schedule(self.rows[self.rows["stream"] == number])

    def split(self) -> dict[int, Schedule]:
        """One schedule per stream; `merge` undoes it."""
        return {number: self.of_stream(number) for number in self.streams}

    def deal(self, parts: int) -> list[Schedule]:
        """Rows dealt in turn to `parts` senders: equal work, but each part alone is more even than the whole."""
        _at_least_one(parts)
        return [Schedule(self.rows[part::parts]) for part in range(parts)]

    def thin(self, parts: int, seed: int) -> list[Schedule]:
        """Rows given at random to `parts` senders: each part of a Poisson schedule is Poisson again."""
        _at_least_one(parts)
        owner = np.random.default_rng(np.random.SeedSequence(seed)).integers(parts, size=len(self))
        return [Schedule(self.rows[owner == part]) for part in range(parts)]


def make(streams: Sequence[Stream], duration_s: float, seed: int, repeat: int = 0) -> Schedule:
    """The schedule of one segment of `duration_s` seconds, ordered by due instant.

    Every arm of one repeat gets the same schedule; every repeat and every stream draws independently. Deterministic
    processes (constant, trace, replay) are alike in all repeats.

    Raises:
        InputError: a bad duration, seed or repeat, a stream number used twice, or more than `MAX_ARRIVALS`.
    """
    _check_make(streams, duration_s, seed, repeat)
    parts = [
        _draw(stream, duration_s, np.random.SeedSequence(seed, spawn_key=(repeat, stream.number)))
        for stream in streams
    ]
    return merge(parts)


def merge(parts: Sequence[Schedule]) -> Schedule:
    """Parts of one segment as one schedule, ordered by due instant, then stream, then id.

    Raises:
        InputError: a request (stream, id) occurs in two parts.
    """
    rows = np.concatenate([part.rows for part in parts]) if parts else np.empty(0, dtype=ROW)
    by_id = rows[np.lexsort((rows["id"], rows["stream"]))]
    twice = (by_id["stream"][1:] == by_id["stream"][:-1]) & (by_id["id"][1:] == by_id["id"][:-1])
    if twice.any():
        row = by_id[1:][twice][0]
        raise InputError(
            f"request {row['id']} of stream {row['stream']} occurs twice; these are not parts of one schedule"
        )
    return Schedule(rows[np.lexsort((rows["id"], rows["stream"], rows["intended_ns"]))])


def join(segments: Sequence[Schedule]) -> tuple[Schedule, tuple[dict[int, range], ...]]:
    """Segments one after another in one schedule, with ids that go on counting per stream.

    Due instants stay relative to their own segment. Returns the schedule and, for each segment, the ids it gave to
    each stream: `range(first, last)`, which are also the positions in `schedule.of_stream(number)`.
    """
    given: dict[int, int] = {}
    renumbered: list[Rows] = []
    ranges: list[dict[int, range]] = []
    for segment in segments:
        rows = segment.rows.copy()
        here: dict[int, range] = {}
        for number in segment.streams:
            mine = rows["stream"] == number
            first = given.get(number, 0)
            here[number] = range(first, first + int(mine.sum()))
            rows["id"][mine] = np.arange(here[number].start, here[number].stop, dtype=np.uint64)
            given[number] = here[number].stop
        renumbered.append(rows)
        ranges.append(here)
    rows = np.concatenate(renumbered) if renumbered else np.empty(0, dtype=ROW)
    return Schedule(rows), tuple(ranges)


def save(schedule: Schedule, path: Path) -> None:
    """Write the rows as .npy (version 1.0, no pickle), in one step: a reader sees all of it or nothing."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            np.lib.format.write_array(file, schedule.rows, version=(1, 0), allow_pickle=False)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise InputError(f"{path}: the schedule cannot be written ({error.strerror})") from error


def load(path: Path) -> Schedule:
    """Read what `save` wrote.

    Raises:
        InputError: the file is missing, unreadable, cut short, or not a schedule; nothing in it is ever executed.
    """
    try:
        with path.open("rb") as file:
            count = _read_header(file, path)
            size = path.stat().st_size - file.tell()
            due = count * ROW.itemsize
            if size != due:
                raise InputError(f"{path}: cut short or overwritten: {size} bytes of rows, {due} promised")
            return _checked(Schedule(np.fromfile(file, dtype=ROW, count=count)), path)
    except OSError as error:
        raise InputError(f"{path}: the schedule cannot be read ({error.strerror})") from error


def _check_make(streams: Sequence[Stream], duration_s: float, seed: int, repeat: int) -> None:
    problems = []
    lasts = 0 < duration_s <= MAX_DURATION_S
    if not lasts:
        problems.append(f"a segment lasts more than 0 s and at most a year, not {duration_s!r} s")
    if seed < 0:
        problems.append(f"the seed must be at least 0, not {seed}")
    if not 0 <= repeat < 2**32:
        problems.append(f"the repeat must be in 0..2^32-1, not {repeat}")
    numbers = [stream.number for stream in streams]
    problems += [
        f"stream number {number} is used {numbers.count(number)} times"
        for number in sorted({n for n in numbers if numbers.count(n) > 1})
    ]
    for stream in streams:
        expected = (stream.process.rate or 0) * duration_s
        if lasts and expected > MAX_ARRIVALS:
            problems.append(
                f"stream {stream.number}: about {expected:.3g} arrivals, more than {MAX_ARRIVALS:,};"
                " lower the rate or the duration"
            )
    if problems:
        raise InputError("no schedule can be made", problems)


def _draw(stream: Stream, duration_s: float, seed: np.random.SeedSequence) -> Schedule:
    """One stream's rows, ids in order of their due instants."""
    arrivals, payloads = (np.random.default_rng(child) for child in seed.spawn(2))
    stamps_s = stream.process.draw(arrivals, duration_s)
    planned = ~np.isnan(stamps_s)
    latest_ns = max(math.ceil(duration_s * 1e9) - 1, 0)
    rows = np.zeros(stamps_s.size, dtype=ROW)
    rows["intended_ns"] = UNPLANNED_NS
    rows["intended_ns"][planned] = np.minimum(np.rint(stamps_s[planned] * 1e9).astype(np.int64), latest_ns)
    rows["stream"] = stream.number
    rows["id"] = np.arange(stamps_s.size, dtype=np.uint64)
    rows["payload"] = payloads.integers(stream.payloads, size=stamps_s.size, dtype=np.uint64)
    return Schedule(rows)


def _read_header(file: BinaryIO, path: Path) -> int:
    """The number of rows that the .npy header promises; matched as text, since a parser would evaluate it."""
    magic, size = file.read(8), int.from_bytes(file.read(2), "little")
    match = _HEADER.fullmatch(file.read(size))
    if magic != _MAGIC or match is None:
        raise InputError(f"{path}: not a schedule; give the schedule.npy of a run")
    return int(match[1])


def _checked(schedule: Schedule, path: Path) -> Schedule:
    if (schedule.rows["intended_ns"] < UNPLANNED_NS).any():
        row = int(np.argmax(schedule.rows["intended_ns"] < UNPLANNED_NS))
        raise InputError(f"{path}: row {row} is due before the segment starts; the file is damaged")
    return schedule


def _at_least_one(parts: int) -> None:
    if parts < 1:
        raise InputError(f"a schedule can be shared by 1 or more senders, not by {parts}")
