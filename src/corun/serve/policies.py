"""Which waiting request is served next: pure queue policies, the same objects in the server and in simulators.

A policy owns the waiting items and nothing else: no clock, no lock, no limit. Time comes in as `now_ns`, so a
virtual-time simulator drives the very object that the server's queue drives. Other packages add theirs by
`register`.

    fifo         longest wait first
    sjf          smallest S first; a large item can wait for ever
    edf          earliest deadline first
    hrrn         largest 1 + W / S first, at each pick anew; every item's ratio grows, so none waits for ever
    hrrn-stale   hrrn with W as it was when the last item arrived: a published scheduler sorted only then

W is the time waited, S the expected service time. A policy that ranks reads both from a `Ranking` that its `view`
makes of each item when it is added. Ties go to the earlier arrival, then to the item added first.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

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


class Ranking(NamedTuple):
    """What a policy may know of an item. service: expected, in any unit common to all items (only ratios count)."""

    arrival_ns: int
    service: float
    deadline_ns: int


def request_ranking(item: Any) -> Ranking:
    """A server's request: its service time taken proportional to its bytes, and the deadline it brought.

    Without deadlines all requests of a service share one latency bound, so the earliest is that of the earliest
    intended send time (on the client's clock, which is the server's on one host), or else of the earliest arrival.
    """
    header, arrival_ns = item.header, item.stamps[1]
    deadline_ns = getattr(item, "deadline_ns", 0) or header.t_intended or arrival_ns
    return Ranking(arrival_ns, max(1, header.payload_len), deadline_ns)


View = Callable[[Any], Ranking]


class _Smallest(Generic[T]):
    """A heap of items by a key that never changes."""

    def __init__(self, view: View = request_ranking) -> None:
        self._view = view
        self._heap: list[tuple[float, int, int, T]] = []
        self._added = 0

    def _key(self, ranking: Ranking) -> float:
        raise NotImplementedError

    def push(self, item: T) -> None:
        """Add one item."""
        ranking = self._view(item)
        heapq.heappush(self._heap, (self._key(ranking), ranking.arrival_ns, self._added, item))
        self._added += 1

    def pop(self, now_ns: int) -> T:
        """The item of the smallest key."""
        return heapq.heappop(self._heap)[3]

    def __len__(self) -> int:
        return len(self._heap)


class Sjf(_Smallest[T]):
    """Shortest job first."""

    def _key(self, ranking: Ranking) -> float:
        return ranking.service


class Edf(_Smallest[T]):
    """Earliest deadline first; late items keep their place."""

    def _key(self, ranking: Ranking) -> float:
        return ranking.deadline_ns


class Hrrn(Generic[T]):
    """Highest response ratio next, 1 + W / S, non-preemptive; a pick looks at every waiting item."""

    def __init__(self, view: View = request_ranking) -> None:
        self._view = view
        self._items: dict[int, tuple[int, float, T]] = {}
        self._added = 0

    def push(self, item: T) -> None:
        """Add one item."""
        ranking = self._view(item)
        self._items[self._added] = (ranking.arrival_ns, ranking.service, item)
        self._added += 1

    def pop(self, now_ns: int) -> T:
        """The item of the largest ratio at now_ns."""
        if not self._items:
            raise IndexError("no item waits")
        at_ns = self._ranked_at_ns(now_ns)
        best, best_ratio, best_arrival = -1, -1.0, 0
        for number, (arrival_ns, service, _) in self._items.items():
            ratio = max(0, at_ns - arrival_ns) / service
            if ratio > best_ratio or (ratio == best_ratio and arrival_ns < best_arrival):
                best, best_ratio, best_arrival = number, ratio, arrival_ns
        return self._items.pop(best)[2]

    def drain(self, now_ns: int) -> list[T]:
        """What `pop` at now_ns would give until nothing is left, in n log n."""
        at_ns = self._ranked_at_ns(now_ns)
        order = sorted(
            self._items.items(), key=lambda one: (-max(0, at_ns - one[1][0]) / one[1][1], one[1][0], one[0])
        )
        self._items.clear()
        return [item for _, (_, _, item) in order]

    def _ranked_at_ns(self, now_ns: int) -> int:
        return now_ns

    def __len__(self) -> int:
        return len(self._items)


class HrrnStale(Hrrn[T]):
    """HRRN that ranks only when an item arrives, to compare with: waits after the latest arrival do not count."""

    def __init__(self, view: View = request_ranking) -> None:
        super().__init__(view)
        self._latest_ns = 0

    def push(self, item: T) -> None:
        """Add one item and rank anew."""
        super().push(item)
        self._latest_ns = max(self._latest_ns, self._items[self._added - 1][0])

    def _ranked_at_ns(self, now_ns: int) -> int:
        return min(now_ns, self._latest_ns)


def drain(policy: QueuePolicy[T], now_ns: int) -> list[T]:
    """Remove everything that waits, in the order of service at now_ns."""
    if isinstance(policy, Hrrn):
        return policy.drain(now_ns)
    return [policy.pop(now_ns) for _ in range(len(policy))]


_POLICIES: dict[str, Callable[[], QueuePolicy[Any]]] = {
    "fifo": Fifo,
    "sjf": Sjf,
    "edf": Edf,
    "hrrn": Hrrn,
    "hrrn-stale": HrrnStale,
}


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
