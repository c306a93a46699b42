"""docs/models.md says what the registry says, and the bench behind it judges replies."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bench import model_table, models

from corun import images, registry
from corun.errors import InputError, RunFault
from corun.serve.loop import INFER_LOOP

FIXED = [place for place, name in enumerate(model_table.COLUMNS) if name not in ("params", "GFLOP")]


def _lines(page: str) -> dict[str, list[str]]:
    """The cells of each model's line."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "| `" in line]
    return {row[1].strip("`"): row for row in rows if len(row) == len(model_table.COLUMNS)}


def test_the_page_is_up_to_date() -> None:
    """Every model has a line with its family, task, input, reply, loss and licences; `--docs` would change nothing."""
    on_disk = model_table.DOCS.read_text(encoding="utf-8")
    found, expected = _lines(on_disk), _lines(model_table.page())
    assert found.keys() == expected.keys() == registry.models().keys()
    stale = [name for name in expected if any(found[name][place] != expected[name][place] for place in FIXED)]
    assert not stale, "run: python -m bench.models --docs"
    assert on_disk == model_table.page(), "run: python -m bench.models --docs"


def test_the_stored_run_covers_every_model() -> None:
    """The run behind the page served and trained every vision model: 22 classifiers, 5 YOLO, 3 DeepLab and RIDCP."""
    stored = json.loads(model_table.RESULTS.read_text(encoding="utf-8"))
    figures = stored["figures"]
    assert (figures["served"], figures["trained"], figures["failed"]) == (31, 31, [])
    networks = {name for name, model in registry.models().items() if model.task in model_table.VISION}
    assert model_table.measured().keys() == networks


def test_what_was_not_measured_is_empty() -> None:
    """A model without a row in the results has empty numbers, never 0; a model that cannot train has no loss."""
    row = dict(zip(model_table.COLUMNS, model_table.cells(registry.model("resnet18"), {}), strict=True))
    assert (row["params"], row["GFLOP"], row["trains with"]) == ("", "", "cross-entropy")
    row = dict(zip(model_table.COLUMNS, model_table.cells(registry.model("null"), {}), strict=True))
    assert (row["input"], row["trains with"]) == ("", "")


@pytest.mark.parametrize(
    ("licence", "name"),
    [
        ("AGPL-3.0", "AGPL-3.0"),
        ("BSD-3-Clause (torchvision); trained on ImageNet", "BSD-3-Clause"),
        ("CC BY-NC 4.0 (non-commercial); none included", "CC BY-NC 4.0"),
        ("MIT; with exceptions", "MIT"),
        ("Own licence: no commercial use; ask first", "Own licence"),
    ],
)
def test_licences_are_shortened_to_their_name(licence: str, name: str) -> None:
    """The table has the licence's name; what is said about it stands below."""
    assert model_table.short(licence) == name


def test_every_licence_stands_in_full_below_the_table() -> None:
    """No condition of a licence is lost by shortening it."""
    page = model_table.page()
    for model in registry.models().values():
        assert model.code_licence in page
        assert model.weights_licence in page


