"""The trainer starts no new micro-step while a request is pending; what a request may meet is one micro-step.

trainer  ▮▮▮▮ ▮▮▮▮ ▮▮┊▮▮               ▮▮▮▮     residual of the running micro-step: at most its length g
request              ┊▲ arrives ████ reply ┊    mean E[g^2] / 2E[g] if it meets the trainer at work
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from corun.errors import InputError
from corun.share.brakes import Mode
from corun.share.policy import Kind, Policy, Rule


@dataclass
class Preempt(Policy):
    """micro: micro-batches a step is cut into. layers: also stop between layers (no torch.compile, no CUDA graphs).

    max_wait_ms: how long requests may hold the trainer at one stop; 0 = as long as any is pending. slo_ms: above 0
    the parts are chosen while running, from the finest (micro_max) to the coarsest that keeps this p99.
    """

    micro: int = 4
    layers: bool = False
    max_wait_ms: float = 0.0
    slo_ms: float = 0.0
    micro_max: int = 16

    name: ClassVar[str] = "preempt"
    kind: ClassVar[Kind] = "stops"
    summary: ClassVar[str] = "the trainer yields at micro-step or layer boundaries while a request is pending"
    live: ClassVar[bool] = True

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}; it must be {least} or more"
            for name, least in (("micro", 1), ("micro_max", 1), ("max_wait_ms", 0), ("slo_ms", 0))
            if getattr(self, name) < least
        ]
        if problems:
            raise InputError("preempt cannot be set up so", problems)

    def rule(self) -> Rule | None:
        options = {"max_wait_ms": self.max_wait_ms} if self.max_wait_ms else {}
        if not self.slo_ms:
            return Rule(mode=Mode.PREEMPT, options=options, micro=self.micro, layers=self.layers)
        options |= {"slo_ms": self.slo_ms, "micro_max": self.micro_max}
        return Rule(Mode.PREEMPT | Mode.SLACK, options, layers=self.layers)
