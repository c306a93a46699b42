"""The handwritten digits: the right table, a split by seed, and a network learns them in seconds."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import default_collate

from corun import registry
from corun.errors import InputError
from corun.registry import DataOptions

digits = registry.load_plugin("datasets", "digits")
OPTIONS = DataOptions(image_size=32, count=5)


def test_the_table_is_scikit_learns() -> None:
    """Pictures and labels equal `sklearn.datasets.load_digits`, scaled from 0..16 to 0..255."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    pictures, labels = digits.table()
    assert np.array_equal(labels, loaded.target)
    assert np.array_equal(pictures, (loaded.images * 255 // 16).astype(np.uint8))


@given(st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_the_splits_part_the_table(seed: int) -> None:
    """For any seed, train and test are disjoint, together complete, and test is a fifth."""
    options = dataclasses.replace(OPTIONS, seed=seed)
    train, test = (digits.indices(options, split) for split in ("train", "test"))
    assert sorted(train + test) == list(range(1797))
    assert len(test) == 360


def test_requests_name_digit_and_row() -> None:
    """A payload's name says which digit it shows and its row; rows are of the test split."""
    test = set(digits.indices(OPTIONS, "test"))
    labels = digits.table()[1]
    for payload in digits.requests(OPTIONS):
        digit, row = payload.name.removeprefix("digit").split("-")
        assert int(row) in test
        assert int(digit) == labels[int(row)]


def test_it_is_learnable() -> None:
    """A small convolutional network halves its loss within forty SGD steps of 32."""
    data = digits.training(dataclasses.replace(OPTIONS, image_size=16))
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(784, data.num_classes)
    )
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(40):
        pixels, labels = default_collate([data[i] for i in range(step * 32, step * 32 + 32)])
        loss = torch.nn.functional.cross_entropy(network(pixels), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])


def test_an_unknown_split_is_named() -> None:
    """Only train and test exist."""
    with pytest.raises(InputError, match='did you mean "test"'):
        digits.training(dataclasses.replace(OPTIONS, split="tests"))


def test_without_scikit_learn_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package to install is named."""
    digits.table.cache_clear()
    monkeypatch.setattr(digits, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        digits.requests(OPTIONS)
    assert importlib.util.find_spec("sklearn") is not None
