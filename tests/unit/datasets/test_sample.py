"""Photographs of installed packages: found without import, cropped inside, an error when there is none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun import registry
from corun.errors import InputError
from corun.registry import DataOptions

sample = registry.load_plugin("datasets", "sample")
OPTIONS = DataOptions(image_size=32, count=8)


def test_the_four_photographs_are_there() -> None:
    """Both packages carry their two photographs under the names the module expects."""
    assert [path.name for path, _ in sample.photos()] == ["china.jpg", "flower.jpg", "bus.jpg", "zidane.jpg"]


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_crops_lie_inside_their_photograph(seed: int) -> None:
    """A crop is a square within the photograph, half to all of its shorter side, named by source and place."""
    for crop in sample.crops(dataclasses.replace(OPTIONS, seed=seed)):
        height, width = sample._photo(crop.path).shape[:2]
        assert min(height, width) // 2 <= crop.side <= min(height, width)
        assert 0 <= crop.left <= width - crop.side
        assert 0 <= crop.top <= height - crop.side
        assert crop.name == f"{crop.path.stem}-x{crop.left}-y{crop.top}-s{crop.side}"


def test_classes_are_the_photographs() -> None:
    """Photographs take turns and a label is the photograph's place in the list."""
    data = sample.training(OPTIONS)
    assert data.num_classes == 4
    assert [data[i][1] for i in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_missing_packages_leave_the_other_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one package its photographs are left out and the labels of the others stay."""
    real = sample._locate
    monkeypatch.setattr(sample, "_locate", lambda package, part: package != "sklearn" and real(package, part))
    data = sample.training(OPTIONS)
    assert data.num_classes == 4
    assert {data[i][1] for i in range(8)} == {2, 3}


def test_without_any_package_the_error_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no photograph at all the packages and the alternatives are named."""
    monkeypatch.setattr(sample, "_locate", lambda *_: None)
    with pytest.raises(InputError, match="sklearn and ultralytics"):
        sample.requests(OPTIONS)


def test_a_package_without_the_file_counts_as_missing() -> None:
    """A package that is there but lacks the photograph gives none."""
    assert sample._locate("hypothesis", "no/such.jpg") is None
    assert sample._locate("no_such_package_at_all", "x.jpg") is None
    assert isinstance(sample._locate("sklearn", "datasets/images/china.jpg"), Path)