def test_a_damaged_result_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A results file that is none is bad input with its path; a missing one means nothing was measured."""
    monkeypatch.setattr(model_table, "RESULTS", tmp_path / "models.json")
    assert model_table.measured() == {}
    (tmp_path / "models.json").write_text("{}")
    with pytest.raises(InputError, match=r"models\.json"):
        model_table.measured()


def test_training_is_made_smaller_only_where_a_step_is_too_dear() -> None:
    """The default side below the limit, else its half or quarter, always a multiple of 32 of at least 64."""
    resnet, yolo, ridcp = (registry.model(name) for name in ("resnet18", "yolov5x", "RIDCP_dehazing"))
    assert models.train_size(resnet, 3.6) == resnet.image_size
    assert models.train_size(resnet, None) == resnet.image_size
    assert models.train_size(yolo, 246.0) == 160
    assert models.train_size(ridcp, 397.0) == 64


def _top(*rows: tuple[int, float]) -> bytes:
    return b"".join(struct.pack("<if", *row) for row in rows)


@pytest.mark.parametrize(
    "reply",
    [
        _top((1, 0.5), (1, 0.2), (3, 0.1), (4, 0.1), (5, 0.05)),
        _top((1, 0.1), (2, 0.2), (3, 0.1), (4, 0.1), (5, 0.05)),
        _top((1, 0.5), (2, 0.2), (3, 0.1), (4, 0.1), (1000, 0.05)),
        _top((1, 0.9), (2, 0.8), (3, 0.1), (4, 0.1), (5, 0.05)),
    ],
    ids=["a class twice", "not falling", "no such class", "more than one"],
)
def test_a_malformed_top_five_fails_the_bench(reply: bytes) -> None:
    """The bench does not call a model served whose classes or probabilities are impossible."""
    good = _top((1, 0.5), (2, 0.2), (3, 0.1), (4, 0.1), (5, 0.05))
    models.check_classes(registry.model("resnet18"), b"", good)
    with pytest.raises(RunFault, match="not well-formed"):
        models.check_classes(registry.model("resnet18"), b"", reply)


def test_a_box_outside_the_picture_fails_the_bench() -> None:
    """Boxes lie inside the request's picture and have a class of the network."""
    yolo = registry.load_plugin("models", "yolo")
    payload = images.encode_jpeg(images.made_image(0, 40, 60))
    for box, fine in (
        ((0, 0, 60, 40, 0.5, 79), True),
        ((0, 0, 61, 40, 0.5, 0), False),
        ((0, 0, 9, 9, 0.5, 80), False),
    ):
        reply = yolo.encode_detections(np.array([box], yolo.DETECTION))
        if fine:
            models.check_boxes(registry.model("yolov5n"), payload, reply)
        else:
            with pytest.raises(RunFault, match="boxes are"):
                models.check_boxes(registry.model("yolov5n"), payload, reply)


def test_a_flat_or_wrongly_sized_picture_fails_the_bench() -> None:
    """A dehazed picture has the input's size and is not one colour; a class map covers the input."""
    dehazing = replace(registry.model("RIDCP_dehazing"), image_size=32)
    models.check_picture(dehazing, b"", images.encode_jpeg(images.made_image(0, 32, 32)))
    for picture in (np.zeros((32, 32, 3), np.uint8), images.made_image(0, 32, 33)):
        with pytest.raises(RunFault, match="not well-formed"):
            models.check_picture(dehazing, b"", images.encode_jpeg(picture))
    deeplab = registry.load_plugin("models", "deeplab")
    segmentation = replace(registry.model("deeplabv3_resnet50"), image_size=4)
    models.check_map(segmentation, b"", deeplab.encode_class_map(np.zeros((4, 4), np.uint8), 21))
    with pytest.raises(RunFault, match="map of"):
        models.check_map(segmentation, b"", deeplab.encode_class_map(np.full((4, 4), 21, np.uint8), 21))


def test_quick_takes_one_model_of_every_family() -> None:
    """--quick leaves no vision family out; without options every one is measured; other tasks are refused by name."""
    families = {model.family for model in registry.models().values() if model.task in model_table.VISION}
    quick = [model.family for model in models.chosen(True, [])]
    assert sorted(quick) == sorted(families)
    assert len(models.chosen(False, [])) == 32
    with pytest.raises(InputError, match="null: its task is null"):
        models.chosen(False, ["null"])


def test_presets_count_apart() -> None:
    """The tiny preset is neither served nor trained in the counts; who failed is named with the rest."""
    rows = [
        models.Row("RIDCP", "RIDCP_dehazing_tiny", 224, p50_ms=1.0),
        models.Row("cnn", "resnet18", 224, p50_ms=1.0, step_ms=1.0),
        models.Row("cnn", "vgg11", 224, p50_ms=1.0, problems=("training: out of memory",)),
    ]
    figures = models.figures_of(rows)
    assert (figures["served"], figures["trained"], figures["failed"]) == (2, 1, ["vgg11"])
    assert figures["apart"] == {"RIDCP_dehazing_tiny": {"served": True, "trained": False}}
    assert "n/a" in rows[2].line()
    assert "failed: training: out of memory" in rows[2].line()


def test_the_columns_of_loops_have_a_meaning() -> None:
    """Every column of infer_loop/<name>.csv has a documentation string and no name stands twice."""
    assert all(column.doc for column in INFER_LOOP)
    assert len({column.name for column in INFER_LOOP}) == len(INFER_LOOP)
