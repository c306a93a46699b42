"""Which waiting request is served next: pure queue policies, the same objects in the server and in simulators.

A policy owns the waiting items and nothing else: no clock, no lock, no limit. Time comes in as `now_ns`, so a
virtual-time simulator drives the very object that the server's queue drives. Other packages add theirs by
`register`; a policy that ranks items reads what it needs from them (a deadline, an expected service time).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from corun.errors import InputError, suggest

T = TypeVar("T")


class QueuePolicy(Protocol[T]):
    """Waiting items in the order of one rule; each item comes out exactly once."""

    def push(self, item: T) -> None:
        """Add one item."""

    def pop(self, now_ns: int) -> T:
        """Remove and return the item to serve at now_ns; IndexError when none waits."""

    def __len__(self) -> int:
        """How many wait."""


class Fifo(Generic[T]):
    """First come, first served."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self.push = self._items.append

    def pop(self, now_ns: int) -> T:
        """The item that waits longest."""
        return self._items.popleft()

    def __len__(self) -> int:
        return len(self._items)


_POLICIES: dict[str, Callable[[], QueuePolicy[Any]]] = {"fifo": Fifo}


def register(name: str, factory: Callable[[], QueuePolicy[Any]]) -> None:
    """Make a policy known by name; registering a name again replaces it."""
    _POLICIES[name] = factory


def policy_names() -> tuple[str, ...]:
    """Every registered name, in the order of registration."""
    return tuple(_POLICIES)


def make_policy(name: str) -> QueuePolicy[Any]:
    """A fresh, empty policy; InputError with a suggestion when the name is unknown."""
    if name not in _POLICIES:
        raise InputError(
            f'unknown queue policy "{name}"{suggest(name, _POLICIES)}', [f"known policies: {', '.join(_POLICIES)}"]
        )
    return _POLICIES[name]()
