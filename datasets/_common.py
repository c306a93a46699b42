"""What the data sets share: finding files, request payloads, and made targets for tasks without annotations.

Everything random is drawn from `generator(options, index)`, a function of seed, split and position alone: item 7
is the same in every process and however many items there are.

Made targets make a task trainable on any picture, so that the *work* of training (decode, forward, backward,
loss) is real although the knowledge is not: coloured rectangles are drawn on the picture, and their boxes,
classes and masks are the targets. Haze follows the atmospheric scattering model (Koschmieder; the constants
are those of Wu et al., RIDCP, CVPR 2023):

    hazy = clear * t + A * (1 - t),   t = exp(-2 beta (1 - depth)),   beta ~ U[.3, 1.5],   A ~ U[.25, 1] +- .025

with a smooth made depth map (1 = near) in place of a measured one.
"""

from __future__ import annotations

import colorsys
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corun import images, torch_tools
from corun.errors import InputError, suggest
from corun.registry import DataOptions, Payload, data_root, load_plugin

JPEG_MAGIC = b"\xff\xd8\xff"
MADE_CLASSES = 4
MAX_SHAPES = 3
REENCODED_QUALITY = 95


def generator(options: DataOptions, index: int = 0) -> np.random.Generator:
    """The random stream of item `index`: a function of seed, split and index."""
    return np.random.default_rng([options.seed, zlib.crc32(options.split.encode()), index])


def root_of(name: str, options: DataOptions) -> Path:
    """The folder asked for, or the data set's usual place."""
    return data_root(name) if options.root is None else options.root


def require(name: str, root: Path, parts: Sequence[str], tree: str) -> None:
    """InputError that names the expected tree when one of `parts` is not below `root`."""
    missing = [part for part in parts if not (root / part).exists()]
    if missing:
        problems = [f"{root / part} is missing" for part in missing]
        where = f'give another folder as "{name}:/path", or set CORUN_DATA to the folder that holds {name}/'
        raise InputError(f"data set {name} is not in {root}", [*problems, f"expected in it: {tree}", where])


def split_of(name: str, options: DataOptions, known: Sequence[str]) -> str:
    """The split asked for; InputError with a suggestion when the data set has none of that name."""
    if options.split not in known:
        near = suggest(options.split, known)
        raise InputError(f'data set {name} has no split "{options.split}"{near}', [f"splits: {', '.join(known)}"])
    return options.split


def check_task(name: str, options: DataOptions, tasks: frozenset[str]) -> None:
    """InputError when the data set cannot train the task asked for."""
    if options.task not in tasks:
        raise InputError(
            f'data set {name} cannot train the task "{options.task}"', [f"it can: {', '.join(sorted(tasks))}"]
        )


def images_below(folder: Path) -> list[Path]:
    """Every JPEG and PNG file at any depth, sorted by path; hidden files are skipped."""
    found = [
        Path(directory, name)
        for directory, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(images.SUFFIXES) and not name.startswith(".")
    ]
    return sorted(found)


def some(name: str, folder: Path, tree: str) -> list[Path]:
    """`images_below`, but InputError when there is none."""
    found = images_below(folder)
    if not found:
        raise InputError(f"{folder} has no pictures for data set {name}", [f"expected: {tree}"])
    return found


