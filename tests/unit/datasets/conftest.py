"""Pictures to build miniature data sets from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from corun import images


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def picture() -> Callable[..., Path]:
    """Write a made picture at a path, making its folders; returns the path."""

    def write(path: Path, height: int = 40, width: int = 60, seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.made_image(seed, height, width)).save(path)
        return path

    return write
