"""Errors of forecasts, skill against the best naive one, and the proof a recommendation needs.

    MASE   = MAE / MAE of the last value on train                       (Hyndman & Koehler 2006)
    skill  = 1 - MAE / MAE of the best naive forecast, chosen on validation
    proof  = the interval of (model - naive) scaled errors on validation lies below 0, and the gain is 1 % at least

Neighbouring errors share bursts, so intervals resample blocks of rows, not rows (moving blocks, Künsch 1989). When m
models are tried the interval of each is at level 1 - 0.05/m (Bonferroni), or trying would be enough to win.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Proof", "Score", "block_length", "prove", "ratio_interval", "score", "tolerance_share"]

Floats = NDArray[np.float64]

LEVEL: Final = 0.95
RESAMPLES: Final = 1000
LONGEST_BLOCK: Final = 100
BLOCKS: Final = 20
LEAST_GAIN: Final = 0.01
PINBALL_LEVELS: Final = (0.1, 0.5, 0.9)

TOLERANCE: Final = 0.25
"""`confidence` is the share of calibration rows whose value lay within this fraction of the forecast, either way."""


@dataclass(frozen=True)
class Score:
    """One target's errors on one part, in the target's own unit except mase, skill and coverages."""

    mae: float
    rmse: float
    median_ae: float
    mase: float
    skill: float
    skill_ci: tuple[float, float]
    coverage: float
    width: float
    coverage_adaptive: float | None
    width_adaptive: float | None
    pinball: dict[str, float]
    rows: int

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Proof:
    """Whether a model beat the best naive forecast on validation; gain = 1 - model error / naive error."""

    gain: float
    difference: float
    low: float
    high: float
    level: float
    rows: int

    @property
    def holds(self) -> bool:
        return self.high < 0 and self.gain >= LEAST_GAIN


def score(
    actual: Floats,
    levels: Floats,
    naive: Floats,
    denominator: float,
    adaptive: tuple[Floats, Floats] | None = None,
    seed: int = 0,
) -> Score:
    """Score forecasts of one target, all in raw units.

    actual: (n,); levels: (n, 5) = lower end, q10, median, q90, upper end; naive: (n,) the best naive forecast;
    denominator: the last value's MAE on train; adaptive: the online interval's ends (n,).
    """
    middle = levels[:, 2]
    error, naive_error = np.abs(actual - middle), np.abs(actual - naive)
    mae, naive_mae = float(error.mean()), float(naive_error.mean())
    inside = (levels[:, 0] <= actual) & (actual <= levels[:, 4])
    online = None if adaptive is None else (adaptive[0] <= actual) & (actual <= adaptive[1])
    return Score(
        mae=mae,
        rmse=float(np.sqrt(np.square(actual - middle).mean())),
        median_ae=float(np.median(error)),
        mase=mae / denominator if denominator else math.nan,
        skill=1 - mae / naive_mae if naive_mae else 0.0,
        skill_ci=ratio_interval(error, naive_error, seed),
        coverage=float(inside.mean()),
        width=float((levels[:, 4] - levels[:, 0]).mean()),
        coverage_adaptive=None if online is None else float(online.mean()),
        width_adaptive=None if adaptive is None else float((adaptive[1] - adaptive[0]).mean()),
        pinball={f"{q:g}": _pinball(actual, levels[:, k], q) for k, q in zip((1, 2, 3), PINBALL_LEVELS, strict=True)},
        rows=int(actual.size),
    )


def prove(model: Floats, naive: Floats, attempts: int, seed: int = 0) -> Proof:
    """Compare absolute errors (n,) of a model and of the best naive forecast, made comparable by the caller.

    attempts: how many models are tried on these rows.
    """
    level = 1 - (1 - LEVEL) / max(attempts, 1)
    sums = _block_sums(np.stack([model - naive]), seed)[0] / model.size
    low, high = (float(bound) for bound in np.quantile(sums, ((1 - level) / 2, (1 + level) / 2)))
    scale = float(naive.mean())
    difference = float((model - naive).mean())
    return Proof(-difference / scale if scale else 0.0, difference, low, high, level, int(model.size))


def ratio_interval(error: Floats, naive_error: Floats, seed: int = 0) -> tuple[float, float]:
    """95 % block-bootstrap interval of 1 - mean(error) / mean(naive_error)."""
    sums = _block_sums(np.stack([error, naive_error]), seed)
    safe = np.where(sums[1] > 0, sums[1], np.nan)
    skills = 1 - sums[0] / safe
    if np.isnan(skills).all():
        return (0.0, 0.0)
    low, high = np.nanquantile(skills, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def tolerance_share(actual: Floats, forecast: Floats) -> float | None:
    """Share of rows (n,) with |actual - forecast| <= 25 % of the forecast; None below 20 rows."""
    if actual.size < 20:
        return None
    return float((np.abs(actual - forecast) <= TOLERANCE * forecast).mean())


def block_length(rows: int) -> int:
    """Rows a block: a twentieth of them, 100 at most."""
    return max(1, min(LONGEST_BLOCK, math.ceil(rows / BLOCKS)))


def _block_sums(errors: Floats, seed: int) -> Floats:
    """(k, RESAMPLES) sums of (k, n) errors over resampled moving blocks, scaled to n rows."""
    rows = errors.shape[1]
    length = block_length(rows)
    running = np.concatenate([np.zeros((errors.shape[0], 1)), np.cumsum(errors, axis=1)], axis=1)
    blocks = running[:, length:] - running[:, :-length]
    count = math.ceil(rows / length)
    starts = np.random.default_rng(seed).integers(0, blocks.shape[1], (RESAMPLES, count))
    return np.asarray(blocks[:, starts].sum(axis=-1) * (rows / (count * length)))


def _pinball(actual: Floats, forecast: Floats, level: float) -> float:
    error = actual - forecast
    return float(np.maximum(level * error, (level - 1) * error).mean())


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are there."""
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None
