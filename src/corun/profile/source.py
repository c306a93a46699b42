"""What the profiler reads from: sources that probe once at the start and then add cells to a row.

A source that does not exist here is not an error: it becomes a `Status` with the reason, which is printed,
written to profiler.json and leaves its columns empty. A reading that fails later is an empty cell and one
more in `read_errors`; the loop goes on, and only the first fault of each kind becomes an event.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from corun.run.records import Column

Cell = int | float | str | None
Row = dict[str, Cell]


class Unavailable(Exception):
    """This source is not there; the message is the reason, in words."""


class ReadFault(Exception):
    """One reading failed for a reason that is neither the kernel's (OSError) nor a bad text (ValueError)."""


READ_ERRORS = (OSError, ValueError, LookupError, ReadFault)


@dataclass(frozen=True)
class Status:
    """What the probe of one source found.

    reason is empty when the source is available. details are facts that do not change (zone types, limits,
    names); absent lists parts that are missing although the source as a whole is there.
    """

    name: str
    reason: str = ""
    details: dict[str, object] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    probe_us: int | None = None

    @property
    def available(self) -> bool:
        return not self.reason

    def line(self) -> str:
        """One line for the console."""
        if not self.available:
            return f"{self.name}: unavailable ({self.reason})"
        missing = f"; without {summarise(self.absent)}" if self.absent else ""
        return f"{self.name}: available{missing}"


class HostSource(Protocol):
    """Adds host cells to the row of one tick.

    columns are those beyond corun.profile.tables.PROFILE, known after construction and then fixed.
    """

    name: str
    columns: tuple[Column, ...]

    def read(self, row: Row) -> None:
        """Add this tick's cells; an error of READ_ERRORS leaves the rest of them empty."""

    def status(self) -> Status:
        """What the probe found."""

    def close(self) -> None:
        """Give the descriptors back."""


class Faults:
    """Counts failed readings; `tell` hears of the first one of each source and message."""

    def __init__(self, tell: Callable[[str, str], None] | None = None) -> None:
        self.total = 0
        self.by_source: Counter[str] = Counter()
        self._tell = tell
        self._told: set[tuple[str, str]] = set()

    def record(self, source: str, error: Exception | str) -> None:
        """Count one failed reading of `source`."""
        self.total += 1
        self.by_source[source] += 1
        text = describe(error)
        if self._tell and (source, text) not in self._told:
            self._told.add((source, text))
            self._tell(source, text)


def describe(error: Exception | str) -> str:
    """An error as a short reason: strerror with the path for OSError, else its text."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def summarise(absent: dict[str, str], shown: int = 3) -> str:
    """The first few names that are missing, and how many more."""
    names = list(absent)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def open_sources(
    openers: Iterable[tuple[str, Callable[[], HostSource]]], now_ns: Callable[[], int]
) -> tuple[list[HostSource], list[Status]]:
    """Construct each source and read it once; those that cannot be read end as a Status with the reason."""
    sources: list[HostSource] = []
    statuses: list[Status] = []
    for name, opener in openers:
        try:
            source = opener()
            began = now_ns()
            source.read({})
            spent_us = (now_ns() - began) // 1000
        except Unavailable as error:
            statuses.append(Status(name, str(error)))
        except READ_ERRORS as error:
            statuses.append(Status(name, describe(error)))
        else:
            sources.append(source)
            found = source.status()
            statuses.append(Status(found.name, found.reason, found.details, found.absent, spent_us))
    return sources, statuses
