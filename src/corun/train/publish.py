"""Publishing while training: every few seconds the newest held-out labelled arrivals decide what is in service.

    candidate (the trainer's weights now)      clearly better than what serves   ->  publish it
    in service (published last)                clearly worse than what it replaced -> roll back
    previous (what it replaced)                otherwise                         ->  leave it

All three answer the same arrivals, and "clearly" is `gain` of them, at least one: a version that is worse, or no better,
is never published. After a roll-back the trainer goes on from the weights that serve again, with a fresh optimiser.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from corun.clock import NS_PER_MS, NS_PER_S, now_ns
from corun.errors import InputError
from corun.torch_tools import load_strict
from corun.train.arrivals import ArrivalBatches
from corun.train.micro import STEP
from corun.train.options import PublishOptions
from corun.weights import Versions

if TYPE_CHECKING:
    from corun.train.trainer import Trainer

EVALUATED_TOGETHER = 32

Verdict = Literal["wait", "publish", "keep", "rollback"]
Event = Callable[[str, str], None]


@dataclass(frozen=True)
class Scores:
    """Right answers out of `samples`; previous is None when there is nothing to roll back to."""

    samples: int
    candidate: int
    service: int
    previous: int | None = None


def decide(scores: Scores, gain: float, least: int) -> Verdict:
    """What to do with these scores; `wait` below `least` samples."""
    if scores.samples < least:
        return "wait"
    clearly = max(1, math.ceil(gain * scores.samples))
    best = max(scores.candidate, scores.previous or 0)
    if scores.previous is not None and scores.previous == best and scores.previous - scores.service >= clearly:
        return "rollback"
    return "publish" if scores.candidate - scores.service >= clearly else "keep"


@dataclass(frozen=True)
class _Version:
    number: int
    state: dict[str, Any]


class Publisher:
    """Publishes from one trainer into one directory.

    Its first act is to agree with the service: it takes up the version the directory points to, or publishes the
    trainer's own weights as the first one. Raises InputError when the trainer has no labelled arrivals.
    """

    def __init__(self, trainer: Trainer, options: PublishOptions, event: Event) -> None:
        if not isinstance(trainer.batches, ArrivalBatches):
            raise InputError("publishing needs labelled arrivals to validate on")
        self._trainer = trainer
        self._batches = trainer.batches
        self._options = options
        self._event = event
        self._versions = Versions(Path(options.directory))
        self._module = trainer.trainable.module
        self._shadow = copy.deepcopy(self._module)
        self._next_ns = 0
        self._previous: _Version | None = None
        self._service = self._agree()

    def _agree(self) -> _Version:
        pointer = self._versions.current()
        if pointer is not None:
            card, state = self._versions.read(pointer.version)
            load_strict(self._module, state, self._versions.tensors_path(pointer.version))
            self._event("resume", f"version {pointer.version}, {card.model}, step {card.step}")
            return _Version(pointer.version, self._state())
        card = self._versions.publish(self._state(), self._trainer.options.model, self._trainer.steps_done)
        self._event("publish", f"version {card.version}: the weights training starts from")
        return _Version(card.version, self._state())

    def after_step(self) -> Verdict | None:
        """Between two steps: validate when it is time to, and act; the verdict, None when it was not time."""
        if now_ns() < self._next_ns:
            return None
        scores = self._scores()
        verdict = decide(scores, self._options.gain, self._options.least) if scores else "wait"
        if scores and verdict != "wait":
            self._act(verdict, scores)
        self._next_ns = now_ns() + round(self._options.every_s * NS_PER_S)
        return verdict

    def _scores(self) -> Scores | None:
        found = self._batches.validation(self._options.samples, now_ns())
        if found is None or len(found[1]) < self._options.least:
            return None
        return Scores(
            len(found[1]),
            self._right(self._module, *found),
            self._right_of(self._service, *found),
            None if self._previous is None else self._right_of(self._previous, *found),
        )

    def _right_of(self, version: _Version, pictures: torch.Tensor, classes: torch.Tensor) -> int:
        self._shadow.load_state_dict(version.state)
        return self._right(self._shadow, pictures, classes)

    def _right(self, module: torch.nn.Module, pictures: torch.Tensor, classes: torch.Tensor) -> int:
        """Right answers, in parts between which the gate may hold the trainer as before a step."""
        device, right = self._trainer.options.device, 0
        module.eval()
        with torch.inference_mode():
            for begin in range(0, len(classes), EVALUATED_TOGETHER):
                self._trainer.gate.wait(STEP)
                part = slice(begin, begin + EVALUATED_TOGETHER)
                answers = module(pictures[part].to(device)).argmax(1).cpu()
                right += int((answers == classes[part]).sum())
        module.train()
        return right

    def _act(self, verdict: Verdict, scores: Scores) -> None:
        shown = f"{scores.candidate} of {scores.samples} right, version {self._service.number} {scores.service}"
        if self._previous is not None:
            shown += f", version {self._previous.number} {scores.previous}"
        if verdict == "publish":
            self._publish(scores, shown)
        elif verdict == "rollback":
            self._roll_back(shown)
        else:
            self._event("validate", f"candidate {shown}: kept")

    def _publish(self, scores: Scores, shown: str) -> None:
        began, state = now_ns(), self._state()
        card = self._versions.publish(
            state,
            self._trainer.options.model,
            self._trainer.steps_done,
            scores.candidate / scores.samples,
            scores.samples,
        )
        self._previous, self._service = self._service, _Version(card.version, state)
        taken_ms = (now_ns() - began) / NS_PER_MS
        self._event("publish", f"version {card.version}: {shown}; step {card.step}, written in {taken_ms:.0f} ms")

    def _roll_back(self, shown: str) -> None:
        previous = self._previous
        assert previous is not None
        self._versions.roll_back(previous.number)
        self._event("rollback", f"version {self._service.number} to {previous.number}: candidate {shown}")
        self._service, self._previous = previous, None
        self._trainer.restart_from(previous.state)

    def _state(self) -> dict[str, Any]:
        return {name: value.detach().cpu().clone() for name, value in self._module.state_dict().items()}
