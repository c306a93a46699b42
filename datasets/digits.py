"""scikit-learn's handwritten digits (UCI, Alpaydin and Kaynak 1998): 1,797 grey 8x8 pictures, learnable in seconds.

The table is read from the installed package's file; scikit-learn itself is not imported. The seed decides which
fifth of the pictures is the test split; requests come from it.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corun import images
from corun.errors import InputError
from corun.registry import DataOptions, Dataset, Payload, load_plugin

common = load_plugin("datasets", "_common")

TASKS = frozenset({"classification"})
CLASSES = 10
SIDE = 8
LEVELS = 16
TEST_SHARE = 5
PART = Path("datasets", "data", "digits.csv.gz")


@cache
def table() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(pictures (1797, 8, 8) of 0..255, labels (1797,)); InputError without scikit-learn."""
    spec = find_spec("sklearn")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    path = next((file for folder in folders if (file := Path(folder) / PART).is_file()), None)
    if path is None:
        raise InputError(
            "data set digits is a file of scikit-learn, which is not installed: pip install scikit-learn"
        )
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    levels = rows[:, :-1].astype(np.uint16) * 255 // LEVELS
    return levels.astype(np.uint8).reshape(-1, SIDE, SIDE), rows[:, -1].astype(np.int64)


def indices(options: DataOptions, split: str) -> list[int]:
    """Rows of a split: every fifth of a permutation drawn from the seed is in `test`, the rest in `train`."""
    order = np.random.default_rng(options.seed).permutation(len(table()[1]))
    test = np.arange(len(order)) % TEST_SHARE == 0
    return [int(row) for row in order[test if split == "test" else ~test]]


def requests(options: DataOptions) -> list[Payload]:
    """At most `count` pictures of the test split, enlarged to a little over image_size, as JPEG."""
    pictures, labels = table()
    rows = indices(options, "test")[: options.count]
    side = common.request_side(options)
    return [Payload(f"digit{labels[row]}-{row}", images.encode_jpeg(_enlarged(pictures[row], side))) for row in rows]


def training(options: DataOptions) -> Any:
    """All pictures of the split ("train" or "test"), 10 classes."""
    common.check_task("digits", options, TASKS)
    split = common.split_of("digits", options, ("train", "test"))
    pictures, labels = table()
    entries = [(pictures[row], int(labels[row])) for row in indices(options, split)]
    return common.items("digits", entries, options, CLASSES)


def read(entry: tuple[NDArray[np.uint8], int], options: DataOptions) -> Any:
    """(normalised picture (3, image_size, image_size), digit)."""
    import torch

    picture, label = entry
    return torch.from_numpy(images.normalise(_enlarged(picture, options.image_size))), label


def _enlarged(picture: NDArray[np.uint8], side: int) -> images.Rgb:
    return images.resize(np.repeat(picture[..., None], 3, axis=2), side, side)


DATASETS = (Dataset("digits", TASKS, "scikit-learn's handwritten digits, 10 classes", requests, training),)
