"""Caltech-101 (Li, Andreeto, Ranzato, Perona 2022 release): 101_ObjectCategories/<class>/image_0001.jpg.

The clutter class BACKGROUND_Google is left out, as torchvision does. There is no official split: the seed puts a
fifth of all pictures into `test`; requests come from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from corun.errors import InputError
from corun.registry import DataOptions, Dataset, Payload, load_plugin

common = load_plugin("datasets", "_common")

NAME = "caltech101"
TASKS = frozenset({"classification"})
FOLDER = "101_ObjectCategories"
CLUTTER = "BACKGROUND_Google"
TEST_SHARE = 5
TREE = f"{FOLDER}/<class>/*.jpg"


def _entries(options: DataOptions, split: str) -> tuple[list[tuple[Path, int]], int]:
    """((file, class) of the split, number of classes)."""
    root = common.root_of(NAME, options)
    common.require(NAME, root, [FOLDER], TREE)
    classes = [name for name in common.class_names(root / FOLDER) if name != CLUTTER]
    entries = common.class_entries(root / FOLDER, classes)
    if not entries:
        raise InputError(f"{root / FOLDER} has no pictures in class folders", [f"expected: {TREE}"])
    place = np.random.default_rng(options.seed).permutation(len(entries))
    wanted = (place % TEST_SHARE == 0) == (split == "test")
    return [entry for entry, take in zip(entries, wanted, strict=True) if take], len(classes)


def requests(options: DataOptions) -> list[Payload]:
    """At most `count` pictures of the test split, drawn by the seed, byte for byte."""
    paths = [path for path, _ in _entries(options, "test")[0]]
    payloads: list[Payload] = common.file_payloads(paths, common.root_of(NAME, options), options)
    return payloads


def training(options: DataOptions) -> Any:
    """All pictures of the split ("train" or "test")."""
    common.check_task(NAME, options, TASKS)
    entries, classes = _entries(options, common.split_of(NAME, options, ("train", "test")))
    return common.classification_items(entries, options, classes)


DATASETS = (Dataset(NAME, TASKS, f"Caltech-101: {TREE}", requests, training),)
