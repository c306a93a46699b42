"""Whole fits on made data: structure is found, independence is not "predicted", intervals cover."""

from __future__ import annotations

import numpy as np
import pytest

from corun.errors import InputError
from corun.predict.fitting import Settings
from corun.predict.levels import BASELINE, Level, fit
from corun.predict.series import request_series, window_series
from corun.predict.synthetic import ar, poisson, seasonal

pytestmark = pytest.mark.timeout(600)  # a guard against hanging, wide enough for a machine with ten times the work
MODELS = ("lstm", "dlinear")
SETTINGS = Settings(seq_len=30, epochs=12, batch_size=128, patience=3)


def mean_skill(outcome: Level, name: str) -> float:
    return float(np.mean([score.skill for score in outcome.scores[name].values()]))


@pytest.fixture(scope="module")
def independent() -> Level:
    return fit(request_series(poisson(5000, seed=11)), MODELS, SETTINGS)


@pytest.mark.parametrize("make", [seasonal, ar])
def test_models_find_structure_that_no_naive_forecast_follows(make: object) -> None:
    """On a noisy sine and on an alternating AR(1) both models beat the best naive forecast by a fifth, and are proven."""
    assert callable(make)
    outcome = fit(request_series(make(5000, seed=5)), MODELS, SETTINGS)
    assert outcome.recommended in MODELS
    for name in MODELS:
        assert mean_skill(outcome, name) > 0.2
        assert outcome.models[name].proof.holds
        assert all(score.skill_ci[0] > 0 for score in outcome.scores[name].values())


def test_independent_requests_are_not_predicted(independent: Level) -> None:
    """On an iid Poisson load nothing is recommended, for no target, and no model gains more than noise."""
    assert independent.recommended == BASELINE
    for name, model in independent.models.items():
        assert not any(proof.holds for proof in model.field_proofs.values())
        assert abs(mean_skill(independent, name)) < 0.02


def test_intervals_cover_independent_requests(independent: Level) -> None:
    """Nominal 90 %: split and adaptive intervals of every model and of the baseline cover 90 % within a few points."""
    for by_field in independent.scores.values():
        for score in by_field.values():
            assert score.coverage == pytest.approx(0.9, abs=0.04)
            assert score.coverage_adaptive == pytest.approx(0.9, abs=0.02)


def test_the_baseline_is_scored_against_itself(independent: Level) -> None:
    """Its skill is 0 by definition."""
    assert all(score.skill == pytest.approx(0.0, abs=1e-9) for score in independent.scores[BASELINE].values())


def test_windows_have_a_forecast_for_every_horizon() -> None:
    """Six windows ahead: one error for each horizon and target, and nothing proven on a Poisson load."""
    series = window_series(poisson(4000, seed=3), 2.0)
    settings = Settings(seq_len=12, epochs=3, batch_size=32)
    outcome = fit(series, MODELS, settings, horizon=6, length=12, minimum=5)
    assert [len(outcome.by_horizon[name]) for name in (*MODELS, BASELINE)] == [6, 6, 6]
    assert outcome.models["lstm"].levels(series, np.array([len(series)])).shape == (1, 6, 2, 5)
    assert outcome.recommended == BASELINE


def test_more_than_two_days_are_judged_by_day() -> None:
    """The test part's errors are told for every day in it: a rolling origin."""
    requests = poisson(3000, seed=1)
    stretched = requests.t_ns * 400
    days = type(requests)(stretched, requests.request_tokens, requests.response_tokens, None, requests.format)
    outcome = fit(request_series(days), ("dlinear",), Settings(seq_len=10, epochs=1, batch_size=256))
    table = outcome.by_day["dlinear"]
    assert sum(row["rows"] for row in table) == outcome.parts.test.stop - outcome.parts.test.start
    assert [row["day"] for row in table] == sorted({row["day"] for row in table})
    assert fit(request_series(requests), ("dlinear",), Settings(seq_len=10, epochs=1)).by_day["dlinear"] == []


def test_too_short_a_series_is_refused() -> None:
    """The message gives the number of rows needed."""
    with pytest.raises(InputError, match="too few for an input of 30 rows"):
        fit(request_series(poisson(200)), MODELS, SETTINGS)
