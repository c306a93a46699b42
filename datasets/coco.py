"""COCO 2017 (Lin et al. 2014): detection with the official instance annotations.

A training picture is letterboxed to a square (grey 114) and its boxes move along. Targets per picture:

    {"boxes": float32 (n, 4) x1 y1 x2 y2 in pixels of the square, "labels": int64 (n,) of 0..79}

Labels number the categories in order of their COCO ids, which have gaps. Crowd regions and boxes under one pixel
are left out; a picture may have no box. Only listed pictures that are on the disk are used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corun import images
from corun.errors import InputError
from corun.registry import DataOptions, Dataset, Payload, load_plugin

common = load_plugin("datasets", "_common")

NAME = "coco"
TASKS = frozenset({"detection"})
REQUESTS = Path("images", "test2017")
TREE = (
    "images/test2017/*.jpg for requests; images/train2017, images/val2017 and "
    "annotations/instances_train2017.json, instances_val2017.json for training"
)

Entry = tuple[Path, NDArray[np.float32], NDArray[np.int64]]


def requests(options: DataOptions) -> list[Payload]:
    """At most `count` pictures of images/test2017, drawn by the seed, byte for byte."""
    root = common.root_of(NAME, options)
    common.require(NAME, root, [str(REQUESTS)], TREE)
    payloads: list[Payload] = common.file_payloads(common.some(NAME, root / REQUESTS, TREE), root, options)
    return payloads


def training(options: DataOptions) -> Any:
    """All pictures of the split ("train" or "val") with their boxes; 80 classes."""
    common.check_task(NAME, options, TASKS)
    split = common.split_of(NAME, options, ("train", "val"))
    root = common.root_of(NAME, options)
    folder, listing = Path("images", f"{split}2017"), Path("annotations", f"instances_{split}2017.json")
    common.require(NAME, root, [str(folder), str(listing)], TREE)
    entries, classes = _annotated(root / listing, root / folder)
    if not entries:
        raise InputError(f"no picture of {root / listing} is in {root / folder}", [f"expected: {TREE}"])
    return common.items(NAME, entries, options, classes, collate=common.collate_of("detection"))


def _annotated(listing: Path, folder: Path) -> tuple[list[Entry], int]:
    """((file, boxes in its pixels, labels) per picture on the disk, number of categories)."""
    try:
        content = json.loads(listing.read_bytes())
        number = {row["id"]: i for i, row in enumerate(sorted(content["categories"], key=lambda row: row["id"]))}
        found: dict[int, list[tuple[float, ...]]] = {row["id"]: [] for row in content["images"]}
        for row in content["annotations"]:
            left, top, width, height = row["bbox"]
            if not row.get("iscrowd") and width >= 1 and height >= 1:
                box = (left, top, left + width, top + height, number[row["category_id"]])
                found[row["image_id"]].append(box)
        here = {path.name for path in folder.iterdir()}
        kept = [row for row in content["images"] if row["file_name"] in here]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{listing} is not a COCO instances file: {error!r}") from None
    return [_entry(folder / row["file_name"], found[row["id"]]) for row in kept], len(number)


def _entry(path: Path, rows: list[tuple[float, ...]]) -> Entry:
    table = np.asarray(rows, dtype=np.float64).reshape(-1, 5)
    return path, table[:, :4].astype(np.float32), table[:, 4].astype(np.int64)


def read(entry: Entry, options: DataOptions) -> Any:
    """(letterboxed picture in [0, 1], target)."""
    path, boxes, labels = entry
    square, scale, left, top = images.letterbox(common.read_rgb(path), options.image_size)
    moved = boxes * np.float32(scale) + np.asarray([left, top, left, top], dtype=np.float32)
    return common.detection_item(square, moved.clip(0, options.image_size), labels)


DATASETS = (Dataset(NAME, TASKS, f"COCO 2017: {TREE}", requests, training),)
