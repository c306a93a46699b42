"""How good a model's answers are: the documented accuracy of its released weights, or the user's own table.

    kind             metric            source
    classification   top-1 %           torchvision, meta of each network's DEFAULT weights: ImageNet-1K val, acc@1
    segmentation     mIoU %            torchvision, meta of the DEFAULT weights: COCO val2017, VOC labels
    detection        mAP50-95 %        Ultralytics' table of YOLOv5u: COCO val2017 at 640 px

The figures stand here as numbers so that asking for them loads no torch; a test compares them with the installed
torchvision. They hold for released weights, as served there: a model with options that change its answers (precision,
image size, other weights) has no documented quality. The user's file gives it one, or overrides one:

    {"resnet18": 93.1, "resnet18:image_size=160,weights=mine.pt": {"quality": 91.4, "metric": "own test set %"}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from corun.errors import InputError
from corun.tasks.variant import Variant

TOP1: Final = "top-1 %"
MIOU: Final = "mIoU %"
MAP: Final = "mAP50-95 %"
OWN: Final = "% (own table)"

CLASSIFICATION: Final[Mapping[str, float]] = {
    "alexnet": 56.522,
    "convnext_base": 84.062,
    "densenet121": 74.434,
    "densenet201": 76.896,
    "efficientnet_v2_l": 85.808,
    "googlenet": 69.778,
    "inception_v3": 77.294,
    "mnasnet0_5": 67.734,
    "mobilenet_v2": 72.154,
    "mobilenet_v3_small": 67.668,
    "regnet_y_400mf": 75.804,
    "resnet18": 69.758,
    "resnet50": 80.858,
    "resnet152": 82.284,
    "shufflenet_v2_x1_0": 69.362,
    "squeezenet1_0": 58.092,
    "squeezenet1_1": 58.178,
    "vgg11": 69.02,
    "vgg16": 71.592,
    "vgg19": 72.376,
    "vit_b_16": 81.072,
    "vit_l_32": 76.972,
}
SEGMENTATION: Final[Mapping[str, float]] = {
    "deeplabv3_resnet50": 66.4,
    "deeplabv3_resnet101": 67.4,
    "deeplabv3_mobilenet_v3_large": 60.3,
}
DETECTION: Final[Mapping[str, float]] = {
    "yolov5n": 34.3,
    "yolov5s": 43.0,
    "yolov5m": 49.0,
    "yolov5l": 52.2,
    "yolov5x": 53.2,
}
_DOCUMENTED: Final = {
    **{name: (value, TOP1) for name, value in CLASSIFICATION.items()},
    **{name: (value, MIOU) for name, value in SEGMENTATION.items()},
    **{name: (value, MAP) for name, value in DETECTION.items()},
}


@dataclass(frozen=True)
class Quality:
    """value in percent of `metric`; own: from the user's table. None = unknown."""

    value: float | None
    metric: str = ""
    own: bool = False


@dataclass(frozen=True)
class QualityTable:
    """The documented figures under the user's own."""

    own: Mapping[str, tuple[float, str]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> QualityTable:
        """Read the user's JSON file; InputError lists every problem."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read the quality table {path}: {error}") from error
        if not isinstance(value, dict):
            raise InputError(f'the quality table {path} is not a JSON object such as {{"resnet18": 93.1}}')
        own: dict[str, tuple[float, str]] = {}
        problems = []
        for name, entry in value.items():
            try:
                key = Variant.parse(name).answers_as
                own[key] = _entry(entry)
            except InputError as error:
                details = [problem for problem in error.problems if not problem.startswith("known models")]
                problems += [f"{name}: {problem}" for problem in details or [error.what]]
        if problems:
            count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
            raise InputError(f"the quality table {path} has {count}", problems)
        return cls(own)

    def of(self, model: str) -> Quality:
        """Of a model as a task names it; options that change only its speed do not matter."""
        variant = Variant.parse(model)
        if variant.answers_as in self.own:
            value, metric = self.own[variant.answers_as]
            return Quality(value, metric, own=True)
        changed = {key for key in Variant.parse(variant.answers_as).options if key != "weights"}
        if variant.name in _DOCUMENTED and not changed and variant.options.get("weights", "default") == "default":
            return Quality(*_DOCUMENTED[variant.name])
        return Quality(None)


def _entry(entry: Any) -> tuple[float, str]:
    value, metric = entry, OWN
    if isinstance(entry, dict):
        unknown = sorted(set(entry) - {"quality", "metric"})
        if unknown:
            raise InputError(f"unknown key {', '.join(unknown)}; give quality and metric")
        value, metric = entry.get("quality"), entry.get("metric", OWN)
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not (0 <= value <= 100 and math.isfinite(value))
    ):
        raise InputError(f"give a quality of 0 to 100 (got {json.dumps(value)})")
    if not isinstance(metric, str):
        raise InputError(f"give the metric as text (got {json.dumps(metric)})")
    return float(value), metric
