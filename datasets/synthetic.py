"""Made pictures for every task: no files, no packages, the same from the same seed everywhere.

Classification draws a rectangle in the colour of its class, so its loss falls; targets of the other tasks are
described in `_common`.
"""

from __future__ import annotations

from typing import Any

from corun import images
from corun.registry import DataOptions, Dataset, Payload, load_plugin

common = load_plugin("datasets", "_common")

TASKS = frozenset({"classification", "detection", "segmentation", "dehazing"})
CLASSES = 10


def requests(options: DataOptions) -> list[Payload]:
    """`count` made pictures a little larger than image_size, as JPEG."""
    side = common.request_side(options)
    pictures = [_picture(options, index, side) for index in range(options.count)]
    return [Payload(f"synthetic-{i}", images.encode_jpeg(picture)) for i, picture in enumerate(pictures)]


def training(options: DataOptions) -> Any:
    """`count` items of the task; classification has 10 classes unless num_classes says otherwise."""
    common.check_task("synthetic", options, TASKS)
    default = CLASSES if options.task == "classification" else common.MADE_CLASSES
    classes = None if options.task == "dehazing" else options.num_classes or default
    return common.items("synthetic", range(options.count), options, classes, collate=common.collate_of(options.task))


def read(index: int, options: DataOptions) -> Any:
    """Item `index` of the task."""
    square = _picture(options, index, options.image_size)
    if options.task != "classification":
        return common.made_item(square, options, common.generator(options, index))
    import torch

    classes = options.num_classes or CLASSES
    label, quarter = index % classes, options.image_size // 4
    square[quarter:-quarter, quarter:-quarter] = common.class_colour(label, classes)
    return torch.from_numpy(images.normalise(square)), label


def _picture(options: DataOptions, index: int, side: int) -> images.Rgb:
    seed = int(common.generator(options, index).integers(2**32))
    return images.made_image(seed, side, side)


DATASETS = (Dataset("synthetic", TASKS, "made pictures and targets for every task", requests, training),)
