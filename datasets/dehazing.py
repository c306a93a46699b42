"""Hazy pictures: a folder to send as requests, and pairs of hazy and clear pictures to train on.

Requests come from test_224/, the folder of the original study. Training pairs a file of hazy/ with the file of
clear/ of the same stem (extensions may differ) and resizes both to a square.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corun import images
from corun.errors import InputError
from corun.registry import DataOptions, Dataset, Payload, load_plugin

common = load_plugin("datasets", "_common")

NAME = "dehazing"
TASKS = frozenset({"dehazing"})
TREE = "test_224/* for requests; hazy/<stem>.png and clear/<stem>.png for training"


def requests(options: DataOptions) -> list[Payload]:
    """At most `count` pictures of test_224/, drawn by the seed; JPEG files byte for byte."""
    root = common.root_of(NAME, options)
    common.require(NAME, root, ["test_224"], TREE)
    payloads: list[Payload] = common.file_payloads(common.some(NAME, root / "test_224", TREE), root, options)
    return payloads


def training(options: DataOptions) -> Any:
    """All pairs; InputError names a hazy picture that has no clear one."""
    common.check_task(NAME, options, TASKS)
    root = common.root_of(NAME, options)
    common.require(NAME, root, ["hazy", "clear"], TREE)
    clear = {path.stem: path for path in common.some(NAME, root / "clear", TREE)}
    hazy = common.some(NAME, root / "hazy", TREE)
    alone = [path.name for path in hazy if path.stem not in clear]
    if alone:
        problems = [f"{len(alone)} files of hazy/ have none in clear/, the first is {alone[0]}", f"expected: {TREE}"]
        raise InputError(f"data set {NAME} in {root} is not complete", problems)
    return common.items(NAME, [(path, clear[path.stem]) for path in hazy], options)


def read(entry: tuple[Path, Path], options: DataOptions) -> Any:
    """(hazy, clear), both float32 (3, image_size, image_size) in [0, 1]."""
    import torch

    squares = [images.resize(common.read_rgb(path), options.image_size, options.image_size) for path in entry]
    hazy, clear = (torch.from_numpy(images.scaled(square)) for square in squares)
    return hazy, clear


DATASETS = (Dataset(NAME, TASKS, f"pairs of hazy and clear pictures: {TREE}", requests, training),)
