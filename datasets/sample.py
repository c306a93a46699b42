"""Real photographs that installed packages carry, cropped by the seed: real JPEG content without a download.

Two lie in scikit-learn (china, flower) and two in ultralytics (bus, zidane). They are found with `find_spec`,
so neither package is imported. A crop is a random square of half to all of the photograph's shorter side.
Which photograph a crop is from is its class; targets of other tasks are made (see `_common`).
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from corun import images
from corun.errors import InputError
from corun.registry import DataOptions, Dataset, Payload, load_plugin

common = load_plugin("datasets", "_common")

TASKS = frozenset({"classification", "detection", "segmentation", "dehazing"})
PHOTOS = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("ultralytics", "assets/bus.jpg"),
    ("ultralytics", "assets/zidane.jpg"),
)


class Crop(NamedTuple):
    """A square of one photograph, in its pixels; label is the photograph's place in PHOTOS."""

    path: Path
    label: int
    left: int
    top: int
    side: int

    @property
    def name(self) -> str:
        """Source and crop, e.g. `china-x12-y40-s300`."""
        return f"{self.path.stem}-x{self.left}-y{self.top}-s{self.side}"


def photos() -> list[tuple[Path, int]]:
    """(file, label) of the photographs on this machine; InputError when there is none."""
    found = [(path, label) for label, (package, part) in enumerate(PHOTOS) if (path := _locate(package, part))]
    if not found:
        packages = sorted({package for package, _ in PHOTOS})
        raise InputError(
            "data set sample has no photographs",
            [f"it takes them from the packages {' and '.join(packages)}: install one, or use synthetic or a folder"],
        )
    return found


def _locate(package: str, part: str) -> Path | None:
    spec = find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return next((path for folder in folders if (path := Path(folder, part)).is_file()), None)


@cache
def _photo(path: Path) -> images.Rgb:
    return common.read_rgb(path)


def crops(options: DataOptions) -> list[Crop]:
    """`count` crops, photographs in turn."""
    available = photos()
    return [_crop(*available[index % len(available)], options, index) for index in range(options.count)]


def _crop(path: Path, label: int, options: DataOptions, index: int) -> Crop:
    rng = common.generator(options, index)
    height, width = _photo(path).shape[:2]
    shorter = min(height, width)
    side = int(rng.integers(shorter // 2, shorter + 1))
    return Crop(path, label, int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1)), side)


def _cut(crop: Crop, side: int) -> images.Rgb:
    photo = _photo(crop.path)
    return images.resize(photo[crop.top : crop.top + crop.side, crop.left : crop.left + crop.side], side, side)


def requests(options: DataOptions) -> list[Payload]:
    """`count` crops a little larger than image_size, as JPEG; names say photograph and crop."""
    side = common.request_side(options)
    return [Payload(crop.name, images.encode_jpeg(_cut(crop, side))) for crop in crops(options)]


def training(options: DataOptions) -> Any:
    """`count` crops with the task's target; classification has one class per photograph, always 4."""
    common.check_task("sample", options, TASKS)
    classes = None
    if options.task == "classification":
        classes = len(PHOTOS)
    elif options.task != "dehazing":
        classes = options.num_classes or common.MADE_CLASSES
    entries = [(index, tuple(crop)) for index, crop in enumerate(crops(options))]
    return common.items("sample", entries, options, classes, collate=common.collate_of(options.task))


def read(entry: tuple[int, tuple[Any, ...]], options: DataOptions) -> Any:
    """One item: the crop at image_size and its target."""
    index, crop = entry[0], Crop(*entry[1])
    square = _cut(crop, options.image_size)
    if options.task != "classification":
        return common.made_item(square, options, common.generator(options, index))
    import torch

    return torch.from_numpy(images.normalise(square)), crop.label


DATASETS = (Dataset("sample", TASKS, "crops of real photographs found in installed packages", requests, training),)
