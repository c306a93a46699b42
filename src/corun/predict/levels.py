"""Fits and judges all models on one series: best naive forecast, nets, intervals, scores, proof, recommendation.

    train ── nets learn ── early ── │ validation: naive chosen, proof │ calibration: offsets │ test: scores

A level is either single requests or windows of fixed length. Its outcome carries everything a checkpoint stores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from corun.predict import conformal, scores
from corun.predict.baselines import Naive, choose, errors_of_all, forecasts
from corun.predict.data import NS
from corun.predict.fitting import Curve, OnEpoch, Settings, Trained, part_rows, train
from corun.predict.scores import Proof, Score
from corun.predict.series import DAY_S, Parts, Series, split

__all__ = ["BASELINE", "Level", "LevelModel", "Shown", "fit"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BASELINE: Final = "baseline"


@dataclass(frozen=True)
class LevelModel:
    """One net and what surrounds its forecasts.

    naive: the best naive forecast of each target; spread (H, T, 5): what turns it into levels, in logs; offsets
    (H, T, 2): the net's conformal offsets, in logs; bias (H, T): mean of actual - median on calibration, raw;
    proof, field_proofs: on validation; confidence: see scores.TOLERANCE.
    """

    trained: Trained
    naive: tuple[Naive, ...]
    spread: Floats
    offsets: Floats
    bias: Floats
    proof: Proof
    field_proofs: Mapping[str, Proof]
    validation_mase: float
    confidence: float | None
    baseline_confidence: float | None

    def levels(self, series: Series, rows: Ints) -> Floats:
        """(m, H, T, 5) raw: lower end, q10, median, q90, upper end, conformal."""
        return series.from_log(self.conformal(self.trained.at(series, rows)))

    def conformal(self, logs: Floats) -> Floats:
        """Widen the ends by the offsets."""
        out = logs.copy()
        out[..., 0] -= self.offsets[..., 0]
        out[..., 4] += self.offsets[..., 1]
        return out


@dataclass(frozen=True)
class Shown:
    """Test rows as they are plotted: actual (n, T) and (n, T, 5) levels by model."""

    t_ns: Ints
    actual: Floats
    levels: Mapping[str, Floats]


@dataclass(frozen=True)
class Level:
    """The outcome of one level."""

    parts: Parts
    models: Mapping[str, LevelModel]
    scores: Mapping[str, Mapping[str, Score]]
    by_horizon: Mapping[str, list[list[float]]]
    by_day: Mapping[str, list[dict[str, float]]]
    curves: Mapping[str, Curve]
    shown: Shown
    naive: tuple[Naive, ...]
    all_naive: Mapping[str, Mapping[str, float]]
    """Test MAE of every naive forecast by target: what hindsight would have chosen."""

    @property
    def recommended(self) -> str:
        """The proven model with the lowest validation MASE, else the naive forecast."""
        return recommend(self.models)


def recommend(models: Mapping[str, LevelModel]) -> str:
    """The name of the proven model with the lowest validation MASE, else "baseline"."""
    proven = {name: model for name, model in models.items() if model.proof.holds}
    return min(proven, key=lambda name: proven[name].validation_mase) if proven else BASELINE


def fit(
    series: Series,
    names: Sequence[str],
    settings: Settings,
    *,
    horizon: int = 1,
    length: int | None = None,
    minimum: int = 20,
    on_epoch: OnEpoch | None = None,
) -> Level:
    """Train every named net on a series and judge it against the best naive forecast.

    length: rows of input and of the gaps between parts, default settings.seq_len; minimum: rows a part must have.
    Raises InputError when the series is too short.
    """
    length = length or settings.seq_len
    parts = split(len(series), length, minimum + horizon)
    naive = choose(series, parts)
    judge = _Judge(series, parts, naive, settings.interval, horizon, len(names))
    models, curves = {}, {}
    for name in names:
        trained, curves[name] = train(name, series, parts, settings, horizon, length, on_epoch)
        models[name] = judge.model(trained)
    levels = {BASELINE: judge.baseline_levels(judge.test)}
    levels |= {name: model.levels(series, judge.test) for name, model in models.items()}
    adaptive = {name: judge.adaptive(models[name].trained.at) for name in models} | {BASELINE: judge.adaptive(None)}
    return Level(
        parts=parts,
        models=models,
        scores={name: judge.scores(values, adaptive[name]) for name, values in levels.items()},
        by_horizon={name: judge.by_horizon(values) for name, values in levels.items()},
        by_day={name: judge.by_day(values) for name, values in levels.items()},
        curves=curves,
        shown=Shown(
            series.t_ns[judge.test], series.targets[judge.test], {name: v[:, 0] for name, v in levels.items()}
        ),
        naive=naive,
        all_naive=_named(series, errors_of_all(series, parts, parts.test)),
    )


def _named(series: Series, tables: Sequence[Mapping[Naive, float]]) -> dict[str, dict[str, float]]:
    pairs = zip(series.fields, tables, strict=True)
    return {field.name: {naive.label: error for naive, error in table.items()} for field, table in pairs}


class _Judge:
    """The naive forecast of a series, its spread, and what every model is measured by."""

    def __init__(
        self, series: Series, parts: Parts, naive: tuple[Naive, ...], interval: float, horizon: int, attempts: int
    ) -> None:
        self.series, self.naive, self.interval, self.horizon = series, naive, interval, horizon
        self.attempts = attempts
        self.validation = part_rows(parts.validation, horizon)
        self.calibration = part_rows(parts.calibration, horizon)
        self.test = part_rows(parts.test, horizon)
        self.raw_naive = forecasts(series, naive, horizon)
        self.denominators = np.abs(np.diff(series.targets[parts.learning], axis=0)).mean(axis=0)
        self.spread = self._spread()

    def actual(self, rows: Ints) -> Floats:
        """(m, H, T) raw values that came."""
        return np.stack([self.series.targets[rows + ahead] for ahead in range(self.horizon)], axis=1)

    def log(self, values: Floats) -> Floats:
        fields = enumerate(self.series.fields)
        return np.stack([field.to_log(values[..., place]) for place, field in fields], axis=-1)

    def baseline_levels(self, rows: Ints) -> Floats:
        """(m, H, T, 5) raw levels of the naive forecast."""
        return self.series.from_log(self.log(self.raw_naive[rows])[..., None] + self.spread)

    def model(self, trained: Trained) -> LevelModel:
        """Calibrate a net and prove it or not."""
        logs, actual = trained.at(self.series, self.calibration), self.actual(self.calibration)
        log_actual = self.log(actual)
        offsets = np.empty((self.horizon, len(self.series.fields), 2))
        for ahead, target in np.ndindex(offsets.shape[:2]):
            pair = logs[:, ahead, target]
            offsets[ahead, target] = conformal.offsets(
                pair[:, 0], pair[:, 4], log_actual[:, ahead, target], self.interval
            )
        middle = self.series.from_log(logs)[..., 2]
        errors = self._scaled(self.series.from_log(trained.at(self.series, self.validation))[..., 2])
        naive_errors = self._scaled(self.raw_naive[self.validation])
        names = [field.name for field in self.series.fields]
        return LevelModel(
            trained=trained,
            naive=self.naive,
            spread=self.spread,
            offsets=offsets,
            bias=(actual - middle).mean(axis=0),
            proof=scores.prove(errors.mean(axis=1), naive_errors.mean(axis=1), self.attempts),
            field_proofs={
                name: scores.prove(errors[:, place], naive_errors[:, place], self.attempts * len(names))
                for place, name in enumerate(names)
            },
            validation_mase=float(errors.mean()),
            confidence=self._confidence(middle[:, 0], actual[:, 0]),
            baseline_confidence=self._confidence(self.raw_naive[self.calibration][:, 0], actual[:, 0]),
        )

    def adaptive(self, at: object) -> Floats:
        """(m, T, 2) raw ends of the online interval on test, one step ahead."""
        ends = np.empty((self.test.size, len(self.series.fields), 2))
        before, now = self._ends(at, self.calibration), self._ends(at, self.test)
        seen, coming = self.log(self.actual(self.calibration)[:, 0]), self.log(self.actual(self.test)[:, 0])
        for target in range(ends.shape[1]):
            low, high = before[:, target, 0], before[:, target, 1]
            history = (low - seen[:, target], seen[:, target] - high)
            online = conformal.adaptive(
                now[:, target, 0], now[:, target, 1], coming[:, target], history, self.interval
            )
            ends[:, target] = np.stack(online, axis=1)
        return self.series.from_log(ends)

    def scores(self, levels: Floats, adaptive: Floats) -> dict[str, Score]:
        """By target, one step ahead, on test."""
        actual = self.actual(self.test)[:, 0]
        return {
            field.name: scores.score(
                actual[:, place],
                levels[:, 0, place],
                self.raw_naive[self.test][:, 0, place],
                float(self.denominators[place]),
                (adaptive[:, place, 0], adaptive[:, place, 1]),
            )
            for place, field in enumerate(self.series.fields)
        }

    def by_horizon(self, levels: Floats) -> list[list[float]]:
        """MAE (H, T) on test."""
        return [[float(v) for v in row] for row in np.abs(self.actual(self.test) - levels[..., 2]).mean(axis=0)]

    def by_day(self, levels: Floats) -> list[dict[str, float]]:
        """MAE of each day of the test part, when the series spans more than two: rolling origin, weights kept."""
        t_ns = self.series.t_ns
        if float(t_ns[-1] - t_ns[0]) / NS <= 2 * DAY_S:
            return []
        days = t_ns[self.test] // round(DAY_S * NS)
        errors = np.abs(self.actual(self.test)[:, 0] - levels[:, 0, :, 2])
        names = [field.name for field in self.series.fields]
        table = []
        for day in np.unique(days):
            means = errors[days == day].mean(axis=0)
            row = {"day": float(day), "rows": float((days == day).sum())}
            table.append(row | {name: float(means[place]) for place, name in enumerate(names)})
        return table

    def _ends(self, at: object, rows: Ints) -> Floats:
        """(m, T, 2) lower and upper log forecasts before calibration; a naive forecast is both."""
        if callable(at):
            return np.asarray(at(self.series, rows)[:, 0][..., [0, 4]])
        return np.repeat(self.log(self.raw_naive[rows][:, 0])[..., None], 2, axis=-1)

    def _scaled(self, forecast: Floats) -> Floats:
        """(m, T) absolute validation errors over the last value's, mean over the horizon."""
        scale = np.where(self.denominators > 0, self.denominators, 1.0)
        return np.asarray((np.abs(self.actual(self.validation) - forecast) / scale).mean(axis=1))

    def _confidence(self, forecast: Floats, actual: Floats) -> float | None:
        shares = [scores.tolerance_share(actual[:, place], forecast[:, place]) for place in range(actual.shape[1])]
        return scores.mean_or_none(shares)

    def _spread(self) -> Floats:
        """(H, T, 5) log distances from the naive forecast to its levels, from calibration residuals."""
        actual, naive = self.log(self.actual(self.calibration)), self.log(self.raw_naive[self.calibration])
        out = np.zeros((self.horizon, len(self.series.fields), 5))
        for ahead, target in np.ndindex(out.shape[:2]):
            came, told = actual[:, ahead, target], naive[:, ahead, target]
            low, high = conformal.offsets(told, told, came, self.interval)
            inner = np.quantile(came - told, (0.1, 0.9))
            out[ahead, target] = (-low, inner[0], 0.0, inner[1], high)
        return out
