"""Forecasts requests and tokens of the coming windows from the history alone, with quantiles.

The forecast of each quantity is the naive one that did best on the second half of the history's windows; the linear
autoregression takes its place only when it is proven better there. Its errors at the same distance give the quantiles:
they are taken on square roots, which make the spread of a count about independent of its level (Anscombe 1948).

For a Poisson load of constant rate nothing but the rate can be known; the quantiles then are the Poisson's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corun.errors import InputError
from corun.predict.baselines import WINDOW_ALPHAS, candidates, ridge_forecasts, states
from corun.predict.data import Requests
from corun.predict.scores import prove
from corun.predict.series import RESPONSE_LAG_S, WINDOW_FIELDS, window_series

__all__ = ["LEVELS", "Rate", "forecast", "forecast_values"]

Floats = NDArray[np.float64]

LEVELS: Final = (0.1, 0.5, 0.9)
LEAST_WINDOWS: Final = 10
AUTOREGRESSION: Final = "ar12"


@dataclass(frozen=True)
class Rate:
    """One quantity over the coming windows: mean (H,), quantiles (H, 3) at 0.1, 0.5 and 0.9, and the method."""

    method: str
    mean: Floats
    quantiles: Floats


def forecast(
    requests: Requests, window_s: float, horizon: int, now_ns: int, response_lag_s: float = RESPONSE_LAG_S
) -> dict[str, Rate]:
    """Requests and tokens of the `horizon` windows after `now_ns`.

    Raises InputError when the history holds fewer than ten windows.
    """
    if horizon < 1:
        raise InputError(f"a horizon of {horizon} windows; it must be 1 or more")
    series = window_series(requests, window_s, response_lag_s, now_ns)
    if len(series) < LEAST_WINDOWS + horizon:
        raise InputError(
            f"the history holds {len(series)} windows of {window_s:g} s; {LEAST_WINDOWS + horizon} are needed"
        )
    return {
        field.name: forecast_values(series.targets[:, place], horizon) for place, field in enumerate(WINDOW_FIELDS)
    }


def forecast_values(values: Floats, horizon: int) -> Rate:
    """The next `horizon` of a dense series (n,) of non-negative values."""
    half = values.size // 2
    table = {
        naive.label: states(naive, values, horizon)
        for naive in candidates(values[:half], [("rolling_mean", 12)], WINDOW_ALPHAS)
    }
    errors = {label: np.abs(values[half:] - state[half:-1, 0]) for label, state in table.items()}
    best = min(errors, key=lambda label: float(np.nan_to_num(errors[label].mean(), nan=np.inf)))
    learned = ridge_forecasts(values, half, horizon)
    if np.isfinite(learned[half:]).all():
        proof = prove(np.abs(values[half:] - learned[half:-1, 0]), errors[best], attempts=1)
        if proof.holds:
            best, table = AUTOREGRESSION, {AUTOREGRESSION: learned}
    return _with_spread(best, values, table[best], half, horizon)


def _with_spread(method: str, values: Floats, state: Floats, half: int, horizon: int) -> Rate:
    """Quantiles and mean of the next values from the errors made at the same distance since `half`."""
    mean, quantiles = np.empty(horizon), np.empty((horizon, len(LEVELS)))
    for ahead in range(horizon):
        came, told = values[half + ahead :], state[half : values.size - ahead, ahead]
        now = state[-1, ahead]
        roots = np.sqrt(now) + np.quantile(np.sqrt(came) - np.sqrt(told), LEVELS)
        quantiles[ahead] = np.maximum(roots, 0.0) ** 2
        mean[ahead] = max(float(now + (came - told).mean()), 0.0)
    return Rate(method, mean, quantiles)
