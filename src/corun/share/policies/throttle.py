"""A duty cycle: after dt of work the trainer rests dt * (1 / duty - 1), whatever the services do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from corun.errors import InputError
from corun.share.policy import Kind, Policy, Rule


@dataclass
class Throttle(Policy):
    """duty: share of the time the trainer works. It lowers how often a request meets the trainer, not how long it waits."""

    duty: float = 0.5

    name: ClassVar[str] = "throttle"
    kind: ClassVar[Kind] = "duty"
    summary: ClassVar[str] = "duty cycle of the trainer"
    live: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.duty <= 1:
            raise InputError(f"duty is {self.duty}; it must be above 0 and at most 1")

    def rule(self) -> Rule | None:
        return Rule(duty=self.duty)
