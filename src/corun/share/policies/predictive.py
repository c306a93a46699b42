"""Feed-forward: a forecast of the arrival rate says how much of the machine to leave free before requests come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from corun.share.brakes import Mode
from corun.share.controllers import FLOOR
from corun.share.forecast import Headroom, make_forecaster
from corun.share.policy import Kind, Policy, Rule


@dataclass
class Predictive(Policy):
    """low, high: forecast utilisation at which training begins to yield, and is down to the floor.

    forecaster: ewma, or MODULE:FUNCTION, e.g. corun.predict.forecast:from_history, which learns the upper quantile
    of the load from the past trace `history`. forecast_s: length of a forecast window.
    micro_max: finest split of a step before the duty is lowered; 0 = by the device (corun.share.policy.finest).
    """

    forecaster: str = "ewma"
    history: str = ""
    forecast_s: float = 1.0
    low: float = 0.2
    high: float = 0.7
    floor: float = FLOOR
    micro_max: int = 0

    name: ClassVar[str] = "predictive"
    kind: ClassVar[Kind] = "forecast"
    summary: ClassVar[str] = "a forecast of the load sets effort before the requests come"
    live: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Headroom(self.low, self.high, self.floor)
        make_forecaster(self.forecaster, self.forecast_s, self.history)

    def rule(self) -> Rule | None:
        names = ("forecaster", "history", "forecast_s", "low", "high", "floor", "micro_max")
        return Rule(mode=Mode.PREDICTIVE, options={name: getattr(self, name) for name in names})
