"""Made pictures: the class is visible, and counts are honoured."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corun import registry
from corun.registry import DataOptions

synthetic = registry.load_plugin("datasets", "synthetic")
OPTIONS = DataOptions(image_size=32, count=20)


def test_the_middle_pixel_shows_the_class() -> None:
    """Items of one class have the same colour in the middle, items of different classes do not."""
    data = synthetic.training(OPTIONS)
    middle = {i: data[i][0][:, 16, 16] for i in range(20)}
    assert data.num_classes == 10
    assert torch.equal(middle[3], middle[13])
    assert not torch.equal(middle[3], middle[4])


@given(st.integers(1, 12), st.integers(1, 8), st.integers(8, 40))
@settings(max_examples=20, deadline=None)
def test_any_count_class_number_and_size(count: int, classes: int, size: int) -> None:
    """There are `count` items of the size asked for, with labels below the number of classes asked for."""
    options = dataclasses.replace(OPTIONS, count=count, num_classes=classes, image_size=size)
    data = synthetic.training(options)
    image, label = data[count - 1]
    assert (len(data), data.num_classes) == (count, classes)
    assert image.shape == (3, size, size)
    assert label < classes


@pytest.mark.parametrize("task", sorted(synthetic.TASKS))
def test_every_task_is_repeatable(task: str) -> None:
    """Reading an item twice gives the same tensors."""
    data = synthetic.training(dataclasses.replace(OPTIONS, task=task))
    assert torch.equal(data[5][0], data[5][0])
