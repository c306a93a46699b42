"""Cityscapes (Cordts et al. 2016) with fine annotations: 19 classes to train, everything else ignored.

Pictures and masks are resized to a square of image_size (masks by nearest neighbour), as the segmentation models
serve them. Files have `labelIds`; `TRAIN_IDS` maps them as the data set's own labels.py does, 255 = ignore.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from corun import images
from corun.errors import InputError
from corun.registry import DataOptions, Dataset, Payload, load_plugin

common = load_plugin("datasets", "_common")

NAME = "cityscapes"
TASKS = frozenset({"segmentation"})
CLASSES = 19
IGNORE = 255
TRAINED_LABELS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
TRAIN_IDS = np.full(256, IGNORE, dtype=np.uint8)
TRAIN_IDS[list(TRAINED_LABELS)] = np.arange(CLASSES)
PICTURE, MASK = "_leftImg8bit.png", "_gtFine_labelIds.png"
TREE = f"leftImg8bit/<split>/<city>/*{PICTURE} and gtFine/<split>/<city>/*{MASK}"


def _pictures(root: Path, split: str) -> list[Path]:
    common.require(NAME, root, [f"leftImg8bit/{split}"], TREE)
    found = sorted((root / "leftImg8bit" / split).glob(f"*/*{PICTURE}"))
    if not found:
        raise InputError(f"{root / 'leftImg8bit' / split} has no pictures", [f"expected: {TREE}"])
    return found


def requests(options: DataOptions) -> list[Payload]:
    """At most `count` pictures of the val split, drawn by the seed, full size, re-encoded as JPEG."""
    root = common.root_of(NAME, options)
    payloads: list[Payload] = common.file_payloads(_pictures(root, "val"), root, options)
    return payloads


def training(options: DataOptions) -> Any:
    """All pictures of the split ("train" or "val") with their masks; 19 classes."""
    common.check_task(NAME, options, TASKS)
    split = common.split_of(NAME, options, ("train", "val"))
    root = common.root_of(NAME, options)
    entries = [(path, _mask_of(root, split, path)) for path in _pictures(root, split)]
    missing = [str(mask) for _, mask in entries if not mask.is_file()]
    if missing:
        problems = [f"{len(missing)} pictures have no mask, the first is {missing[0]}", f"expected: {TREE}"]
        raise InputError(f"data set {NAME} in {root} is not complete", problems)
    return common.items(NAME, entries, options, CLASSES)


def _mask_of(root: Path, split: str, picture: Path) -> Path:
    return root / "gtFine" / split / picture.parent.name / picture.name.replace(PICTURE, MASK)


def read(entry: tuple[Path, Path], options: DataOptions) -> Any:
    """(normalised square, int64 mask of train ids)."""
    picture, mask = entry
    size = (options.image_size, options.image_size)
    square = images.resize(common.read_rgb(picture), *size)
    return common.segmentation_item(square, TRAIN_IDS[_label_ids(mask, size)])


def _label_ids(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    try:
        with Image.open(path, formats=["PNG"]) as labels:
            return np.asarray(labels.convert("L").resize(size, Image.Resampling.NEAREST))
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path} cannot be read as a mask: {error}") from None


DATASETS = (Dataset(NAME, TASKS, f"Cityscapes: {TREE}", requests, training),)
