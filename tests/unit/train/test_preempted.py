"""The real trainer, a real network and the real gate: being held costs time and nothing else (goal G-F)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from corun.share.brakes import Mode
from corun.share.gates import PageGate
from corun.share.page import Page
from corun.testing.flicker import NEVER_STALE_NS, Flicker
from corun.train.options import TrainOptions
from corun.train.trainer import Trainer

JOB = TrainOptions(
    "shufflenet_v2_x1_0", data="drift", batch_size=8, image_size=32, count=32, lr=0.02, micro=2, seed=4
)
STEPS = 5


def _state(trainer: Trainer) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = [trainer.step().loss for _ in range(STEPS)]
    return losses, {name: value.clone() for name, value in trainer.trainable.module.state_dict().items()}


@pytest.mark.parametrize("layers", [False, True])
def test_preempted_training_ends_in_the_very_same_weights(tmp_path: Path, layers: bool) -> None:
    """Losses, weights and BatchNorm statistics after training that was held at micro-steps or layers are bit-identical
    to those of training that never was (one thread, the same micro-steps)."""
    torch.set_num_threads(1)
    job = replace(JOB, layer_gate=layers)
    with Page.create(tmp_path) as page:
        page.mode = Mode.PREEMPT
        gate = PageGate(page, stale_ns=NEVER_STALE_NS)
        with Flicker(page):
            losses, held = _state(Trainer(job, gate))
        assert gate.report()["gate_held"] > 0
    undisturbed, free = _state(Trainer(JOB))
    assert losses == undisturbed
    assert held.keys() == free.keys()
    assert all(torch.equal(value, free[name]) for name, value in held.items())
