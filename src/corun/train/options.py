"""What one training job is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OPTIMIZERS = ("sgd", "adam", "adamw")


@dataclass(frozen=True)
class PublishOptions:
    """Learning from labelled arrivals and publishing what came of it.

    directory: where versions go. arrivals: schedule file of the service's requests; stream: its client's.
    label_delay_s: from a request's arrival until its class is known. every_s: between two validations. samples:
    newest held-out arrivals that decide, at least `least` of them. gain: share of them by which a version must be
    better to replace another. window: newest arrivals to learn from; fresh_share: their part of a batch, the rest
    is the training set (so that what was known is not forgotten).
    """

    directory: str
    arrivals: str
    stream: int = 0
    label_delay_s: float = 1.0
    every_s: float = 2.0
    samples: int = 64
    least: int = 32
    gain: float = 0.03
    window: int = 512
    fresh_share: float = 0.75


@dataclass(frozen=True)
class TrainOptions:
    """One training job; every field lands in the manifest.

    epochs: 0 = until stopped. data: a data set's name, `name:/root` or a folder. image_size and num_classes:
    None = the model's and the data set's own. checkpoint: file that is replaced atomically at every epoch's end
    and at the stop. micro: micro-batches a step is cut into at least (a gate may ask for more). frozen_statistics:
    BatchNorm keeps its running statistics. layer_gate: the gate also stands between layers. run_ahead: micro-steps
    in flight on a GPU at most. publish: learn from labelled arrivals and publish, None = neither.
    """

    model: str
    data: str = "digits"
    batch_size: int = 16
    image_size: int | None = None
    num_classes: int | None = None
    epochs: int = 0
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    optimizer: str = "sgd"
    workers: int = 0
    seed: int = 0
    count: int = 1024
    device: str = "cpu"
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    weights: str | None = None
    checkpoint: Path | None = None
    resume: bool = False
    micro: int = 1
    frozen_statistics: bool = False
    layer_gate: bool = False
    run_ahead: int = 1
    publish: PublishOptions | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
