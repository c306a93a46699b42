"""What all data sets promise: the item formats, made targets, haze, determinism, and no heavy import in clients."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import default_collate

from corun import images, registry
from corun.errors import InputError
from corun.registry import DataOptions

ROOT = Path(__file__).resolve().parents[3]
common = registry.load_plugin("datasets", "_common")
MADE = ("sample", "synthetic")
NAMES = {
    "sample", "folder", "digits", "synthetic", "imagenet",
    "mini_imagenet", "caltech101", "coco", "cityscapes", "dehazing",
}  # fmt: skip
OPTIONS = DataOptions(image_size=64, count=6, seed=1)


def test_all_data_sets_are_listed() -> None:
    """Every data set is found by name, with a sentence about it and at least one task."""
    known = registry.datasets()
    assert set(known) >= NAMES
    assert all(known[name].doc and known[name].tasks for name in NAMES)


def test_clients_import_no_torch() -> None:
    """Making requests imports none of torch, scikit-learn, ultralytics and pandas."""
    code = (
        "import sys; sys.path.insert(0, 'src')\n"
        "from corun.registry import DataOptions, request_payloads\n"
        "for name in ('sample', 'synthetic', 'digits'):\n"
        "    assert request_payloads(name, DataOptions(count=2, image_size=32))\n"
        "sys.exit(str({'torch', 'sklearn', 'ultralytics', 'pandas'} & set(sys.modules) or '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_items_reach_a_process_that_never_loaded_the_plug_ins() -> None:
    """Pickled training sets of every plug-in work in a fresh process, as a spawned data loader needs."""
    made = [
        registry.dataset(name).training(dataclasses.replace(OPTIONS, task=task))
        for name, task in [("sample", "detection"), ("synthetic", "dehazing"), ("digits", "classification")]
    ]
    code = (
        "import sys, pickle; sys.path.insert(0, 'src')\n"
        "items = pickle.load(sys.stdin.buffer)\n"
        "sys.stdout.buffer.write(pickle.dumps([one[1][0].numpy() for one in items]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, input=pickle.dumps(made), check=True, capture_output=True
    )
    for there, here in zip(pickle.loads(done.stdout), made, strict=True):
        assert np.array_equal(there, here[1][0].numpy())


@pytest.mark.parametrize("name", [*MADE, "digits"])
def test_requests_are_seeded_jpegs(name: str) -> None:
    """Payloads are JPEG files of a little over image_size, equal for equal seeds and not for others."""
    source = registry.dataset(name)
    first, again = source.requests(OPTIONS), source.requests(OPTIONS)
    other = source.requests(dataclasses.replace(OPTIONS, seed=2))
    assert len(first) == OPTIONS.count
    assert len({payload.name for payload in first}) == OPTIONS.count
    assert [payload.data for payload in first] == [payload.data for payload in again]
    assert [payload.data for payload in first] != [payload.data for payload in other]
    assert all(payload.data.startswith(b"\xff\xd8\xff") for payload in first)
    assert {images.decode_rgb(payload.data).shape for payload in first} == {(73, 73, 3)}


@pytest.mark.parametrize("name", MADE)
def test_a_longer_list_begins_with_the_shorter(name: str) -> None:
    """Item i depends on the seed and i alone, not on how many there are."""
    source = registry.dataset(name)
    longer = source.requests(dataclasses.replace(OPTIONS, count=9))
    assert longer[: OPTIONS.count] == source.requests(OPTIONS)


@pytest.mark.parametrize("name", MADE)
def test_classification_items(name: str) -> None:
    """An image is normalised float32 (3, S, S); labels lie in 0..num_classes - 1 and differ."""
    data = registry.dataset(name).training(OPTIONS)
    batch, labels = default_collate([data[i] for i in range(len(data))])
    assert (batch.shape, batch.dtype) == ((6, 3, 64, 64), torch.float32)
    assert float(batch.min()) < 0
    assert labels.dtype == torch.int64
    assert 0 <= int(labels.min()) < int(labels.max()) < data.num_classes


@pytest.mark.parametrize("name", MADE)
def test_detection_items(name: str) -> None:
    """Boxes are float x1 < x2, y1 < y2 inside the image, labels int64, and collate keeps targets in a list."""
    data = registry.dataset(name).training(dataclasses.replace(OPTIONS, task="detection"))
    pictures, targets = data.collate([data[i] for i in range(len(data))])
    assert pictures.shape == (6, 3, 64, 64)
    assert 0 <= float(pictures.min()) <= float(pictures.max()) <= 1
    assert len(targets) == 6
    for target in targets:
        boxes, labels = target["boxes"], target["labels"]
        assert (boxes.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert boxes.shape == (len(labels), 4)
        assert (boxes[:, :2] < boxes[:, 2:]).all()
        assert (boxes >= 0).all()
        assert (boxes <= 64).all()
        assert (labels < data.num_classes).all()


@pytest.mark.parametrize("name", MADE)
def test_segmentation_items(name: str) -> None:
    """A mask is int64 (S, S) of class indices with some background and some object."""
    data = registry.dataset(name).training(dataclasses.replace(OPTIONS, task="segmentation", num_classes=3))
    for image, mask in (data[i] for i in range(len(data))):
        assert image.shape == (3, 64, 64)
        assert (mask.shape, mask.dtype) == ((64, 64), torch.int64)
        assert set(mask.unique().tolist()) <= {0, 1, 2}
        assert len(mask.unique()) > 1
    assert data.num_classes == 3


@pytest.mark.parametrize("name", MADE)
def test_dehazing_items(name: str) -> None:
    """(hazy, clear) are both in [0, 1], the hazy one has less contrast, and there are no classes."""
    data = registry.dataset(name).training(dataclasses.replace(OPTIONS, task="dehazing"))
    assert data.num_classes is None
    for hazy, clear in (data[i] for i in range(len(data))):
        assert hazy.shape == clear.shape == (3, 64, 64)
        assert 0 <= float(hazy.min()) <= float(hazy.max()) <= 1
        assert float(hazy.std()) < float(clear.std())


def test_splits_differ() -> None:
    """Train and test items of a made data set are drawn from different streams."""
    train, test = (
        registry.dataset("synthetic").training(dataclasses.replace(OPTIONS, split=split))
        for split in ("train", "test")
    )
    assert not torch.equal(train[0][0], test[0][0])


def test_a_task_that_is_not_offered_is_refused() -> None:
    """Asking a data set for another task lists the tasks it has."""
    with pytest.raises(InputError, match="classification"):
        registry.dataset("digits").training(dataclasses.replace(OPTIONS, task="detection"))


@given(st.integers(0, 2**31), st.integers(8, 90), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_rectangles_mark_what_was_drawn(seed: int, side: int, classes: int) -> None:
    """The last rectangle, which nothing hides, has its class's colour; the mask is 0 only outside all boxes."""
    grey = np.full((side, side, 3), 127, np.uint8)
    drawn, boxes, labels = common.with_rectangles(grey, np.random.default_rng(seed), classes)
    left, top, right, bottom = boxes[-1].astype(int)
    assert (drawn[top:bottom, left:right] == common.class_colour(int(labels[-1]), classes)).all()
    assert (labels >= 0).all()
    assert (labels < classes).all()
    mask = common.rectangle_mask(boxes, labels + 1, side)
    assert ((mask > 0) == (drawn != 127).any(axis=2)).all()
    assert (grey == 127).all()


@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(2, 40))
@settings(max_examples=40, deadline=None)
def test_haze_mixes_picture_and_air(seed: int, height: int, width: int) -> None:
    """Every hazy value lies between the clear value and the light of the air, so it stays in [0, 1]."""
    clear = images.scaled(images.made_image(seed, height, width))
    hazy = common.hazed(clear, np.random.default_rng(seed))
    assert hazy.dtype == np.float32
    assert hazy.shape == clear.shape
    rng = np.random.default_rng(seed)
    rng.integers(2**32), rng.uniform(0.3, 1.5)
    air = (rng.uniform(0.25, 1.0) + rng.uniform(-0.025, 0.025, size=3)).clip(0, 1)[:, None, None]
    assert (hazy >= np.minimum(clear, air) - 1e-5).all()
    assert (hazy <= np.maximum(clear, air) + 1e-5).all()
