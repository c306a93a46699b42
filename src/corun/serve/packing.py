"""Which waiting items travel together: pure packing rules, the same in the server and in simulators.

An item is one sequence of a request. All sequences of a package are padded to its longest, so a package of n items
costs n * Lmax tokens, however short the others are::

    off     items of one request only, in their order
    count   requests in service order, items in their order, until the package is full
    cost    the first request's items (the anchor), longest first; then others in service order, each only if

                n + 1            <= max_items
                (n + 1) * Lmax'  <= max_padded_tokens
                (n + 1) * Lmax' - n * Lmax - len  <=  theta * len        the padding it adds, per token of its own

An item that `cost` has passed over is held. Once it has been held for `hold_ns` and passed over `passes` times it is
overdue: the oldest overdue item leads the next package, whatever the service order says, so it waits for at most one
package for each item that was held before it. Two bounds, because a package may take milliseconds or seconds: by time
alone a slow model would make every item overdue. It leads instead of being forced in beside the others, because forcing
many at once is what `count` does; those that resemble it leave with it. The time a request waits before it is first
looked at does not count, for the same reason.

The limits of items and tokens hold in every rule. Lengths are padded anew in each package, never by clients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from corun.errors import InputError, suggest


class Item:
    """One sequence of a request: its place in it, its length in tokens, and what happened to it.

    owner: the request. held_ns: when packing first passed it over, or None; passed: how often. tries: packages it has
    been in.
    """

    __slots__ = ("held_ns", "index", "length", "owner", "passed", "tries")

    def __init__(self, owner: Any, index: int, length: int) -> None:
        self.owner = owner
        self.index = index
        self.length = length
        self.held_ns: int | None = None
        self.passed = 0
        self.tries = 0

    def overdue(self, limits: Limits, now_ns: int) -> bool:
        """It has been passed over for too long."""
        return self.held_ns is not None and self.passed >= limits.passes and now_ns - self.held_ns > limits.hold_ns

    def __repr__(self) -> str:
        return f"Item({self.index}, length {self.length})"


@dataclass(frozen=True)
class Limits:
    """What one package may hold; theta, hold_ns and passes: see the module."""

    max_items: int = 64
    max_padded_tokens: int = 4096
    theta: float = 0.25
    hold_ns: int = 1_000_000_000
    passes: int = 8

    def __post_init__(self) -> None:
        problems = [f"{name} is {value}: give 1 or more" for name, value in self._sizes() if value < 1]
        if self.theta < 0:
            problems.append(f"theta is {self.theta}: give 0 or more")
        if self.hold_ns < 0 or self.passes < 0:
            problems.append(f"hold_ns is {self.hold_ns}, passes is {self.passes}: give 0 or more")
        if problems:
            raise InputError("packages cannot be built like this", problems)

    def _sizes(self) -> tuple[tuple[str, int], ...]:
        return (("max_items", self.max_items), ("max_padded_tokens", self.max_padded_tokens))


class Builder:
    """A package while it grows."""

    def __init__(self, limits: Limits, room: int | None = None) -> None:
        self.limits = limits
        self.items: list[Item] = []
        self.longest = 0
        self._max_items = limits.max_items if room is None else min(room, limits.max_items)

    @property
    def full(self) -> bool:
        """No further item can fit, whatever its length."""
        size = len(self.items) + 1
        return size > self._max_items or size * max(1, self.longest) > self.limits.max_padded_tokens

    def fits(self, item: Item) -> bool:
        """The package would stay within its limits."""
        size = len(self.items) + 1
        return size <= self._max_items and size * max(self.longest, item.length) <= self.limits.max_padded_tokens

    def cheap(self, item: Item) -> bool:
        """The padding the item adds is at most theta times its own length."""
        size = len(self.items)
        added = (size + 1) * max(self.longest, item.length) - size * self.longest - item.length
        return added <= self.limits.theta * item.length

    def add(self, item: Item) -> None:
        self.items.append(item)
        self.longest = max(self.longest, item.length)


Rule = Callable[[Sequence[Sequence[Item]], Builder, int], None]


def off(order: Sequence[Sequence[Item]], package: Builder, now_ns: int) -> None:
    """Items of the first request, as many as fit."""
    _append(order[0], package)


def count(order: Sequence[Sequence[Item]], package: Builder, now_ns: int) -> None:
    """Items in service order until one does not fit."""
    for items in order:
        if not _append(items, package):
            return


def _append(items: Sequence[Item], package: Builder) -> bool:
    """Add items in order; False at the first that does not fit."""
    for item in items:
        if not package.fits(item):
            return False
        package.add(item)
    return True


def cost(order: Sequence[Sequence[Item]], package: Builder, now_ns: int) -> None:
    """The oldest overdue item, or else the first request; then what adds little padding."""
    overdue = [item for items in order for item in items if item.overdue(package.limits, now_ns)]
    if overdue:
        package.add(min(overdue, key=lambda item: item.held_ns or 0))
        rest = order
    else:
        for item in _longest_first(order[0]):
            if package.fits(item):
                package.add(item)
        rest = order[1:]
    for items in rest:
        for item in _longest_first(items):
            if package.full:
                return
            if package.items[0] is item or not package.fits(item):
                continue
            if package.cheap(item):
                package.add(item)
            else:
                item.held_ns = now_ns if item.held_ns is None else item.held_ns
                item.passed += 1


def _longest_first(items: Sequence[Item]) -> list[Item]:
    return sorted(items, key=lambda item: -item.length)


RULES: dict[str, Rule] = {"off": off, "count": count, "cost": cost}


def make_rule(name: str) -> Rule:
    """A packing rule by name; InputError with a suggestion when it is unknown."""
    if name not in RULES:
        raise InputError(f'unknown packing "{name}"{suggest(name, RULES)}', [f"known: {', '.join(RULES)}"])
    return RULES[name]


def waste(lengths: Sequence[int]) -> float:
    """Share of padding among the tokens of a package of these lengths, 0..1."""
    padded = len(lengths) * max(lengths, default=0)
    return 1 - sum(lengths) / padded if padded else 0.0


def rest_cost(lengths: Sequence[int], max_items: int) -> tuple[int, int]:
    """(packages, padded tokens) of a request's remaining items if they went alone, in their order."""
    starts = range(0, len(lengths), max_items)
    chunks = [lengths[start : start + max_items] for start in starts]
    return len(chunks), sum(len(chunk) * max(chunk) for chunk in chunks)
