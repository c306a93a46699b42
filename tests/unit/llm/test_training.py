"""ChatGLM2 in the trainer that trains every model: rows, resuming, micro-batches, what a checkpoint holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from corun.errors import InputError
from corun.train.options import TrainOptions
from corun.train.trainer import Trainer

JOB = TrainOptions(model="chatglm2", batch_size=4, count=16, lr=0.01, optimizer="adamw", epochs=0)


def losses(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.step().loss for _ in range(steps)]


def test_the_loss_falls_and_only_the_adapter_learns() -> None:
    """Every parameter that moves is a LoRA matrix."""
    trainer = Trainer(JOB)
    network = trainer.trainable.module.network
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    seen = losses(trainer, 8)
    moved = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    assert seen[-1] < seen[0]
    assert moved
    assert all("lora_" in name for name in moved)


def test_micro_batches_make_the_step_of_the_whole_batch() -> None:
    """Labels differ in length; the losses of a batch cut in three are those of the whole one."""
    whole, cut = losses(Trainer(JOB), 4), losses(Trainer(replace(JOB, micro=3)), 4)
    assert cut == pytest.approx(whole, rel=1e-4)


def test_a_resumed_job_has_the_losses_of_one_that_ran_through(tmp_path: Path) -> None:
    """Bit for bit; the checkpoint holds the adapter and no base."""
    through, stopped = Trainer(JOB), Trainer(replace(JOB, checkpoint=tmp_path / "c.pt"))
    expected = losses(through, 6)
    losses(stopped, 3)
    stopped.save(tmp_path / "c.pt")
    state: Any = torch.load(tmp_path / "c.pt", weights_only=True)
    assert all("lora_" in name for name in state["model"])
    resumed = Trainer(replace(JOB, checkpoint=tmp_path / "c.pt", resume=True))
    assert losses(resumed, 3) == expected[3:]


def test_a_checkpoint_of_another_rank_is_refused(tmp_path: Path) -> None:
    """It says what does not fit."""
    trainer = Trainer(replace(JOB, extra={"rank": 4}))
    trainer.save(tmp_path / "c.pt")
    with pytest.raises(InputError, match="same form"):
        Trainer(replace(JOB, checkpoint=tmp_path / "c.pt", resume=True))


def test_wrong_training_options_are_named() -> None:
    """An option of a service is none of a training job."""
    with pytest.raises(InputError) as refused:
        Trainer(replace(JOB, extra={"limit": 5, "dropout": 2.0}))
    assert len(refused.value.problems) == 2
