"""The naive forecasts every model must beat: last value, train median and mean, rolling medians, EWMA, seasonal.

A naive forecast is a state after k known values, so it works unchanged where values become known late:

    last              v[k-1]
    ewma              s[1] = v[0];  s[k] = a v[k-1] + (1 - a) s[k-1]          a chosen on train by MAE
    rolling_median    median of the last w values (fewer at the start)
    rolling_mean      mean of the last w values
    seasonal          v[k-p], p = the lag of the highest autocorrelation on train, if it is significant
    train_median, train_mean   constants

The best is chosen on validation by MAE, never on test; a validation part of fewer than 100 rows is lengthened backwards
into train for this choice, or chance would pick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from corun.predict.series import WINDOW_FIELDS, Parts, Series, visible_order

__all__ = ["Naive", "candidates", "choose", "errors_of_all", "forecasts", "ridge_forecasts", "season", "states"]

Floats = NDArray[np.float64]

REQUEST_ALPHAS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
WINDOW_ALPHAS: Final = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
ROLLING: Final = (50, 500)
RIDGE_LAGS: Final = 12
LONGEST_SEASON: Final = 5000
LEAST_CHOICE: Final = 100


@dataclass(frozen=True)
class Naive:
    """One naive forecast; `value` is the constant, the smoothing factor, the window or the period it needs."""

    method: str
    value: float = 0.0

    @property
    def label(self) -> str:
        """As shown: rolling_median_500, seasonal_24, ewma."""
        sized = self.method in ("rolling_median", "rolling_mean", "seasonal")
        return f"{self.method}_{int(self.value)}" if sized else self.method


def states(naive: Naive, values: Floats, horizon: int = 1) -> Floats:
    """(n + 1, horizon): the forecasts of the next `horizon` values after the first k; row 0 is nan unless constant."""
    n = values.size
    if naive.method == "seasonal":
        return _seasonal(values, int(naive.value), horizon)
    if naive.method in ("train_median", "train_mean"):
        return np.full((n + 1, horizon), naive.value)
    column = pd.Series(values)
    if naive.method == "last":
        known = values
    elif naive.method == "ewma":
        known = column.ewm(alpha=naive.value, adjust=False).mean().to_numpy()
    elif naive.method == "rolling_median":
        known = column.rolling(int(naive.value), min_periods=1).median().to_numpy()
    elif naive.method == "rolling_mean":
        known = column.rolling(int(naive.value), min_periods=1).mean().to_numpy()
    else:
        raise ValueError(f'naive forecast "{naive.method}" is not known')
    return np.repeat(np.concatenate([[np.nan], known])[:, None], horizon, axis=1)


def forecasts(series: Series, chosen: Sequence[Naive], horizon: int = 1) -> Floats:
    """(n + 1, horizon, T) raw forecasts made before each row, from what is visible then; row n is the next one's."""
    columns = []
    for target, naive in enumerate(chosen):
        values, known = visible_order(series, target)
        columns.append(states(naive, values, horizon)[known])
    return np.stack(columns, axis=-1)


def candidates(train: Floats, rolling: Sequence[tuple[str, int]], alphas: Sequence[float]) -> list[Naive]:
    """All naive forecasts for one target, fitted on its train values (n,)."""
    found = [Naive("last"), Naive("train_median", float(np.median(train))), Naive("train_mean", float(train.mean()))]
    found += [Naive(method, float(window)) for method, window in rolling]
    found.append(best_ewma(train, alphas))
    period = season(train)
    if period:
        found.append(Naive("seasonal", float(period)))
    return found


def choose(series: Series, parts: Parts) -> tuple[Naive, ...]:
    """For each target the naive forecast with the lowest one-step MAE on validation."""
    rows = slice(max(min(parts.validation.start, parts.validation.stop - LEAST_CHOICE), 1), parts.validation.stop)
    chosen = []
    for table in errors_of_all(series, parts, rows):
        chosen.append(min(table, key=table.__getitem__))
    return tuple(chosen)


def errors_of_all(series: Series, parts: Parts, rows: slice) -> list[dict[Naive, float]]:
    """For each target the one-step MAE of every naive forecast on `rows`, each fitted on the learning part."""
    windows = series.fields == WINDOW_FIELDS
    rolling = [("rolling_mean", 12)] if windows else [("rolling_median", window) for window in ROLLING]
    alphas = WINDOW_ALPHAS if windows else REQUEST_ALPHAS
    tables = []
    for target in range(len(series.fields)):
        values, known = visible_order(series, target)
        actual = series.targets[rows, target]
        errors = {}
        for naive in candidates(series.targets[parts.learning, target], rolling, alphas):
            error = float(np.abs(actual - states(naive, values)[known[rows], 0]).mean())
            errors[naive] = error if np.isfinite(error) else np.inf
        tables.append(errors)
    return tables


def best_ewma(train: Floats, alphas: Sequence[float]) -> Naive:
    """The smoothing factor with the lowest one-step MAE on train."""

    def error(alpha: float) -> float:
        return float(np.abs(train[1:] - states(Naive("ewma", alpha), train)[1:-1, 0]).mean())

    return Naive("ewma", min(alphas, key=error))


def season(train: Floats) -> int | None:
    """The period (rows) of the highest autocorrelation from lag 2 on, or None when it is not significant.

    Significant: above 4 / sqrt(n), twice the usual 95 % bound because the highest of many lags is looked at.
    """
    n = train.size
    longest = min(n // 3, LONGEST_SEASON)
    centred = train - train.mean()
    power = float(centred @ centred)
    if longest < 3 or power <= 0:
        return None
    size = 1 << int(np.ceil(np.log2(2 * n)))
    spectrum = np.fft.rfft(centred, size)
    correlation = np.fft.irfft(spectrum * spectrum.conj(), size)[: longest + 1] / power
    lag = int(np.argmax(correlation[2:])) + 2
    return lag if correlation[lag] > 4 / np.sqrt(n) else None


def ridge_forecasts(values: Floats, train_end: int, horizon: int = 1, penalty: float = 1.0) -> Floats:
    """(n + 1, horizon): autoregression of 12 lags on square roots of counts, fitted on rows before `train_end`.

    The one learned forecast without torch: ridge regression in closed form, one per horizon, clipped at 0. Row k is
    made from the k values before it; rows with fewer than 12 are nan.
    """
    roots = np.sqrt(values)
    n = roots.size
    out = np.full((n + 1, horizon), np.nan)
    if train_end - RIDGE_LAGS - horizon < RIDGE_LAGS:
        return out
    lagged = np.lib.stride_tricks.sliding_window_view(roots, RIDGE_LAGS)
    for ahead in range(horizon):
        x, y = lagged[: train_end - RIDGE_LAGS - ahead], roots[RIDGE_LAGS + ahead : train_end]
        x_mean, y_mean = x.mean(axis=0), y.mean()
        gram = (x - x_mean).T @ (x - x_mean) + penalty * np.eye(RIDGE_LAGS)
        weights = np.linalg.solve(gram, (x - x_mean).T @ (y - y_mean))
        out[RIDGE_LAGS:, ahead] = np.maximum((lagged - x_mean) @ weights + y_mean, 0.0) ** 2
    return out


def _seasonal(values: Floats, period: int, horizon: int) -> Floats:
    n = values.size
    rows = np.arange(n + 1)[:, None] - period + np.arange(horizon)[None, :] % period
    return np.where(rows >= 0, values[np.maximum(rows, 0)], np.nan) if n else np.full((1, horizon), np.nan)
