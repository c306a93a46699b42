"""When a batch is closed: the dynamic batching rule, pure, shared by the server and by simulators.

The worker picks requests from the queue and holds them until their batch is full or the oldest of them has
been at the server for `max_delay_ns`::

    oldest arrives ──────── max_delay_ns ────────▶ closed at the latest (at once, if the worker was busy longer)
      pick, pick, pick ... max_batch of them ────▶ closed at once

With max_batch = 1 (the default) every request is a batch by itself and nothing is ever held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from corun.errors import InputError

NEVER = -1


class Decision(NamedTuple):
    """What to do now: pick `take` more requests; then close the batch, or look again when a request arrives or
    at `wait_until_ns` (NEVER = only when one arrives)."""

    take: int
    close: bool
    wait_until_ns: int


@dataclass(frozen=True)
class Batcher:
    """At most `max_batch` requests together, none held longer than `max_delay_ns` after its arrival."""

    max_batch: int = 1
    max_delay_ns: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.max_batch < 1:
            problems.append(f"max_batch is {self.max_batch}: give 1 or more")
        if self.max_delay_ns < 0:
            problems.append(f"max_delay_ns is {self.max_delay_ns}: give 0 or more")
        if problems:
            raise InputError("the batcher cannot work like this", problems)

    def decide(self, held: int, waiting: int, oldest_ns: int, now_ns: int) -> Decision:
        """Decide for a batch with `held` requests and a queue with `waiting` more.

        oldest_ns: arrival of the oldest held request; ignored while nothing is held (then nothing can be
        late: ask again after picking).
        """
        take = min(waiting, self.max_batch - held)
        size = held + take
        if size == 0:
            return Decision(0, False, NEVER)
        if size == self.max_batch or self.max_delay_ns == 0:
            return Decision(take, True, NEVER)
        if held == 0:
            return Decision(take, False, now_ns)
        due_ns = oldest_ns + self.max_delay_ns
        return Decision(take, now_ns >= due_ns, due_ns)
