"""The published data sets, each on a miniature folder of its real layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from corun import registry
from corun.errors import InputError
from corun.registry import DataOptions

Writer = Callable[..., Path]
TRAINING_TASKS = {
    "imagenet": "classification",
    "mini_imagenet": "classification",
    "caltech101": "classification",
    "coco": "detection",
    "cityscapes": "segmentation",
    "dehazing": "dehazing",
}


def requests(name: str, root: Path) -> list[registry.Payload]:
    return registry.dataset(name).requests(DataOptions(root=root, image_size=32))


def training(name: str, root: Path, **changes: object) -> object:
    options = DataOptions(root=root, image_size=32, task=TRAINING_TASKS[name], **changes)
    return registry.dataset(name).training(options)


@pytest.mark.parametrize("name", TRAINING_TASKS)
def test_a_missing_data_set_names_the_expected_tree(name: str, tmp_path: Path) -> None:
    """Without its files, requests and training both say which tree was expected and where it was looked for."""
    for attempt in (requests, training):
        with pytest.raises(InputError) as caught:
            attempt(name, tmp_path / name)
        text = str(caught.value)
        assert "expected" in text
        assert str(tmp_path / name) in text
        assert "CORUN_DATA" in text


@pytest.mark.parametrize("name", TRAINING_TASKS)
def test_the_usual_place_is_corun_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a root the data set is looked for in $CORUN_DATA/<name>."""
    monkeypatch.setenv("CORUN_DATA", str(tmp_path))
    with pytest.raises(InputError) as caught:
        registry.dataset(name).requests(DataOptions())
    assert str(tmp_path / name) in str(caught.value)


def test_imagenet(tmp_path: Path, picture: Writer) -> None:
    """Classes are numbered by train/'s sorted folders, in both splits; requests come from val/."""
    for path in ("train/n01/a.JPEG", "train/n02/b.JPEG", "train/n03/c.JPEG", "val/n03/d.JPEG", "val/n01/e.JPEG"):
        picture(tmp_path / path)
    data = training("imagenet", tmp_path)
    assert ([data[i][1] for i in range(3)], data.num_classes) == ([0, 1, 2], 3)
    held_out = training("imagenet", tmp_path, split="val")
    assert ([held_out[i][1] for i in range(2)], held_out.num_classes) == ([0, 2], 3)
    assert {payload.name for payload in requests("imagenet", tmp_path)} == {"val/n03/d.JPEG", "val/n01/e.JPEG"}


def test_imagenet_flat_validation_serves_but_does_not_train(tmp_path: Path, picture: Writer) -> None:
    """A flat val/ is enough for requests; training on it is refused."""
    picture(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    assert len(requests("imagenet", tmp_path)) == 1
    with pytest.raises(InputError, match="class folders"):
        training("imagenet", tmp_path, split="val")


def test_mini_imagenet(tmp_path: Path, picture: Writer) -> None:
    """A split's list gives files and labels, numbered in sorted order; requests are the test list's."""
    lists = {"train": ["n2", "n1", "n2"], "val": ["n7"], "test": ["n9", "n8"]}
    for split, labels in lists.items():
        rows = [f"{label}{i:08}.jpg,{label}" for i, label in enumerate(labels)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["filename,label", *rows]) + "\n")
        for row in rows:
            picture(tmp_path / "images" / row.split(",")[0])
    data = training("mini_imagenet", tmp_path)
    assert ([data[i][1] for i in range(3)], data.num_classes) == ([1, 0, 1], 2)
    assert training("mini_imagenet", tmp_path, split="val").num_classes == 1
    names = {payload.name for payload in requests("mini_imagenet", tmp_path)}
    assert names == {"images/n900000000.jpg", "images/n800000001.jpg"}


def test_mini_imagenet_lists_are_checked(tmp_path: Path) -> None:
    """Another header, an empty list and a list of missing pictures are each named."""
    (tmp_path / "images").mkdir()
    for text, says in [
        ("a,b\n1,2\n", "columns"),
        ("filename,label\n", "no pictures"),
        ("filename,label\nx.jpg,n1\n", "x.jpg"),
    ]:
        (tmp_path / "train.csv").write_text(text)
        with pytest.raises(InputError, match=says):
            training("mini_imagenet", tmp_path)


def test_caltech101(tmp_path: Path, picture: Writer) -> None:
    """The clutter class is left out; train and test part the rest, and requests are the test part."""
    for name in ("BACKGROUND_Google", "airplanes", "yin_yang"):
        for i in range(5):
            picture(tmp_path / "101_ObjectCategories" / name / f"image_{i:04}.jpg")
    parts = [training("caltech101", tmp_path, split=split) for split in ("train", "test")]
    assert [len(part) for part in parts] == [8, 2]
    assert {part.num_classes for part in parts} == {2}
    files = [path for part in parts for path, _ in part.entries]
    assert len(set(files)) == 10
    assert not any("BACKGROUND" in str(path) for path in files)
    held_out = {str(path.relative_to(tmp_path)) for path, _ in parts[1].entries}
    assert {payload.name for payload in requests("caltech101", tmp_path)} == held_out


