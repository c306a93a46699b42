"""Requests that come back labelled: what a service was asked lately, with the right answers, for its trainer.

    request arrives ── label_delay_s ──▶ its class is known ──▶ three of four to learn from, one to validate on

No file and no socket carries them. The schedule of a run says when each request arrives and which payload it is, the
data set says what that payload is and its class, and both are exact in every process; so at any instant the trainer
knows which labels exist by then and reads no other. The labeller is simulated, the delay and the order are real.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from corun.arrivals import schedule as schedules
from corun.clock import NS_PER_S, now_ns
from corun.errors import InputError
from corun.train.loader import Batches
from corun.train.options import PublishOptions

HELD_OUT_EVERY = 4


class Arrivals:
    """The labelled arrivals of one stream; `begin` says when its schedule began.

    due_ns: arrival times from the start, ascending (n,). payload_of: index of each in `items` (n,).
    items: (picture, class) of every payload. Payloads whose index is 3, 7, 11 ... are held out.
    """

    def __init__(
        self, due_ns: NDArray[np.int64], payload_of: Sequence[int], items: Any, label_delay_s: float
    ) -> None:
        self.items = items
        self._due_ns = due_ns
        self._payloads = [int(payload) % len(items) for payload in payload_of]
        self._delay_ns = round(label_delay_s * NS_PER_S)
        self._start_ns: int | None = None

    @classmethod
    def read(cls, options: PublishOptions, items: Any) -> Arrivals:
        """From a schedule file; InputError when it has no request of the stream with a due instant."""
        rows = schedules.load(Path(options.arrivals)).of_stream(options.stream)
        if not len(rows) or not rows.is_open_loop:
            raise InputError(
                f"{options.arrivals} has no requests of stream {options.stream} with instants to be labelled"
            )
        return cls(rows.intended_ns, rows.rows["payload"].tolist(), items, options.label_delay_s)

    def begin(self, start_ns: int) -> None:
        """The schedule's instants count from here (CLOCK_MONOTONIC ns)."""
        self._start_ns = start_ns

    def labelled(self, now: int) -> int:
        """How many arrivals have their label at `now`."""
        if self._start_ns is None:
            return 0
        return int(np.searchsorted(self._due_ns, now - self._start_ns - self._delay_ns, side="right"))

    def newest(self, count: int, held_out: bool, now: int) -> list[int]:
        """Payloads of the `count` newest labelled arrivals of one kind, the newest first; fewer when there are fewer."""
        found: list[int] = []
        for payload in self._backwards(now):
            if len(found) == count:
                break
            if is_held_out(payload) == held_out:
                found.append(payload)
        return found

    def _backwards(self, now: int) -> Iterator[int]:
        for position in range(self.labelled(now) - 1, -1, -1):
            yield self._payloads[position]


def is_held_out(payload: int) -> bool:
    """Whether a payload validates and is never learnt from, however often it is sent."""
    return payload % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


class ArrivalBatches(Batches):
    """Batches of which `fresh_share` are drawn from the newest labelled arrivals, the rest from the training set.

    Until a batch's worth of arrivals has its labels all of it comes from the training set. What is drawn depends on
    when it is drawn, so a job that learns from arrivals is not repeated bit by bit.
    """

    def __init__(self, data: Any, arrivals: Arrivals, batch_size: int, seed: int, options: PublishOptions) -> None:
        super().__init__(data, batch_size, seed)
        self.arrivals = arrivals
        self._plain = data
        self._size = batch_size
        self._options = options
        self._numbers = np.random.default_rng(seed)

    def next(self) -> tuple[Any, int]:
        """The next batch and the ns it took to decode; moves to the next epoch when this one is used up."""
        if self.index >= self.per_epoch:
            self.seek(self.epoch + 1, 0)
        self.index += 1
        began = now_ns()
        fresh = self.arrivals.newest(self._options.window, False, began)
        count = math.floor(self._size * self._options.fresh_share) if len(fresh) >= self._size else 0
        items = [self.arrivals.items[payload] for payload in self._numbers.choice(fresh, count)] if count else []
        items += [
            self._plain[int(index)] for index in self._numbers.integers(len(self._plain), size=self._size - count)
        ]
        return default_collate(items), now_ns() - began

    def validation(self, count: int, now: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(pictures (n, 3, H, W), classes (n,)) of the newest held-out labelled arrivals, n <= count; None without any."""
        chosen = self.arrivals.newest(count, True, now)
        if not chosen:
            return None
        pictures, classes = default_collate([self.arrivals.items[payload] for payload in chosen])
        return pictures, classes
