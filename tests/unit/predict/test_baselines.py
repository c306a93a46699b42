"""Naive forecasts: their definitions, their causality, and the published figures on the Azure traces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.predict.baselines import Naive, forecasts, ridge_forecasts, season, states
from corun.predict.data import read
from corun.predict.series import Series, request_series, window_series
from corun.predict.synthetic import seasonal

SHARED = Path(__file__).parents[4] / "shared" / "traces"
ALL = (
    Naive("last"),
    Naive("train_median", 3.0),
    Naive("rolling_median", 5),
    Naive("rolling_mean", 3),
    Naive("ewma", 0.3),
    Naive("seasonal", 4),
)


def trace(name: str) -> Path:
    path = SHARED / f"AzureLLMInferenceTrace_{name}.csv"
    if not path.exists():
        pytest.skip(f"{path} is not here: the public traces lie beside the project, not in it")
    return path


def test_definitions() -> None:
    """Entry k is made from the first k values; the EWMA starts at the first value and predicts before it updates."""
    values = np.array([1.0, 3.0, 2.0, 8.0])
    assert states(Naive("last"), values)[1:, 0].tolist() == [1, 3, 2, 8]
    assert states(Naive("rolling_median", 2), values)[1:, 0].tolist() == [1, 2, 2.5, 5]
    assert states(Naive("rolling_mean", 2), values)[1:, 0].tolist() == [1, 2, 2.5, 5]
    assert states(Naive("ewma", 0.5), values)[1:, 0].tolist() == [1, 2, 2, 5]
    assert states(Naive("train_mean", 7.0), values)[:, 0].tolist() == [7] * 5


def test_the_next_row_is_forecast_on_a_ramp() -> None:
    """t + 1 alignment: on a ramp the last value is one step behind, a season of one row too."""
    ramp = np.arange(10.0)
    for naive in (Naive("last"), Naive("seasonal", 1)):
        assert (ramp[1:] - states(naive, ramp)[1:-1, 0]).tolist() == [1.0] * 9


def test_a_season_ahead_is_the_value_one_season_ago() -> None:
    """Beyond one season the same values repeat."""
    values = np.arange(6.0)
    assert states(Naive("seasonal", 3), values, horizon=5)[-1].tolist() == [3, 4, 5, 3, 4]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=3, max_size=60), st.data())
def test_no_naive_forecast_sees_the_future(values: list[float], data: st.DataObject) -> None:
    """Changing values from k on leaves the first k + 1 forecasts bit-identical."""
    cut = data.draw(st.integers(1, len(values) - 1))
    array = np.array(values)
    other = np.concatenate([array[:cut], array[cut:][::-1] + 1.0])
    for naive in ALL:
        before, after = (states(naive, one)[: cut + 1] for one in (array, other))
        assert np.array_equal(before, after, equal_nan=True)


def test_late_responses_are_forecast_from_finished_ones_only() -> None:
    """Before row i the last value of a late target is the last one that was complete by row i - 1."""
    rows = np.arange(5)
    series = Series(
        fields=request_series(seasonal(10)).fields[:1],
        features=np.zeros((5, 1)),
        targets=np.arange(10.0, 60.0, 10.0)[:, None],
        visible=(rows + 2)[:, None],
        t_ns=rows,
    )
    made = forecasts(series, [Naive("last")])[:, 0, 0]
    assert np.isnan(made[:3]).all()
    assert made[3:].tolist() == [10, 20, 30]


def test_a_season_is_found_where_there_is_one_only() -> None:
    """The period of a sine is a multiple of its own; white noise has none."""
    wave = np.sin(2 * np.pi * np.arange(600) / 24) + 0.1 * np.random.default_rng(0).normal(size=600)
    period = season(wave)
    assert period is not None
    assert period % 24 == 0
    assert season(np.random.default_rng(1).normal(size=2000)) is None
    assert season(np.ones(100)) is None


def test_autoregression_follows_what_repeats() -> None:
    """Alternating counts are forecast by the autoregression, whatever the last value says."""
    counts = np.tile([0.0, 10.0], 60)
    error = np.abs(counts[60:] - ridge_forecasts(counts, 60)[60:-1, 0])
    assert error.max() < 1.0
    assert np.isnan(ridge_forecasts(counts, 10)).all()


CONV = {
    0: {"last": (0.2301, 0.3382), "train_median": (0.1635, 0.2696), "rolling_median_500": (0.1602, 0.2565)},
    1: {"last": (823.3, 1264.4), "train_median": (542.0, 908.9), "rolling_median_50": (545.9, 917.4)},
    2: {"train_mean": (143.0, 169.2), "rolling_median_50": (138.4, 177.3), "ewma": (142.1, 159.0)},
}
CODE = {
    0: {"last": (1.2227, 11.339), "rolling_median_50": (0.6410, 8.023), "ewma": (1.1076, 8.019)},
    1: {"train_median": (1477.3, 2109.5), "train_mean": (1527.6, 2007.5)},
    2: {"train_median": (20.09, 59.48), "rolling_median_500": (20.09, 59.43)},
}
ALPHAS = {("conv", 2): 0.02, ("code", 0): 0.01}


@pytest.mark.parametrize(("name", "golden"), [("conv", CONV), ("code", CODE)])
def test_published_next_request_figures(name: str, golden: dict[int, dict[str, tuple[float, float]]]) -> None:
    """MAE and RMSE of naive forecasts on the last fifth of the Azure LLM 2023 traces, responses known at once."""
    series = request_series(read(trace(name)), 0.0)
    cut = int(0.8 * len(series))
    for target, rows in golden.items():
        values = series.targets[:, target]
        for label, (mae, rmse) in rows.items():
            error = values[cut:] - states(_naive(label, values[:cut], ALPHAS.get((name, target))), values)[cut:-1, 0]
            assert np.abs(error).mean() == pytest.approx(mae, rel=6e-4), label
            assert np.sqrt((error**2).mean()) == pytest.approx(rmse, rel=6e-4), label


@pytest.mark.parametrize(
    ("name", "window_s", "golden", "alpha"),
    [
        ("conv", 1, {"last": 2.379, "ewma": 1.746, "rolling_mean_12": 1.778, "train_median": 2.459}, 0.05),
        ("conv", 10, {"last": 8.50, "ewma": 6.68, "rolling_mean_12": 7.18, "train_mean": 17.98}, 0.2),
        ("conv", 30, {"last": 12.29, "ewma": 12.88, "rolling_mean_12": 18.44}, 0.5),
        ("code", 1, {"last": 0.891, "ewma": 0.880, "rolling_mean_12": 1.203, "train_mean": 3.283}, 0.9),
        ("code", 10, {"last": 10.86, "ewma": 11.03, "train_median": 10.15}, 0.9),
        ("code", 30, {"last": 31.52, "ewma": 47.83, "train_mean": 68.27}, 0.05),
    ],
)
def test_published_window_figures(name: str, window_s: float, golden: dict[str, float], alpha: float) -> None:
    """MAE of the next window's count on the last fifth of the windows of the Azure LLM 2023 traces."""
    counts = window_series(read(trace(name)), window_s).targets[:, 0]
    cut = int(0.8 * counts.size)
    for label, mae in golden.items():
        error = counts[cut:] - states(_naive(label, counts[:cut], alpha), counts)[cut:-1, 0]
        assert np.abs(error).mean() == pytest.approx(mae, abs=0.006), label


def _naive(label: str, train: np.ndarray, alpha: float | None) -> Naive:
    if label == "train_median":
        return Naive(label, float(np.median(train)))
    if label == "train_mean":
        return Naive(label, float(train.mean()))
    if label == "ewma":
        return Naive(label, alpha or 0.1)
    method, _, size = label.rpartition("_")
    return Naive(method, float(size)) if method else Naive(label)