def write_coco(root: Path, picture: Writer) -> None:
    """Two pictures: one 100x50 with a box, a crowd and a degenerate box, one without annotations; one not there."""
    for path in ("images/test2017/t.jpg", "images/train2017/2.jpg"):
        picture(root / path)
    picture(root / "images/train2017/1.jpg", height=50, width=100)
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2, 3)],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
        "annotations": [
            {"image_id": 1, "category_id": 90, "bbox": [10, 20, 30, 10], "iscrowd": 0},
            {"image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 50], "iscrowd": 1},
            {"image_id": 1, "category_id": 1, "bbox": [5, 5, 0.2, 9], "iscrowd": 0},
        ],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))


def test_coco(tmp_path: Path, picture: Writer) -> None:
    """Boxes move with the letterbox, categories are numbered by id, crowds and slivers are left out."""
    write_coco(tmp_path, picture)
    data = training("coco", tmp_path)
    assert (len(data), data.num_classes) == (2, 2)
    pictures, targets = data.collate([data[0], data[1]])
    assert pictures.shape == (2, 3, 32, 32)
    scale, top = 0.32, 8
    box = [10 * scale, 20 * scale + top, 40 * scale, 30 * scale + top]
    assert torch.allclose(targets[0]["boxes"], torch.tensor([box]))
    assert targets[0]["labels"].tolist() == [1]
    assert targets[1]["boxes"].shape == (0, 4)
    assert targets[1]["labels"].shape == (0,)
    assert [payload.name for payload in requests("coco", tmp_path)] == ["images/test2017/t.jpg"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"images": []}', '{"categories": [], "images": [], "annotations": [{}]}']
)
def test_a_broken_annotation_file_is_named(text: str, tmp_path: Path, picture: Writer) -> None:
    """A file that is not COCO instances is an input error that names it."""
    write_coco(tmp_path, picture)
    (tmp_path / "annotations" / "instances_train2017.json").write_text(text)
    with pytest.raises(InputError, match=r"instances_train2017\.json is not"):
        training("coco", tmp_path)


def write_cityscapes(root: Path, picture: Writer, split: str) -> None:
    """One picture whose mask shows label ids 7 (road), 26 (car), 4 (static) and 33 (bicycle) in quarters."""
    stem = "aachen_000000_000019"
    picture(root / "leftImg8bit" / split / "aachen" / f"{stem}_leftImg8bit.png", height=64, width=128)
    labels = np.kron(np.array([[7, 26], [4, 33]], np.uint8), np.ones((32, 64), np.uint8))
    mask = root / "gtFine" / split / "aachen" / f"{stem}_gtFine_labelIds.png"
    mask.parent.mkdir(parents=True)
    Image.fromarray(labels).save(mask)


def test_cityscapes(tmp_path: Path, picture: Writer) -> None:
    """Label ids become the 19 train ids, everything else 255; requests are the val pictures as JPEG."""
    for split in ("train", "val"):
        write_cityscapes(tmp_path, picture, split)
    data = training("cityscapes", tmp_path)
    image, mask = data[0]
    assert (image.shape, mask.shape, mask.dtype) == ((3, 32, 32), (32, 32), torch.int64)
    assert [int(mask[y, x]) for y, x in [(0, 0), (0, 31), (31, 0), (31, 31)]] == [0, 13, 255, 18]
    assert data.num_classes == 19
    (payload,) = requests("cityscapes", tmp_path)
    assert payload.data.startswith(b"\xff\xd8\xff")


def test_cityscapes_train_ids() -> None:
    """The table is the data set's own: 19 classes, road 0, sky 10, bicycle 18, the rest ignored."""
    table = registry.load_plugin("datasets", "cityscapes").TRAIN_IDS
    assert (table[7], table[23], table[24], table[33]) == (0, 10, 11, 18)
    assert sorted(table[table != 255].tolist()) == list(range(19))
    assert (table == 255).sum() == 256 - 19


def test_cityscapes_without_a_mask_is_not_complete(tmp_path: Path, picture: Writer) -> None:
    """A picture without its mask, and a mask that is no PNG, are named."""
    write_cityscapes(tmp_path, picture, "train")
    mask = next((tmp_path / "gtFine").rglob("*.png"))
    mask.write_bytes(b"damaged")
    data = training("cityscapes", tmp_path)
    with pytest.raises(InputError, match="cannot be read as a mask"):
        data[0]
    mask.unlink()
    with pytest.raises(InputError, match="have no mask"):
        training("cityscapes", tmp_path)


def test_dehazing(tmp_path: Path, picture: Writer) -> None:
    """A hazy file is paired with the clear file of its stem whatever the extension; requests are test_224."""
    for path in ("test_224/x.jpg", "hazy/1.jpg", "hazy/2.jpg", "clear/1.png", "clear/2.png", "clear/3.png"):
        picture(tmp_path / path, seed=len(path))
    data = training("dehazing", tmp_path)
    assert [(hazy.name, clear.name) for hazy, clear in data.entries] == [("1.jpg", "1.png"), ("2.jpg", "2.png")]
    hazy, clear = data[0]
    assert hazy.shape == clear.shape == (3, 32, 32)
    assert 0 <= float(hazy.min()) <= float(hazy.max()) <= 1
    assert [payload.name for payload in requests("dehazing", tmp_path)] == ["test_224/x.jpg"]


def test_dehazing_without_a_partner_is_not_complete(tmp_path: Path, picture: Writer) -> None:
    """A hazy picture without a clear one is named."""
    for path in ("hazy/1.jpg", "hazy/9.jpg", "clear/1.png"):
        picture(tmp_path / path)
    with pytest.raises(InputError, match=r"9\.jpg"):
        training("dehazing", tmp_path)
