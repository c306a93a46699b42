"""Forecasts the next request and the load of the coming windows, and says when a plain average does as well.

data         traces as arrays: BurstGPT by column name, Azure LLM 2023; hashes, samples, warnings
series       causal rows of features and targets, dense windows, splits by time
baselines    last value, medians, means, EWMA, seasonal: what every model is compared with
nets         LSTM and DLinear with quantile outputs; training is in `fitting`
conformal    intervals that cover, split and adaptive
scores       errors, skill against the best naive with its interval, the proof a recommendation needs
checkpoint   weights (weights_only) and a JSON card beside them
predictor    RequestPredictor: all of it behind five methods
forecast     LoadForecaster: the upper quantile of the coming load, for a sharing policy; no torch, no pandas
sharing      duty from load, and a virtual-time model of one service beside a throttled trainer
synthetic    made requests whose predictability is known

Names are imported on first use, so that a process that only needs `forecast` loads neither torch nor pandas.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from corun.predict.data import Requests, from_frame, read
    from corun.predict.forecast import LoadForecaster, LoadStream
    from corun.predict.predictor import RequestPredictor
    from corun.predict.sharing import DutyRule

__all__ = ["DutyRule", "LoadForecaster", "LoadStream", "RequestPredictor", "Requests", "from_frame", "read"]

_HOMES: Final = {
    "DutyRule": "sharing",
    "LoadForecaster": "forecast",
    "LoadStream": "forecast",
    "RequestPredictor": "predictor",
    "Requests": "data",
    "from_frame": "data",
    "read": "data",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"corun.predict.{_HOMES[name]}"), name)