def class_entries(folder: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """(file, class index) of every image below the sub-folder of each class."""
    return [(path, label) for label, name in enumerate(classes) for path in images_below(folder / name)]


def class_names(folder: Path) -> list[str]:
    """Sorted names of the sub-folders, hidden ones skipped."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def file_payloads(paths: Sequence[Path], root: Path, options: DataOptions) -> list[Payload]:
    """At most `count` of the files, drawn by the seed: JPEG files byte for byte, others re-encoded as JPEG."""
    order = generator(options).permutation(len(paths))[: options.count]
    return [Payload(os.path.relpath(paths[i], root), _jpeg_bytes(paths[i])) for i in order]


def _jpeg_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return data if data.startswith(JPEG_MAGIC) else images.encode_jpeg(read_rgb(path), REENCODED_QUALITY)


def read_rgb(path: Path) -> images.Rgb:
    """A picture file as RGB; InputError with its path when it is damaged."""
    try:
        return images.decode_rgb(path.read_bytes())
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}") from None


def items(
    stem: str,
    entries: Sequence[Any],
    options: DataOptions,
    num_classes: int | None = None,
    read: str = "read",
    collate: Callable[[Sequence[Any]], Any] | None = None,
) -> torch_tools.Items:
    """Training items made by the function `read(entry, options)` of the plug-in file `stem`."""
    function = torch_tools.PluginFunction(load_plugin, "datasets", stem, read)
    return torch_tools.Items(function, entries, options, num_classes, collate)


def classification_items(
    entries: Sequence[tuple[Path, int]], options: DataOptions, num_classes: int
) -> torch_tools.Items:
    """Items of picture files and their classes."""
    return items("_common", entries, options, num_classes, read="read_classified")


def read_classified(entry: tuple[Path, int], options: DataOptions) -> Any:
    """(normalised picture (3, image_size, image_size), class)."""
    path, label = entry
    return normalised(read_rgb(path), options.image_size), label


def collate_of(task: str) -> Callable[[Sequence[Any]], Any] | None:
    """Detection keeps its targets in a list; other tasks use torch's default."""
    return torch_tools.collate_detection if task == "detection" else None


def request_side(options: DataOptions) -> int:
    """Side of a made request picture: what a centre crop to image_size is usually cut from."""
    return round(options.image_size * 256 / 224)


def normalised(image: images.Rgb, size: int) -> Any:
    """Evaluation crop with ImageNet's statistics as a float32 tensor (3, size, size)."""
    import torch

    resized = images.resize_shorter(image, round(size * 256 / 224))
    return torch.from_numpy(images.normalise(images.centre_crop(resized, size)))


def detection_item(image: images.Rgb, boxes: NDArray[np.float32], labels: NDArray[np.int64]) -> Any:
    """(float32 (3, H, W) in [0, 1], {"boxes": float32 (n, 4) x1 y1 x2 y2 pixels, "labels": int64 (n,)})."""
    import torch

    target = {"boxes": torch.from_numpy(boxes.reshape(-1, 4)), "labels": torch.from_numpy(labels)}
    return torch.from_numpy(images.scaled(image)), target


def segmentation_item(image: images.Rgb, mask: NDArray[np.uint8]) -> Any:
    """(normalised float32 (3, H, W), int64 (H, W) of class indices, 255 = ignore)."""
    import torch

    return torch.from_numpy(images.normalise(image)), torch.from_numpy(mask.astype(np.int64))


def dehazing_item(clear: images.Rgb, rng: np.random.Generator) -> Any:
    """(hazy, clear), both float32 (3, H, W) in [0, 1], the haze made."""
    import torch

    sharp = images.scaled(clear)
    return torch.from_numpy(hazed(sharp, rng)), torch.from_numpy(sharp)


def hazed(clear: images.Chw, rng: np.random.Generator) -> images.Chw:
    """Haze over a clear picture in [0, 1] by the formula above; the result stays in [0, 1]."""
    depth = images.made_image(int(rng.integers(2**32)), *clear.shape[1:])[..., 0].astype(np.float32) / 255
    beta = rng.uniform(0.3, 1.5)
    air = (rng.uniform(0.25, 1.0) + rng.uniform(-0.025, 0.025, size=3)).clip(0, 1).astype(np.float32)
    passed = np.exp(np.float32(-2 * beta) * (1 - depth))
    return clear * passed + air[:, None, None] * (1 - passed)


def made_item(square: images.Rgb, options: DataOptions, rng: np.random.Generator) -> Any:
    """A training item with a made target on a square picture, for detection, segmentation or dehazing."""
    if options.task == "dehazing":
        return dehazing_item(square, rng)
    classes = options.num_classes or MADE_CLASSES
    if options.task == "segmentation":
        drawn, boxes, labels = with_rectangles(square, rng, classes, first=1)
        return segmentation_item(drawn, rectangle_mask(boxes, labels, square.shape[0]))
    return detection_item(*with_rectangles(square, rng, classes))


def with_rectangles(
    image: images.Rgb, rng: np.random.Generator, classes: int, first: int = 0
) -> tuple[images.Rgb, NDArray[np.float32], NDArray[np.int64]]:
    """Draw one to three rectangles in their class's colour: (picture, boxes x1 y1 x2 y2, classes).

    Classes are drawn from first..classes - 1; later rectangles lie on top.
    """
    side = image.shape[0]
    count = int(rng.integers(1, MAX_SHAPES + 1))
    sizes = rng.integers(max(2, side // 6), max(3, side // 2), size=(count, 2))
    corners = rng.integers(0, side - sizes + 1)
    labels = rng.integers(first, max(classes, first + 1), size=count)
    drawn = image.copy()
    for (left, top), (width, height), label in zip(corners, sizes, labels, strict=True):
        drawn[top : top + height, left : left + width] = class_colour(int(label), classes)
    return drawn, np.hstack([corners, corners + sizes]).astype(np.float32), labels.astype(np.int64)


def rectangle_mask(boxes: NDArray[np.float32], labels: NDArray[np.int64], side: int) -> NDArray[np.uint8]:
    """Class of every pixel of a square picture with rectangles; 0 is the background."""
    mask = np.zeros((side, side), dtype=np.uint8)
    for (left, top, right, bottom), label in zip(boxes.astype(int), labels, strict=True):
        mask[top:bottom, left:right] = label
    return mask


def class_colour(label: int, classes: int) -> tuple[int, int, int]:
    """A saturated colour per class, hues evenly spaced."""
    red, green, blue = colorsys.hsv_to_rgb(label / max(classes, 1), 0.9, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)
