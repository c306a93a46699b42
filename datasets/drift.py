"""Made pictures of shapes whose distribution shifts at one request: what a service meets when the world changes.

    request  0 ................ shift_at ............................ count
             clean, `before` mix │ corrupted, `after` mix

The class is the shape; its colour, place, size, tilt and noise vary, and it is always brighter than its ground.
Request i is a function of the seed and i alone, and a client whose schedule sends payload i as its i-th request
meets the shift at that request. Every payload carries its class, so the reply can be judged, and whoever has the
same specification can make the labelled arrivals again: that is how they reach the trainer of another process.

The specification is a JSON file given as the data set's root, `drift:/path/drift.json`, or the data options' extra:

    {"shift_at": 500, "corruption": "invert", "severity": 3, "class_mix": {"before": [1, 1, ...], "after": [...]}}

Corruptions are five of the families of Hendrycks and Dietterich, "Benchmarking neural network robustness to common
corruptions and perturbations" (ICLR 2019), or close to one, with severities 1 to 5 of our own choice.
"""

from __future__ import annotations

import colorsys
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from corun import images
from corun.errors import InputError, suggest
from corun.registry import DataOptions, Dataset, Payload, load_plugin

common = load_plugin("datasets", "_common")

TASKS = frozenset({"classification"})
SHAPES = ("disc", "square", "triangle", "cross", "ring", "rows", "columns", "checks")
CLASSES = len(SHAPES)
SPLITS = ("train", "test", "arrivals")
SEVERITIES = range(1, 6)
ALIKE = (1.0,) * CLASSES

BLUR_SHARE = (0.015, 0.025, 0.035, 0.05, 0.07)
NOISE_LEVELS = (15.0, 30.0, 45.0, 65.0, 90.0)
CONTRAST = (0.5, 0.35, 0.25, 0.15, 0.08)
TURN_DEG = (20, 35, 50, 70, 90)
INVERTED = (0.6, 0.7, 0.8, 0.9, 1.0)

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Drift:
    """What shifts, and when.

    shift_at: the first shifted request; None = never. count, seed: of the requests; None = the data options'.
    before, after: weights of the classes in the order of SHAPES.
    """

    shift_at: int | None = None
    corruption: str = "none"
    severity: int = 3
    before: tuple[float, ...] = ALIKE
    after: tuple[float, ...] = ALIKE
    count: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.shift_at is not None and not _is_count(self.shift_at, 0):
            problems.append(f"shift_at is {self.shift_at!r}: give the number of the first shifted request, 0 or more")
        if self.corruption not in CORRUPTIONS:
            near = suggest(str(self.corruption), CORRUPTIONS)
            problems.append(f'corruption "{self.corruption}" is not one of {", ".join(CORRUPTIONS)}{near}')
        if self.severity not in SEVERITIES or not _is_count(self.severity, 1):
            problems.append(f"severity is {self.severity!r}: give 1 (slight) to 5 (strong)")
        for name in ("before", "after"):
            problems += _mix_problems(name, getattr(self, name))
        if self.count is not None and not _is_count(self.count, 1):
            problems.append(f"count is {self.count!r}: give the number of requests, 1 or more")
        if self.seed is not None and not _is_count(self.seed, 0):
            problems.append(f"seed is {self.seed!r}: give 0 or more")
        if problems:
            raise InputError("the drift makes no sense", problems)

    def shifted(self, index: int) -> bool:
        """Whether request `index` comes after the shift."""
        return self.shift_at is not None and index >= self.shift_at


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _mix_problems(name: str, mix: Any) -> list[str]:
    numbers = isinstance(mix, tuple) and all(isinstance(item, int | float) and item >= 0 for item in mix)
    if not numbers or len(mix) != CLASSES or not 0 < sum(mix) < float("inf"):
        return [f"class_mix.{name} must be {CLASSES} weights ({', '.join(SHAPES)}), none negative, not all 0"]
    return []


