"""Feedback: the p99 of the last window against a latency bound decides how finely and how much is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from corun.errors import InputError
from corun.share.brakes import Mode
from corun.share.controllers import FLOOR, make_controller
from corun.share.policy import Kind, Policy, Rule


@dataclass
class Slo(Policy):
    """slo_ms: bound on the p99 of a window. controller: aimd or pi. floor: least effort, so training never starves.

    micro_max: finest split of a step before the duty is lowered; 0 = by the device (corun.share.policy.finest).
    margin: share of the bound to stay below.
    """

    slo_ms: float = 0.0
    controller: str = "aimd"
    window_s: float = 5.0
    margin: float = 0.8
    floor: float = FLOOR
    micro_max: int = 0

    name: ClassVar[str] = "slo"
    kind: ClassVar[Kind] = "duty"
    summary: ClassVar[str] = "feedback controller on the windowed p99"
    live: ClassVar[bool] = True

    def __post_init__(self) -> None:
        make_controller(self.controller, self.slo_ms, self.margin, self.floor)
        if self.window_s <= 0 or self.micro_max < 0:
            raise InputError(
                f"window_s is {self.window_s} and micro_max {self.micro_max}; windows are positive, parts not negative"
            )

    def rule(self) -> Rule | None:
        return Rule(mode=Mode.SLO, options=asdict(self))
