"""Documented accuracy of released weights, and the user's own table over it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from corun.errors import InputError
from corun.tasks.quality import CLASSIFICATION, DETECTION, MIOU, SEGMENTATION, TOP1, QualityTable


def test_the_table_says_what_the_installed_torchvision_documents() -> None:
    """Every figure of a torchvision network is that of its DEFAULT weights' meta data."""
    from torchvision.models import get_model_weights

    for name, value in CLASSIFICATION.items():
        assert get_model_weights(name).DEFAULT.meta["_metrics"]["ImageNet-1K"]["acc@1"] == value, name
    for name, value in SEGMENTATION.items():
        assert get_model_weights(name).DEFAULT.meta["_metrics"]["COCO-val2017-VOC-labels"]["miou"] == value, name


def test_every_model_of_the_documented_families_has_a_figure() -> None:
    """A classifier, segmenter or detector that is added to the model table needs its figure here."""
    from corun import registry

    rows = registry.models().values()
    documented = {"cnn", "deeplabv3", "yolov5"}
    assert {row.name for row in rows if row.family in documented} == {*CLASSIFICATION, *SEGMENTATION, *DETECTION}


def test_options_that_change_the_answers_take_the_documented_quality_away() -> None:
    """Speed options keep it; another size, precision or other weights have none until the user gives one."""
    table = QualityTable()
    assert table.of("resnet18").value == 69.758
    assert table.of("resnet18").metric == TOP1
    assert table.of("deeplabv3_resnet50").metric == MIOU
    assert table.of("resnet18:channels_last=true,compile=true").value == 69.758
    assert table.of("resnet18:weights=default").value == 69.758
    for text in ("resnet18:image_size=160", "resnet18:precision=bf16", "resnet18:weights=mine.pt", "null"):
        assert table.of(text).value is None, text


def test_the_users_table_comes_first(tmp_path: Path) -> None:
    """A user's figure overrides a documented one and gives one to a model with options."""
    path = tmp_path / "quality.json"
    own = {"resnet18": 93.1, "resnet18:image_size=160": {"quality": 91, "metric": "own %"}, "null:service_ms=5": 50}
    path.write_text(json.dumps(own))
    table = QualityTable.load(path)
    assert table.of("resnet18").value == 93.1
    assert table.of("resnet18").own
    assert table.of("resnet18:compile=true").value == 93.1
    assert (table.of("resnet18:image_size=160").value, table.of("resnet18:image_size=160").metric) == (91.0, "own %")
    assert table.of("null:service_ms=5").value == 50
    assert table.of("resnet50").value == 80.858


def test_every_problem_of_a_table_is_told(tmp_path: Path) -> None:
    """Unknown models, bad figures and unknown keys are listed together."""
    path = tmp_path / "quality.json"
    path.write_text(json.dumps({"resnet81": 5, "resnet18": 101, "resnet50": {"qualty": 5}, "vgg11": "good"}))
    with pytest.raises(InputError, match="4 problems") as caught:
        QualityTable.load(path)
    for part in ("resnet81", "resnet18: give a quality of 0 to 100", "qualty", "vgg11"):
        assert part in str(caught.value)
    path.write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        QualityTable.load(path)
    with pytest.raises(InputError, match="cannot read"):
        QualityTable.load(tmp_path / "none.json")
