"""The load forecasters of the sharing policy: pure, causal, calibrated, cheap to import."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import InputError
from corun.predict.forecast import EwmaForecaster, LoadForecaster, LoadStream


def poisson(rate: float, seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.sort(rng.uniform(0, seconds, rng.poisson(rate * seconds)))


def bursts(seconds: int, seed: int = 0) -> np.ndarray:
    """On for 5 s at 40/s, off for 15 s at 1/s."""
    rng = np.random.default_rng(seed)
    parts = [
        start + poisson(40.0 if start % 20 < 5 else 1.0, 1.0, int(rng.integers(1 << 30))) for start in range(seconds)
    ]
    return np.concatenate(parts)


FITTED = LoadForecaster.fit(poisson(20, 300), 1.0, horizon=3)


@settings(max_examples=50, deadline=None)
@given(st.floats(20, 60), st.lists(st.floats(0, 50), max_size=30))
def test_arrivals_after_now_are_never_looked_at(now_s: float, later: list[float]) -> None:
    """A forecast is a pure function of the arrivals before now."""
    past = poisson(20, 60)
    past = past[past < now_s]
    longer = np.concatenate([past, np.sort(now_s + np.array(later))])
    for forecaster in (FITTED, EwmaForecaster(1.0)):
        assert forecaster.forecast(now_s, past) == forecaster.forecast(now_s, longer)


def test_one_rate_for_every_horizon() -> None:
    """As many as were fitted; all non-negative, also on an empty history."""
    assert len(FITTED.forecast(50.0, poisson(20, 60))) == 3
    for forecaster in (FITTED, EwmaForecaster(1.0, horizon=3)):
        rates = forecaster.forecast(10.0, [])
        assert len(rates) == 3
        assert min(rates) >= 0.0


@pytest.mark.parametrize("quantile", [0.8, 0.9])
def test_the_quantile_covers_a_poisson_load(quantile: float) -> None:
    """On a steady load the next count lies at or below the forecast as often as promised."""
    forecaster = LoadForecaster.fit(poisson(20, 600, 1), 1.0, quantile)
    fresh = poisson(20, 600, 2)
    counts = np.histogram(fresh, np.arange(0, 601))[0]
    hits = [forecaster.forecast(float(k), fresh)[0] >= counts[k] for k in range(12, 600)]
    assert np.mean(hits) == pytest.approx(quantile, abs=0.07)


def test_the_quantile_follows_the_state_of_a_bursty_load() -> None:
    """Inside a burst the forecast is high, in a lull low; it covers the next count as promised."""
    forecaster = LoadForecaster.fit(bursts(800), 1.0)
    fresh = bursts(800, seed=9)
    counts = np.histogram(fresh, np.arange(0, 801))[0]
    rates = np.array([forecaster.forecast(float(k), fresh)[0] for k in range(20, 800)])
    phase = np.arange(20, 800) % 20
    assert rates[phase == 3].mean() > 3 * rates[phase == 12].mean()
    assert (rates >= counts[20:]).mean() > 0.85


def test_the_ewma_of_a_steady_rate_is_that_rate() -> None:
    """Ten arrivals in every window are 10 windows a second apart: 10 / window_s."""
    arrivals = np.arange(0, 60, 0.05)
    assert EwmaForecaster(0.5, alpha=0.3).forecast(50.0, arrivals)[0] == pytest.approx(20.0)


def test_a_stream_of_rates_gives_the_same_as_arrivals() -> None:
    """Fed with one rate per window it forecasts what evenly spread arrivals would give; None before any window."""
    stream = LoadStream(FITTED)
    assert stream.forecast() is None
    arrivals = np.arange(0, 30, 0.05) + 0.025
    for _ in range(12):
        stream.observe(20.0)
    rates = FITTED.forecast(30.0, arrivals)
    assert [stream.forecast(1), stream.forecast(3), stream.forecast(9)] == pytest.approx(
        [rates[0], rates[2], rates[2]]
    )


@pytest.mark.parametrize(
    ("arrivals", "window_s", "quantile", "message"),
    [
        (poisson(20, 300), 0.0, 0.9, "must be positive"),
        (poisson(20, 300), 1.0, 1.0, "between 0 and 1"),
        (poisson(20, 20), 1.0, 0.9, "40 are needed"),
        ([], 1.0, 0.9, "40 are needed"),
    ],
)
def test_what_cannot_be_fitted_is_refused(arrivals: object, window_s: float, quantile: float, message: str) -> None:
    """With the reason."""
    with pytest.raises(InputError, match=message):
        LoadForecaster.fit(arrivals, window_s, quantile)  # type: ignore[arg-type]


def test_a_policy_pays_neither_for_torch_nor_for_pandas() -> None:
    """The forecaster's module loads numpy and scipy only, so a controller can use it beside measured processes."""
    code = "import sys, corun.predict.forecast, corun.predict.sharing; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "pandas", "matplotlib", "pyarrow"} & {name.split(".")[0] for name in loaded}
