"""The upper quantile of the load of the coming windows, from nothing but the arrivals so far: what a policy acts on.

Training may use what the services leave over, so a policy needs the load it will rarely exceed, not the mean. Two
windows with the same mean are not alike: after a burst the next count is wide open, after a steady minute it is not.
The quantile is therefore forecast itself, by quantile autoregression (Koenker & Xiao 2006) on square roots of counts:

    sqrt(count[k + h])  <=  b0 + b1 sqrt(c1) + b2 sqrt(mean c1..c3) + b3 sqrt(mean c1..c12) + b4 sqrt(max c1..c12)
                            + b5 sqrt(4 * count of the last quarter window)      with probability q

Its weights minimise the pinball loss (a linear program) on the first three quarters of a past trace; a conformal shift
on the last quarter makes it cover there. A forecast is a pure function of the arrivals before `now`: no clock, no
state, nothing later than `now` is looked at, and client arrivals are never touched.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog

from corun import arrivals
from corun.errors import InputError

__all__ = ["EwmaForecaster", "LoadForecaster", "LoadStream"]

Floats = NDArray[np.float64]

LAGS: Final = 12
LEAST_ROWS: Final = 40
PARTS: Final = 4
FIT_SHARE: Final = 0.75
DAY_S: Final = 86_400.0


@dataclass(frozen=True)
class LoadForecaster:
    """Forecasts the `quantile` of the request rate of the next windows; made by `fit`.

    Usage::

        forecaster = LoadForecaster.fit(past_arrivals_s, window_s=1.0)
        rates = forecaster.forecast(now_s, arrivals_s)      # requests/s, one for each coming window
    """

    window_s: float
    quantile: float
    weights: tuple[tuple[float, ...], ...]
    """One row per coming window: intercept and five slopes, on square roots of counts."""
    shifts: tuple[float, ...]

    @classmethod
    def fit(cls, arrivals_s: ArrayLike, window_s: float, quantile: float = 0.9, horizon: int = 1) -> LoadForecaster:
        """Learn from the arrivals (n,) of a past trace, in s, ascending.

        Raises InputError when they span fewer than forty windows or a setting is out of range.
        """
        _check(window_s, quantile, horizon)
        arrivals = np.asarray(arrivals_s, dtype=np.float64)
        ends = _ends(arrivals, window_s)
        rows = ends.size - horizon
        if rows < LEAST_ROWS:
            raise InputError(f"{max(rows, 0)} windows of {window_s:g} s to learn from; {LEAST_ROWS} are needed")
        features = np.stack([_features(arrivals, end, window_s) for end in ends[:rows]])
        cut = int(FIT_SHARE * rows)
        weights, shifts = [], []
        for ahead in range(horizon):
            starts = ends[:rows] + ahead * window_s
            roots = np.sqrt(_counts(arrivals, starts, window_s))
            row = _quantile_regression(features[:cut], roots[:cut], quantile)
            left = roots[cut:] - features[cut:] @ row
            rank = min(math.ceil(quantile * (left.size + 1)), left.size)
            weights.append(tuple(row.tolist()))
            shifts.append(float(np.sort(left)[rank - 1]))
        return cls(window_s, quantile, tuple(weights), tuple(shifts))

    def forecast(self, now_s: float, arrivals_s: ArrayLike) -> tuple[float, ...]:
        """The quantile of the rate in requests/s of each coming window, from the arrivals before `now_s`.

        arrivals_s: (n,) ascending instants on the clock of `now_s`; later ones are ignored.
        """
        return self.from_features(_features(np.asarray(arrivals_s, dtype=np.float64), now_s, self.window_s))

    def from_features(self, features: Floats) -> tuple[float, ...]:
        """The same from the (6,) features of the module's formula."""
        roots = np.array(self.weights) @ features + np.array(self.shifts)
        return tuple(float(root) ** 2 / self.window_s for root in np.maximum(roots, 0.0))


@dataclass(frozen=True)
class EwmaForecaster:
    """The reactive counterpart: an exponentially weighted mean of the rates of the last windows, for every horizon."""

    window_s: float
    alpha: float = 0.3
    horizon: int = 1

    def forecast(self, now_s: float, arrivals_s: ArrayLike) -> tuple[float, ...]:
        """The smoothed rate in requests/s, from the arrivals before `now_s`; 0 when there are none."""
        arrivals = np.asarray(arrivals_s, dtype=np.float64)
        memory = math.ceil(math.log(0.001) / math.log(1 - self.alpha)) if self.alpha < 1 else 1
        starts = now_s - self.window_s * np.arange(memory, 0.0, -1)
        weights = self.alpha * (1 - self.alpha) ** np.arange(memory - 1, -1, -1)
        rate = float(weights @ _counts(arrivals, starts, self.window_s)) / float(weights.sum()) / self.window_s
        return (rate,) * self.horizon


