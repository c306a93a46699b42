"""ImageNet-1k (ILSVRC 2012) as usually unpacked: one folder per WordNet id in train/ and in val/.

A class is the place of its WordNet id in the sorted list of train/'s folders, which is torchvision's numbering.
Requests come from val/, which may also be flat. The pictures' terms are non-commercial research.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corun.errors import InputError
from corun.registry import DataOptions, Dataset, Payload, load_plugin

common = load_plugin("datasets", "_common")

NAME = "imagenet"
TASKS = frozenset({"classification"})
TREE = "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG"


def requests(options: DataOptions) -> list[Payload]:
    """At most `count` pictures of val/, drawn by the seed, byte for byte."""
    root = common.root_of(NAME, options)
    common.require(NAME, root, ["val"], TREE)
    payloads: list[Payload] = common.file_payloads(common.some(NAME, root / "val", TREE), root, options)
    return payloads


def training(options: DataOptions) -> Any:
    """All pictures of the split ("train" or "val")."""
    common.check_task(NAME, options, TASKS)
    split = common.split_of(NAME, options, ("train", "val"))
    root = common.root_of(NAME, options)
    common.require(NAME, root, [split], TREE)
    classes = common.class_names(_numbering(root, split))
    entries = common.class_entries(root / split, classes)
    if not entries:
        raise InputError(f"{root / split} has no pictures in class folders", [f"expected: {TREE}"])
    return common.classification_items(entries, options, len(classes))


def _numbering(root: Path, split: str) -> Path:
    """The folder whose sub-folders number the classes: train/ where there is one."""
    return root / "train" if (root / "train").is_dir() else root / split


DATASETS = (Dataset(NAME, TASKS, f"ImageNet-1k: {TREE}", requests, training),)
