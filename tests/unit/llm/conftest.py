"""One tiny base for all tests of corun.llm."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from corun.llm.base import load_base


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base() -> Any:
    """A tiny random base, fp32 on the CPU."""
    return load_base()