class LoadStream:
    """A LoadForecaster fed with one rate per window instead of arrivals, for controllers that only count.

    The arrivals of a window are taken as evenly spread in it; nothing finer is known.
    """

    def __init__(self, forecaster: LoadForecaster) -> None:
        self._forecaster = forecaster
        self._counts: deque[float] = deque(maxlen=LAGS)

    def observe(self, rate: float) -> None:
        """The arrival rate of the window that just ended, in requests/s."""
        self._counts.append(rate * self._forecaster.window_s)

    def forecast(self, windows: int = 1) -> float | None:
        """The quantile of the rate `windows` ahead (the farthest one fitted, beyond it); None before any window."""
        if not self._counts:
            return None
        newest_first = np.array([*reversed(self._counts)] + [0.0] * (LAGS - len(self._counts)))
        rates = self._forecaster.from_features(_of_counts(newest_first, newest_first[0]))
        return rates[min(windows, len(rates)) - 1]


def from_history(window_s: float, history: str) -> LoadStream:
    """A stream that learned from the arrivals of a past trace, any that `corun.arrivals.read` knows.

    This is what `"sharing": {"policy": "predictive", "forecaster": "corun.predict.forecast:from_history",
    "history": FILE}` asks for. Raises InputError when the trace is missing or too short for windows of window_s.
    """
    if not history:
        raise InputError('the forecaster learns from a past trace: give its file as "history"')
    trace = arrivals.read(Path(history))
    stamps = trace.offsets_s if isinstance(trace, arrivals.Trace) else trace.draw(np.random.default_rng(0), DAY_S)
    return LoadStream(LoadForecaster.fit(stamps, window_s))


def _check(window_s: float, quantile: float, horizon: int) -> None:
    problems = []
    if not window_s > 0:
        problems.append(f"window_s is {window_s}; it must be positive")
    if not 0 < quantile < 1:
        problems.append(f"quantile is {quantile}; it must lie between 0 and 1")
    if horizon < 1:
        problems.append(f"horizon is {horizon}; it must be 1 or more")
    if problems:
        raise InputError("the forecaster cannot be fitted", problems)


def _ends(arrivals: Floats, window_s: float) -> Floats:
    """Instants at which a full history of 12 windows lies behind and a full window ahead."""
    if arrivals.size < 2:
        return np.empty(0)
    count = int((arrivals[-1] - arrivals[0]) // window_s)
    return np.asarray(arrivals[0] + window_s * np.arange(LAGS, max(count, LAGS)))


def _counts(arrivals: Floats, starts: Floats, width: float) -> Floats:
    """Arrivals in [start, start + width) for each start."""
    after = np.searchsorted(arrivals, starts + width, side="left")
    return np.asarray(after - np.searchsorted(arrivals, starts, side="left"), dtype=np.float64)


def _features(arrivals: Floats, now_s: float, window_s: float) -> Floats:
    """(6,) what the module's formula calls 1, c1, c1..c3, c1..c12, max, last quarter: all before `now_s`."""
    counts = _counts(arrivals, now_s - window_s * np.arange(1.0, LAGS + 1), window_s)
    quarter = _counts(arrivals, np.array([now_s - window_s / PARTS]), window_s / PARTS)[0]
    return _of_counts(counts, PARTS * quarter)


def _of_counts(counts: Floats, latest: float) -> Floats:
    """(6,) features of the counts (12,) of the last windows, newest first, and of the last quarter times four."""
    levels = (counts[0], counts[:3].mean(), counts.mean(), counts.max(), latest)
    return np.concatenate([[1.0], np.sqrt(levels)])


def _quantile_regression(x: Floats, y: Floats, quantile: float) -> Floats:
    """Weights (k,) that minimise the pinball loss of x @ w against y, slopes not negative: more load, more to come.

    y = x w + u - v with u, v >= 0; minimise q sum(u) + (1 - q) sum(v) (Koenker & Bassett 1978).
    """
    rows, columns = x.shape
    cost = np.concatenate([np.zeros(columns), np.full(rows, quantile), np.full(rows, 1 - quantile)])
    equality = np.hstack([x, np.eye(rows), -np.eye(rows)])
    bounds = [(None, None)] + [(0.0, None)] * (columns - 1 + 2 * rows)
    solution = linprog(cost, A_eq=equality, b_eq=y, bounds=bounds, method="highs")
    return np.asarray(solution.x[:columns], dtype=np.float64)
