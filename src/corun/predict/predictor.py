"""RequestPredictor: fit, save, load, forecast the next request, forecast the load of the coming windows.

    predictor = RequestPredictor(model_dir="models")
    predictor.fit(pd.read_csv("trace.csv"))
    predictor.save()
    RequestPredictor(model_dir="models").predict_next_request(pd.read_csv("trace.csv"))

A fresh object loads the newest trained models of its directory by itself. Where there are none, or the history does
not suffice, the answer is a map with `error`: nothing else ever appears under a model's name. Beside the models there
is always the best naive forecast, and a model is recommended only where validation proved it better.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from corun import __version__, registry
from corun.errors import CorunError, InputError, RunFault, suggest
from corun.predict import checkpoint, rates
from corun.predict.baselines import forecasts
from corun.predict.checkpoint import Saved
from corun.predict.data import NS, Requests, from_frame
from corun.predict.fitting import OnEpoch, Settings, settings_for
from corun.predict.levels import BASELINE, Level, LevelModel, fit, recommend
from corun.predict.nets import NETS
from corun.predict.scores import TOLERANCE
from corun.predict.series import REQUEST_FIELDS, RESPONSE_LAG_S, WINDOW_FIELDS, Series, request_series, window_series
from corun.torch_tools import resolve_device

__all__ = ["RequestPredictor", "default_model_dir"]

Floats = NDArray[np.float64]
History: TypeAlias = pd.DataFrame | Requests

MODELS: Final = ("lstm", "dlinear")
WINDOW_ROWS: Final = 12
WINDOW_HORIZON: Final = 6
WINDOW_MINIMUM: Final = 5
QUANTILE_NAMES: Final = ("q10", "q50", "q90")


def default_model_dir() -> Path:
    """$CORUN_MODEL_DIR, else models/ of the checkout."""
    return Path(os.environ.get("CORUN_MODEL_DIR") or registry.home() / "models")


class RequestPredictor:
    """Forecasts by LSTM and DLinear, with the best naive forecast beside them.

    Args:
        model_dir: where models are saved and looked up; default $CORUN_MODEL_DIR, else models/ of the checkout.
        models: which to train or load: lstm, dlinear.
        seq_len: rows of input; None = 100 on CUDA, 80 on CPU. A loaded model keeps the one it was trained with.
        device: auto, cpu, cuda or cuda:N.
        interval: nominal coverage of the intervals. A loaded model keeps its own.
        window_s: length of the windows whose load `fit` learns too.
        response_lag_s: when a response counts as known if the trace does not record its duration.
        settings: epochs, batch_size, lr, patience or seed, where they differ from the device's defaults.

    Raises InputError for a setting that cannot be used.
    """

    def __init__(
        self,
        model_dir: str | Path | None = None,
        models: Sequence[str] = MODELS,
        seq_len: int | None = None,
        device: str = "auto",
        interval: float = 0.9,
        *,
        window_s: float = 10.0,
        response_lag_s: float = RESPONSE_LAG_S,
        **settings: Any,
    ) -> None:
        unknown = [name for name in models if name not in NETS]
        if unknown or not models:
            problems = [f'"{name}" is not a model{suggest(name, NETS)}' for name in unknown]
            raise InputError(f"models must be some of {', '.join(NETS)}", problems)
        self.model_dir = Path(model_dir) if model_dir is not None else default_model_dir()
        self.models = tuple(dict.fromkeys(models))
        self.window_s = window_s
        self.response_lag_s = response_lag_s
        given = {name: value for name, value in settings.items() if value is not None}
        wanted = {"interval": interval} | ({} if seq_len is None else {"seq_len": seq_len}) | given
        self.settings: Settings = replace(settings_for(resolve_device(device)), **wanted)
        self.outcome: dict[str, Level] = {}
        self.not_fitted: dict[str, str] = {}
        self.facts: dict[str, Any] = {}
        self._levels: dict[str, dict[str, LevelModel]] = {}
        self._window_of: dict[str, float] = {}
        self._missing: dict[str, str] = {}
        self._sample: dict[str, Series] = {}

    @property
    def trained(self) -> tuple[str, ...]:
        """The models that can forecast now."""
        return tuple(self._levels)

    def fit(self, history: History, on_epoch: OnEpoch | None = None) -> Mapping[str, Level]:
        """Train and judge all models on single requests, and on windows where there are enough of them.

        Returns the outcome by level: "request" and, if it could be fitted, "window" (see `not_fitted` for why not).
        Raises InputError when the rows cannot be used or are too few, RunFault when training diverges.
        """
        requests = _requests(history)
        series = request_series(requests, self.response_lag_s)
        self.outcome = {"request": fit(series, self.models, self.settings, on_epoch=on_epoch)}
        self._sample, self.not_fitted = {"request": series}, {}
        self._fit_windows(requests, on_epoch)
        self._levels = {
            name: {level: outcome.models[name] for level, outcome in self.outcome.items()} for name in self.models
        }
        self._window_of = dict.fromkeys(self.models, self.window_s)
        self._missing = {}
        self.facts = self._facts(requests)
        return self.outcome

    def save(self, prefix: str = "request", now: datetime | None = None) -> list[Path]:
        """Write every trained model as `<model_dir>/<prefix>_<model>_<stamp>.pth` with its card; returns the paths.

        Raises InputError when nothing was fitted or the directory cannot be written.
        """
        if not self.outcome:
            raise InputError("there is nothing to save: call fit first")
        stamp = checkpoint.stamp_for(self.model_dir, prefix, self.models, now or datetime.now())
        paths = []
        for name in self.models:
            path = self.model_dir / f"{prefix}_{name}_{stamp}.pth"
            checkpoint.save(path, name, self._levels[name], self.facts | self._results(name))
            paths.append(path)
        return paths

    def load(self, paths: Sequence[str | Path] = ()) -> tuple[str, ...]:
        """Load these checkpoints, or the newest of every model in the directory; returns the models loaded.

        Raises InputError when there are none, or one is damaged.
        """
        found = [Path(path) for path in paths] or self._newest()
        if not found:
            wanted = " or ".join(self.models)
            raise InputError(
                f"no trained models: {self.model_dir} holds no {wanted} checkpoint; "
                "train with src/cpu_training.py or src/production_training.py, or give another model directory"
            )
        saved = [checkpoint.load(path, self.settings.device) for path in found]
        self._adopt(saved)
        return self.trained

    def verify(self, paths: Sequence[Path], rows: int = 256) -> None:
        """Reload saved models and forecast the last `rows` rows again; RunFault unless every number is identical."""
        copy = RequestPredictor(self.model_dir, self.models, device=self.settings.device)
        copy.load(paths)
        if copy.trained != self.trained:
            raise RunFault(f"reloading gave {', '.join(copy.trained) or 'nothing'}, not {', '.join(self.trained)}")
        for name, levels in self._levels.items():
            for level, model in levels.items():
                series = self._sample[level]
                last = np.arange(max(len(series) - rows, model.trained.shape.length), len(series) + 1)
                again = copy._levels[name].get(level)
                if again is None or not np.array_equal(model.levels(series, last), again.levels(series, last)):
                    raise RunFault(f"{name}: the reloaded {level} model does not forecast what the saved one did")

    def predict_next_request(self, history: History) -> dict[str, Any]:
        """Forecast when the next request comes and how large it is.

        Returns `predictions` by model (timestamp, inter_arrival_s, request_tokens, response_tokens, confidence,
        interval: field -> [low, high], method, trained), `baseline` with the same keys, `recommended` (a model or
        "baseline"), `recommended_by_field`, and `missing` (model -> why) where a requested model is not there.
        A map with the single key `error` when nothing is trained or the history cannot be used.
        """
        try:
            requests = _requests(history)
            self._ensure()
            series = request_series(requests, self.response_lag_s)
            levels = {name: found["request"] for name, found in self._levels.items()}
            answer = {name: self._next(model, requests, series) for name, model in levels.items()}
            newest = next(iter(levels.values()))
            result: dict[str, Any] = {
                "predictions": answer,
                "baseline": self._next_baseline(newest, requests, series),
                "recommended": recommend(levels),
                "recommended_by_field": {
                    field.name: _recommended_field(levels, field.name) for field in REQUEST_FIELDS
                },
            }
        except CorunError as error:
            return {"error": str(error)}
        return result | ({"missing": self._missing} if self._missing else {})

    def predict_rate(
        self, history: History, window_s: float = 10.0, horizon: int = 1, now_s: float | None = None
    ) -> dict[str, Any]:
        """Forecast requests and tokens of the `horizon` windows of `window_s` seconds after the history's end.

        now_s: seconds after the history's last request at which the windows begin; default 0.
        Each window has `start` and, for `requests` and `tokens`, mean, q10, q50, q90 and method. The forecast comes
        from the history alone; a trained model takes its place where validation proved it better at this `window_s`.
        A map with the single key `error` when the history cannot be used.
        """
        try:
            requests = _requests(history)
            now_ns = int(requests.t_ns[-1]) + round((now_s or 0.0) * NS)
            plain = rates.forecast(requests, window_s, horizon, now_ns, self.response_lag_s)
            model = self._window_model(window_s)
            learned = None if model is None else self._learned_rates(model, requests, window_s, now_ns)
        except CorunError as error:
            return {"error": str(error)}
        windows = []
        for ahead in range(horizon):
            start = requests.stamp(now_ns + round(ahead * window_s * NS))
            entry: dict[str, Any] = {"start": start}
            for field in WINDOW_FIELDS:
                by_model = learned is not None and ahead < learned[field.name].mean.size
                rate = learned[field.name] if learned is not None and by_model else plain[field.name]
                numbers = [float(value) for value in rate.quantiles[ahead]]
                entry[field.name] = {"mean": float(rate.mean[ahead])} | dict(
                    zip(QUANTILE_NAMES, numbers, strict=True)
                )
                entry[field.name]["method"] = rate.method
            windows.append(entry)
        return {"window_s": window_s, "horizon": horizon, "windows": windows}

    def _fit_windows(self, requests: Requests, on_epoch: OnEpoch | None) -> None:
        series = window_series(requests, self.window_s, self.response_lag_s)
        try:
            self.outcome["window"] = fit(
                series,
                self.models,
                self.settings,
                horizon=WINDOW_HORIZON,
                length=WINDOW_ROWS,
                minimum=WINDOW_MINIMUM,
                on_epoch=on_epoch,
            )
            self._sample["window"] = series
        except InputError as error:
            self.not_fitted["window"] = f"windows of {self.window_s:g} s: {error}"

    def _facts(self, requests: Requests) -> dict[str, Any]:
        settings, source = self.settings, requests.source
        return {
            "created": datetime.now().astimezone().isoformat(timespec="seconds"),
            "versions": {"corun": __version__, "torch": str(torch.__version__), "numpy": np.__version__},
            "settings": {name: getattr(settings, name) for name in Settings.__dataclass_fields__},
            "seeds": {"weights": settings.seed, "shuffle": settings.seed, "bootstrap": 0},
            "window_s": self.window_s,
            "response_lag_s": None if requests.elapsed_s is not None else self.response_lag_s,
            "data": {
                "path": source.path,
                "sha256": source.sha256,
                "release": source.release,
                "format": requests.format,
                "rows": len(requests),
                "rows_in_file": source.rows_in_file or len(requests),
                "first": requests.stamp(int(requests.t_ns[0])),
                "last": requests.stamp(int(requests.t_ns[-1])),
                "warnings": requests.warnings(),
            },
            "tolerance": TOLERANCE,
            "not_fitted": self.not_fitted,
        }

    def _results(self, name: str) -> dict[str, Any]:
        """Split, scores and learning curve of one model, by level."""
        results = {}
        for level, outcome in self.outcome.items():
            t_ns, curve = self._sample[level].t_ns, outcome.curves[name]
            results[level] = {
                "split": {
                    part: {"rows": [rows.start, rows.stop], "t_ns": [int(t_ns[rows.start]), int(t_ns[rows.stop - 1])]}
                    for part, rows in vars(outcome.parts).items()
                },
                "test": {field: score.as_dict() for field, score in outcome.scores[name].items()},
                "test_baseline": {field: score.as_dict() for field, score in outcome.scores[BASELINE].items()},
                "test_mae_of_every_naive": outcome.all_naive,
                "test_mae_by_horizon": outcome.by_horizon[name],
                "test_mae_by_day": outcome.by_day[name],
                "learning": {"train": curve.train, "early": curve.early, "best_epoch": curve.best_epoch},
                "seconds": curve.seconds,
                "recommended": outcome.recommended,
            }
        return {"results": results}

    def _newest(self) -> list[Path]:
        found = [checkpoint.newest(self.model_dir, name) for name in self.models]
        return [path for path in found if path is not None]

    def _adopt(self, saved: Sequence[Saved]) -> None:
        by_age = sorted(saved, key=lambda one: str(one.card.get("created", "")), reverse=True)
        self._levels = {one.name: dict(one.levels) for one in by_age if "request" in one.levels}
        self._window_of = {one.name: float(one.card["window_s"]) for one in by_age}
        known = ", ".join(self._levels) or "none"
        self._missing = {
            name: f"no checkpoint in {self.model_dir} (trained: {known})"
            for name in self.models
            if name not in self._levels
        }
        lags = [one.card["response_lag_s"] for one in by_age if one.card.get("response_lag_s") is not None]
        self.response_lag_s = float(lags[0]) if lags else self.response_lag_s
        self.facts = dict(by_age[0].card)

    def _ensure(self) -> None:
        if not self._levels:
            self.load()

    def _next(self, model: LevelModel, requests: Requests, series: Series) -> dict[str, Any]:
        length = model.trained.shape.length
        if len(series) < length:
            raise InputError(f"the history has {len(requests)} rows; {model.trained.name} needs {length + 1}")
        levels = model.levels(series, np.array([len(series)]))[0, 0]
        nominal = model.trained.levels[4] - model.trained.levels[0]
        method = f"{model.trained.name}, median of its quantiles from {length} rows; split conformal {nominal:.0%}"
        return _prediction(requests, levels, model.confidence, method, trained=True)

    def _next_baseline(self, model: LevelModel, requests: Requests, series: Series) -> dict[str, Any]:
        state = forecasts(series, model.naive)[-1, 0]
        logs = np.array([field.to_log(state[place]) for place, field in enumerate(series.fields)])
        levels = series.from_log(logs[:, None] + model.spread[0])
        method = ", ".join(
            f"{field.name}: {naive.label}" for field, naive in zip(series.fields, model.naive, strict=True)
        )
        return _prediction(requests, levels, model.baseline_confidence, method, trained=False)

    def _window_model(self, window_s: float) -> LevelModel | None:
        """The recommended window model for this window length, if any is trained."""
        if not self._levels and self._newest():
            self.load()
        fitting = {
            name: levels["window"]
            for name, levels in self._levels.items()
            if "window" in levels and self._window_of[name] == window_s
        }
        return fitting.get(recommend(fitting))

    def _learned_rates(
        self, model: LevelModel, requests: Requests, window_s: float, now_ns: int
    ) -> dict[str, rates.Rate] | None:
        series = window_series(requests, window_s, self.response_lag_s, now_ns)
        shape = model.trained.shape
        if len(series) < shape.length or series.features.shape[1] != shape.channels:
            return None
        levels = model.levels(series, np.array([len(series)]))[0]
        return {
            field.name: rates.Rate(
                model.trained.name,
                np.maximum(levels[:, place, 2] + model.bias[:, place], 0.0),
                levels[:, place, 1:4],
            )
            for place, field in enumerate(WINDOW_FIELDS)
        }


def _requests(history: History) -> Requests:
    if isinstance(history, Requests):
        return history
    if not isinstance(history, pd.DataFrame):
        raise InputError(f"the history is a {type(history).__name__}; give a pandas table as pd.read_csv returns it")
    return from_frame(history, "the history")


def _prediction(
    requests: Requests, levels: Floats, confidence: float | None, method: str, *, trained: bool
) -> dict[str, Any]:
    """One forecast in the documented form; levels: (3, 5) raw."""
    gap_s = float(levels[0, 2])
    middle = {field.name: float(levels[place, 2]) for place, field in enumerate(REQUEST_FIELDS)}
    ends = {
        field.name: [float(levels[place, 0]), float(levels[place, 4])] for place, field in enumerate(REQUEST_FIELDS)
    }
    return {
        "timestamp": requests.stamp(int(requests.t_ns[-1]) + round(gap_s * NS)),
        **middle,
        "confidence": confidence,
        "interval": ends,
        "method": method,
        "trained": trained,
    }


def _recommended_field(models: Mapping[str, LevelModel], field: str) -> str:
    """The model with the largest proven gain on one field, else the baseline."""
    gains = {
        name: model.field_proofs[field].gain for name, model in models.items() if model.field_proofs[field].holds
    }
    return max(gains, key=gains.__getitem__) if gains else BASELINE
