"""Tiny trained models, made once a test session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from corun.ectrans import parts, training


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Marian model directory whose answers end by themselves at real lengths."""
    return training.trained_tiny(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def trained_parts(trained: Path) -> Path:
    """The same model, split."""
    return parts.split(trained, trained.with_name("parts"))
