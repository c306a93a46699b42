"""Scores and proofs: their formulas, and that chance is no proof."""

from __future__ import annotations

import numpy as np
import pytest

from corun.predict.scores import block_length, prove, ratio_interval, score, tolerance_share

ACTUAL = np.array([1.0, 2.0, 3.0, 10.0])


def levels_of(middle: np.ndarray, spread: float = 1.0) -> np.ndarray:
    return middle[:, None] + spread * np.array([-2.0, -1.0, 0.0, 1.0, 2.0])


def test_formulas() -> None:
    """MAE, RMSE, median, MASE, skill, coverage and width as the module defines them."""
    middle = np.array([1.0, 3.0, 3.0, 6.0])
    one = score(ACTUAL, levels_of(middle), naive=np.array([3.0, 3.0, 3.0, 5.0]), denominator=2.5)
    assert one.mae == pytest.approx(1.25)
    assert one.rmse == pytest.approx(np.sqrt(17 / 4))
    assert one.median_ae == pytest.approx(0.5)
    assert one.mase == pytest.approx(0.5)
    assert one.skill == pytest.approx(1 - 1.25 / 2.0)
    assert one.coverage == 0.75
    assert one.width == 4.0
    assert one.pinball["0.5"] == pytest.approx(1.25 / 2)
    assert one.pinball["0.9"] == pytest.approx((0.1 * 1 + 0.1 * 2 + 0.1 * 1 + 0.9 * 3) / 4)


def test_skill_has_an_interval_around_it() -> None:
    """A forecast with half the error of the naive one has a skill near 0.5 with an interval that excludes 0."""
    rng = np.random.default_rng(0)
    naive = np.abs(rng.normal(size=2000))
    low, high = ratio_interval(naive / 2 + 0.02 * rng.random(2000), naive)
    assert 0.4 < low < high < 0.55


def test_the_interval_is_wider_when_errors_come_in_bursts() -> None:
    """Blocks keep the correlation of neighbours: bursts make fewer independent rows, so a wider interval."""
    rng = np.random.default_rng(1)
    calm = rng.exponential(size=(2, 2000))
    bursts = np.repeat(rng.exponential(size=(2, 40)), 50, axis=1)
    widths = [high - low for low, high in (ratio_interval(*calm), ratio_interval(*bursts))]
    assert widths[1] > 3 * widths[0]


def test_a_clear_gain_is_proven_and_a_tiny_one_is_not() -> None:
    """The interval must lie below 0 and the gain be 1 % at least: a certain gain of half a percent is no reason."""
    naive = np.random.default_rng(2).exponential(size=1000)
    assert prove(0.9 * naive, naive, 2).holds
    tiny = prove(0.995 * naive, naive, 2)
    assert tiny.high < 0
    assert not tiny.holds
    assert not prove(1.1 * naive, naive, 2).holds


def test_more_attempts_need_a_stronger_proof() -> None:
    """Bonferroni: the interval widens with the number of models tried."""
    rng = np.random.default_rng(3)
    naive = rng.exponential(size=500)
    model = naive + rng.normal(-0.02, 0.3, 500)
    assert prove(model, naive, 10).high > prove(model, naive, 1).high


def test_chance_is_seldom_a_proof() -> None:
    """Of 200 models as good as the naive forecast, at most 5 % + 3 deviations are proven at one attempt each."""
    rng = np.random.default_rng(4)
    proven = 0
    for seed in range(200):
        naive = np.abs(rng.normal(size=400))
        proven += prove(np.abs(rng.normal(size=400)), naive, 1, seed).holds
    assert proven <= 200 * 0.05 + 3 * np.sqrt(200 * 0.05 * 0.95)


def test_confidence_is_a_measured_share() -> None:
    """The share of values within a quarter of the forecast; none where there are too few to say."""
    forecast = np.full(100, 8.0)
    actual = np.concatenate([np.full(40, 9.9), np.full(60, 10.1)])
    assert tolerance_share(actual, forecast) == pytest.approx(0.4)
    assert tolerance_share(actual[:19], forecast[:19]) is None


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (40, 2), (1000, 50), (100_000, 100)])
def test_blocks_are_a_twentieth_and_100_at_most(rows: int, length: int) -> None:
    """Twenty blocks is the compromise; 100 rows outlast the bursts seen."""
    assert block_length(rows) == length
