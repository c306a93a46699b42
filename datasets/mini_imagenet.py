"""mini-ImageNet (Vinyals et al. 2016, the split of Ravi and Larochelle 2017): one folder and three lists.

images/ holds all pictures; train.csv, val.csv and test.csv have the columns filename,label. The splits have
different classes (64, 16 and 20), so classes are numbered within a split, in sorted order of their labels.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from corun.errors import InputError
from corun.registry import DataOptions, Dataset, Payload, load_plugin

common = load_plugin("datasets", "_common")

NAME = "mini_imagenet"
TASKS = frozenset({"classification"})
SPLITS = ("train", "val", "test")
TREE = "images/*.jpg, train.csv, val.csv and test.csv with the columns filename,label"


def _rows(root: Path, split: str) -> list[tuple[Path, str]]:
    """(file, label) of a split's list; InputError when it is not such a list or names a missing file."""
    common.require(NAME, root, ["images", f"{split}.csv"], TREE)
    path = root / f"{split}.csv"
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        if not {"filename", "label"} <= set(table.fieldnames or ()):
            raise InputError(f"{path} has the columns {table.fieldnames}, expected filename,label")
        rows = [(root / "images" / row["filename"], row["label"]) for row in table]
    if not rows:
        raise InputError(f"{path} lists no pictures", [f"expected: {TREE}"])
    if not rows[0][0].is_file():
        raise InputError(f"{path} names {rows[0][0].name}, which is not in {root / 'images'}", [f"expected: {TREE}"])
    return rows


def requests(options: DataOptions) -> list[Payload]:
    """At most `count` pictures of the test split, drawn by the seed, byte for byte."""
    root = common.root_of(NAME, options)
    payloads: list[Payload] = common.file_payloads([path for path, _ in _rows(root, "test")], root, options)
    return payloads


def training(options: DataOptions) -> Any:
    """All pictures of the split ("train", "val" or "test")."""
    common.check_task(NAME, options, TASKS)
    split = common.split_of(NAME, options, SPLITS)
    rows = _rows(common.root_of(NAME, options), split)
    classes = sorted({label for _, label in rows})
    number = {label: index for index, label in enumerate(classes)}
    return common.classification_items([(path, number[label]) for path, label in rows], options, len(classes))


DATASETS = (Dataset(NAME, TASKS, f"mini-ImageNet: {TREE}", requests, training),)
