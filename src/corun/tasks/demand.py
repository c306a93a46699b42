"""What a task will be asked next: the forecast a scaler acts on, from nothing but counts per window.

Two forecasters, the better informed one first:

    learned   an upper quantile of the load of the coming windows (corun.predict.forecast), fitted on this task's own
              past windows as soon as there are enough of them, and again now and then
    ewma      an exponentially weighted mean of the windows so far

A replica takes seconds to start, so the load is forecast as many windows ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from corun.errors import InputError

if TYPE_CHECKING:
    from corun.predict.forecast import LoadStream

__all__ = ["Demand", "Forecast"]

ALPHA = 0.3
QUANTILE = 0.9
LEARN_FROM = 60
LEARN_AGAIN = 60
REMEMBERED = 720


@dataclass(frozen=True)
class Forecast:
    """Requests/s of the windows ahead, and how they were foreseen: learned or ewma."""

    rate: float
    method: str


class Demand:
    """Arrivals of one task in windows of `window_s`; ahead: how many windows lie between now and what is forecast."""

    def __init__(self, window_s: float, ahead: int = 1, learn_from: int = LEARN_FROM) -> None:
        if not (window_s > 0 and ahead >= 1):
            raise InputError(f"windows of {window_s:g} s, {ahead} ahead: both must be positive")
        self.window_s = window_s
        self.ahead = ahead
        self._learn_from = learn_from
        self._counts: deque[int] = deque(maxlen=REMEMBERED)
        self._mean: float | None = None
        self._stream: LoadStream | None = None
        self._since_learned = 0

    def observe(self, count: int) -> None:
        """Arrivals of the window that just ended."""
        self._counts.append(count)
        rate = count / self.window_s
        self._mean = rate if self._mean is None else self._mean + ALPHA * (rate - self._mean)
        self._since_learned += 1
        if self._stream is not None:
            self._stream.observe(rate)
        if len(self._counts) >= self._learn_from and (self._stream is None or self._since_learned >= LEARN_AGAIN):
            self._learn()

    def remember(self, counts: Iterable[int]) -> None:
        """Windows of an earlier life, oldest first: they teach, and say nothing about the load now."""
        self._counts.extend(counts)
        if len(self._counts) >= self._learn_from:
            self._learn()

    def forecast(self) -> Forecast | None:
        """None before the first window."""
        learned = self._stream.forecast(self.ahead) if self._stream is not None else None
        if learned is not None:
            return Forecast(learned, "learned")
        return None if self._mean is None else Forecast(self._mean, "ewma")

    def _learn(self) -> None:
        from corun.predict.forecast import LoadForecaster, LoadStream

        self._since_learned = 0
        seen = self._mean is not None
        try:
            fitted = LoadForecaster.fit(_arrivals(self._counts, self.window_s), self.window_s, QUANTILE, self.ahead)
        except InputError:
            return
        self._stream = LoadStream(fitted)
        for count in self._counts if seen else ():
            self._stream.observe(count / self.window_s)


def _arrivals(counts: Iterable[int], window_s: float) -> list[float]:
    """Instants in s, evenly spread over each window: nothing finer is known."""
    return [
        window_s * (number + float(place))
        for number, count in enumerate(counts)
        for place in np.linspace(0.0, 1.0, count, endpoint=False)
    ]
