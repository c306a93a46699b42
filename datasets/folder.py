"""Any folder of JPEG and PNG files, at any depth: `--data /some/folder`.

Requests are the files themselves. Training needs one sub-folder per class (torchvision's ImageFolder layout), or,
for dehazing, just clear pictures, over which haze is made (see `_common`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corun import images
from corun.errors import InputError
from corun.registry import DataOptions, Dataset, Payload, load_plugin

common = load_plugin("datasets", "_common")

TASKS = frozenset({"classification", "dehazing"})
EXPECTED = "expected a folder with .jpg, .jpeg or .png files in it or in its sub-folders"


def _folder(options: DataOptions) -> Path:
    if options.root is None:
        raise InputError("data set folder needs a path", ['give it as "/path/to/images" or "folder:/path"'])
    if not options.root.is_dir():
        state = "is not a folder" if options.root.exists() else "does not exist"
        raise InputError(f"{options.root} {state}", [EXPECTED])
    return options.root


def _files(options: DataOptions) -> list[Path]:
    root = _folder(options)
    found: list[Path] = common.images_below(root)
    if not found:
        raise InputError(f"{root} has no images", [EXPECTED])
    return found


def requests(options: DataOptions) -> list[Payload]:
    """At most `count` files, drawn by the seed; JPEG files are sent byte for byte."""
    payloads: list[Payload] = common.file_payloads(_files(options), _folder(options), options)
    return payloads


def training(options: DataOptions) -> Any:
    """Every file below a class's sub-folder with that class, or every file for dehazing."""
    common.check_task("folder", options, TASKS)
    if options.task == "dehazing":
        return common.items("folder", list(enumerate(_files(options))), options, read="read_hazy")
    root = _folder(options)
    classes = common.class_names(root)
    entries = common.class_entries(root, classes)
    if not entries:
        raise InputError(f"{root} has no images in class sub-folders", ["expected <class>/*.jpg for each class"])
    return common.classification_items(entries, options, len(classes))


def read_hazy(entry: tuple[int, Path], options: DataOptions) -> Any:
    """(hazy, clear) of one file resized to a square."""
    index, path = entry
    square = images.resize(common.read_rgb(path), options.image_size, options.image_size)
    return common.dehazing_item(square, common.generator(options, index))


DATASETS = (Dataset("folder", TASKS, "any folder of images, given by its path", requests, training),)