def parse(given: Mapping[str, Any]) -> Drift:
    """A specification from JSON; InputError lists unknown keys and impossible values."""
    values = dict(given)
    mix = values.pop("class_mix", {})
    known = [item.name for item in fields(Drift) if item.name not in ("before", "after")]
    problems = [f'key "{key}" is unknown{suggest(key, [*known, "class_mix"])}' for key in values if key not in known]
    if not isinstance(mix, Mapping) or set(mix) - {"before", "after"}:
        problems.append('class_mix must be {"before": [...], "after": [...]}, either may be left out')
    if problems:
        raise InputError("the drift makes no sense", problems)
    mixes = {key: tuple(value) if isinstance(value, list | tuple) else value for key, value in mix.items()}
    return Drift(**values, **mixes)


def drift_of(options: DataOptions) -> Drift:
    """The specification: the file at `root`, if any, and on top of it what `extra` says."""
    given: dict[str, Any] = {}
    if options.root is not None:
        try:
            given = json.loads(Path(options.root).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{options.root} is no drift specification (a JSON object): {error}") from None
        if not isinstance(given, dict):
            raise InputError(f"{options.root} is no drift specification: it must hold a JSON object")
    return parse({**given, **options.extra})


def generator(seed: int, split: str, index: int) -> np.random.Generator:
    """The random stream of one picture: a function of seed, split and position alone."""
    return np.random.default_rng([seed, zlib.crc32(split.encode()), index])


def label_of(rng: np.random.Generator, mix: tuple[float, ...]) -> int:
    """One class drawn by these weights."""
    edges = np.cumsum(mix) / sum(mix)
    return int(np.searchsorted(edges, rng.random(), side="right"))


def clean(rng: np.random.Generator, label: int, side: int) -> images.Rgb:
    """A bright shape on a darker ground of another hue, with a little noise, (side, side, 3)."""
    mask = _shape(rng, SHAPES[label], side)[..., None]
    hue, away = rng.random(), rng.uniform(0.25, 0.75)
    bright = _colour(hue, rng.uniform(0.3, 0.8), rng.uniform(0.75, 1.0))
    dark = _colour(hue + away, rng.uniform(0.3, 0.8), rng.uniform(0.1, 0.35))
    picture = np.where(mask, bright, dark) + rng.normal(0, 6, (side, side, 1))
    return picture.clip(0, 255).astype(np.uint8)


def _colour(hue: float, saturation: float, value: float) -> NDArray[np.float64]:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value)) * 255


def _shape(rng: np.random.Generator, shape: str, side: int) -> Mask:
    """Where the shape is: at most 10 degrees tilted, its radius 0.28 to 0.42 of the side."""
    rows, columns = (np.mgrid[0:side, 0:side] + 0.5) / side - 0.5
    right, down = rng.uniform(-0.08, 0.08, 2)
    tilt, radius = np.deg2rad(rng.uniform(-10, 10)), rng.uniform(0.28, 0.42)
    across, along = columns - right, rows - down
    x = (np.cos(tilt) * across + np.sin(tilt) * along) / radius
    y = (np.cos(tilt) * along - np.sin(tilt) * across) / radius
    inside: Mask = np.maximum(abs(x), abs(y)) < 1
    stripe = rng.uniform(2.0, 3.0)
    made: dict[str, Callable[[], Mask]] = {
        "disc": lambda: np.hypot(x, y) < 1,
        "square": lambda: inside,
        "triangle": lambda: (y < 0.8) & (y > 2 * abs(x) - 1),
        "cross": lambda: inside & (np.minimum(abs(x), abs(y)) < 0.3),
        "ring": lambda: (np.hypot(x, y) < 1) & (np.hypot(x, y) > 0.55),
        "rows": lambda: inside & (np.sin(stripe * np.pi * y) > 0),
        "columns": lambda: inside & (np.sin(stripe * np.pi * x) > 0),
        "checks": lambda: inside & (np.sin(stripe * np.pi * x) * np.sin(stripe * np.pi * y) > 0),
    }
    return made[shape]()


