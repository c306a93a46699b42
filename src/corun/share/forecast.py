"""Forecasts of the coming load, and what they leave for training.

A feedback controller reacts after a window of bad replies; a forecast brakes before them. Any object with `observe`
and `forecast` will do: the LSTM and DLinear predictors of `corun.predict` fit here as well as the
smoothing below: `"forecaster": "corun.predict.forecast:from_history", "history": "past_trace.csv"`.

    Holt 1957:  level' = a * x + (1 - a) * (level + trend),  trend' = b * (level' - level) + (1 - b) * trend
    forecast(h) = level + h * trend
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Final, Protocol

from corun.errors import InputError

FORECASTERS: Final = ("ewma",)


class Forecaster(Protocol):
    """Learns from counts of equal windows, in order; says the rate some windows ahead."""

    def observe(self, rate: float) -> None:
        """The arrival rate of the window that just ended, in requests/s."""

    def forecast(self, windows: int = 1) -> float | None:
        """Expected rate `windows` ahead, in requests/s, >= 0; None before the first observation."""


class Ewma:
    """Exponentially weighted mean, with Holt's trend when `trend_weight` is above 0."""

    def __init__(self, weight: float = 0.5, trend_weight: float = 0.2) -> None:
        if not 0 < weight <= 1 or not 0 <= trend_weight <= 1:
            raise InputError(f"smoothing weights {weight}, {trend_weight} must be in (0, 1] and [0, 1]")
        self._weight = weight
        self._trend_weight = trend_weight
        self._level: float | None = None
        self._trend = 0.0

    def observe(self, rate: float) -> None:
        if self._level is None:
            self._level = rate
            return
        before = self._level
        self._level = self._weight * rate + (1 - self._weight) * (before + self._trend)
        self._trend = self._trend_weight * (self._level - before) + (1 - self._trend_weight) * self._trend

    def forecast(self, windows: int = 1) -> float | None:
        if self._level is None:
            return None
        return max(0.0, self._level + windows * self._trend)


@dataclass(frozen=True)
class Headroom:
    """Effort left at a forecast utilisation: 1 up to `low`, `floor` from `high` on, linear in between."""

    low: float = 0.2
    high: float = 0.7
    floor: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high or not 0 < self.floor <= 1:
            raise InputError(f"impossible headroom: low {self.low} < high {self.high}, 0 < floor {self.floor} <= 1")

    def effort(self, utilisation: float) -> float:
        """Effort in [floor, 1] for a utilisation >= 0 of the shared resource by the services."""
        share = (self.high - utilisation) / (self.high - self.low)
        return max(self.floor, min(1.0, share))


def make_forecaster(name: str, window_s: float = 1.0, history: str = "") -> Forecaster:
    """The forecaster called `name`, or made by `MODULE:FUNCTION` from (window_s, history).

    Raises InputError for an unknown name, a module that is not there, or a history it cannot learn from.
    """
    if name == "ewma":
        return Ewma()
    module, _, function = name.partition(":")
    if not function:
        raise InputError(f'forecaster "{name}" is unknown: use {", ".join(FORECASTERS)} or MODULE:FUNCTION')
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f'forecaster "{name}" cannot be loaded: {error}') from error
    made: Forecaster = make(window_s, history)
    return made