def corrupt(picture: images.Rgb, corruption: str, severity: int, rng: np.random.Generator) -> images.Rgb:
    """The picture after one of CORRUPTIONS, same shape; severity 1 (slight) to 5 (strong)."""
    return CORRUPTIONS[corruption](picture, severity - 1, rng)


def _blur(picture: images.Rgb, level: int, rng: np.random.Generator) -> images.Rgb:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(BLUR_SHARE[level] * len(picture))))


def _noise(picture: images.Rgb, level: int, rng: np.random.Generator) -> images.Rgb:
    noisy: images.Rgb = (picture + rng.normal(0, NOISE_LEVELS[level], picture.shape)).clip(0, 255).astype(np.uint8)
    return noisy


def _contrast(picture: images.Rgb, level: int, rng: np.random.Generator) -> images.Rgb:
    mean = picture.mean(axis=(0, 1))
    flat: images.Rgb = (mean + (picture - mean) * CONTRAST[level]).clip(0, 255).astype(np.uint8)
    return flat


def _rotation(picture: images.Rgb, level: int, rng: np.random.Generator) -> images.Rgb:
    ground = tuple(int(value) for value in picture[0, 0])
    return np.asarray(Image.fromarray(picture).rotate(TURN_DEG[level], images.BILINEAR, fillcolor=ground))


def _invert(picture: images.Rgb, level: int, rng: np.random.Generator) -> images.Rgb:
    share = INVERTED[level]
    inverted: images.Rgb = np.rint(picture * (1 - share) + (255.0 - picture) * share).astype(np.uint8)
    return inverted


CORRUPTIONS: dict[str, Callable[[images.Rgb, int, np.random.Generator], images.Rgb]] = {
    "none": lambda picture, level, rng: picture,
    "blur": _blur,
    "noise": _noise,
    "contrast": _contrast,
    "rotation": _rotation,
    "invert": _invert,
}


def arrival(drift: Drift, seed: int, index: int, side: int) -> tuple[images.Rgb, int]:
    """(picture (side, side, 3), class) of request `index`."""
    rng, shifted = generator(seed, "arrivals", index), drift.shifted(index)
    label = label_of(rng, drift.after if shifted else drift.before)
    picture = clean(rng, label, side)
    return (corrupt(picture, drift.corruption, drift.severity, rng) if shifted else picture), label


def requests(options: DataOptions) -> list[Payload]:
    """All requests in the order of their arrival: JPEGs a little larger than image_size, with their classes."""
    drift, side = drift_of(options), common.request_side(options)
    seed = options.seed if drift.seed is None else drift.seed
    made = []
    for index in range(drift.count or options.count):
        picture, label = arrival(drift, seed, index, side)
        name = f"{SHAPES[label]}-{index}" + "-shifted" * drift.shifted(index)
        made.append(Payload(name, images.encode_jpeg(picture), label))
    return made


def training(options: DataOptions) -> Any:
    """`count` pictures from before the shift ("train", "test"), or the requests themselves ("arrivals")."""
    common.check_task("drift", options, TASKS)
    split = common.split_of("drift", options, SPLITS)
    if split == "arrivals":
        entries: list[Any] = [(payload.data, payload.label) for payload in requests(options)]
    else:
        drift = drift_of(options)
        seed = options.seed if drift.seed is None else drift.seed
        entries = [(drift.before, seed, split, index) for index in range(options.count)]
    return common.items("drift", entries, options, CLASSES)


def read(entry: Any, options: DataOptions) -> Any:
    """(normalised picture (3, image_size, image_size), class), prepared as a service prepares a request."""
    if len(entry) == 2:
        data, label = entry
        return common.normalised(images.decode_rgb(data), options.image_size), label
    mix, seed, split, index = entry
    rng = generator(seed, split, index)
    label = label_of(rng, mix)
    return common.normalised(clean(rng, label, common.request_side(options)), options.image_size), label


DATASETS = (
    Dataset(
        name="drift",
        tasks=TASKS,
        doc="made shapes whose distribution shifts at one request, 8 classes",
        requests=requests,
        training=training,
        labelled=True,
    ),
)
