"""Plug-ins: every `models/*.py` and `datasets/*.py` is loaded by its path and lists what it offers.

A module of `models/` has `MODELS: tuple[Model, ...]`, one of `datasets/` has `DATASETS: tuple[Dataset, ...]`.
Listing must be cheap: plug-ins import torch inside functions, so `--help`, `--dry-run` and a client never
pay for it. Files whose name starts with an underscore are not plug-ins.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from corun.errors import InputError, suggest

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class ModelOptions:
    """How to build a model; every field lands in the manifest.

    weights: None = random by seed, "default" = the library's released weights, else a path to a state dict.
    device: "cpu", "cuda" or "cuda:N" ("auto" is resolved before this object is made).
    extra: options of one family, e.g. {"conf": 0.25} of YOLO.
    """

    weights: str | None = None
    device: str = "cpu"
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    image_size: int | None = None
    num_classes: int | None = None
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ServableInfo:
    """What a built model says about itself (HELLO, manifest, tables).

    version: of published weights (corun.weights), None while it serves those it was loaded with.
    """

    model: str
    task: str
    params: int
    image_size: int
    weights: str
    precision: str
    device: str
    notes: str = ""
    version: int | None = None


class Servable(Protocol):
    """One model ready to answer; the engine calls the stages in this order and stamps between them."""

    info: ServableInfo

    def decode(self, payload: bytes) -> Any:
        """One request's bytes to one host sample; ValueError with a sentence when they are corrupt."""

    def preprocess(self, samples: list[Any]) -> Any:
        """Host samples to one host batch."""

    def to_device(self, batch: Any) -> Any:
        """Host batch to the device (asynchronous on CUDA)."""

    def forward(self, batch: Any) -> Any:
        """The network (asynchronous on CUDA)."""

    def to_host(self, output: Any) -> Any:
        """Results back on the host, complete when it returns."""

    def postprocess(self, output: Any, count: int) -> list[bytes]:
        """One reply payload per sample, in order."""

    def example(self) -> bytes:
        """A valid request payload, for warm-up."""


class Trainable(Protocol):
    """One model ready to be trained."""

    module: Any
    info: ServableInfo
    min_batch: int

    def loss(self, batch: Any) -> Any:
        """Mean loss over a collated batch that is already on the device: a scalar tensor with a graph."""


@dataclass(frozen=True)
class Model:
    """One row of the model table."""

    name: str
    family: str
    task: str
    image_size: int
    serve: Callable[[ModelOptions], Servable]
    train: Callable[[ModelOptions], Trainable] | None
    code_licence: str
    weights_licence: str
    notes: str = ""


@dataclass(frozen=True)
class Payload:
    """One request body: a name for the log, the encoded bytes (an image file, as a camera sends it), its true class."""

    name: str
    data: bytes
    label: int | None = None


@dataclass(frozen=True)
class DataOptions:
    """Which part of a data set to read, and how."""

    root: Path | None = None
    image_size: int = 224
    count: int = 64
    seed: int = 0
    task: str = "classification"
    num_classes: int | None = None
    split: str = "train"
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """One data set: request payloads for clients (no torch) and a map-style torch data set for trainers.

    labelled: requests carry their class, and `training` has them in their order as split "arrivals".
    """

    name: str
    tasks: frozenset[str]
    doc: str
    requests: Callable[[DataOptions], list[Payload]]
    training: Callable[[DataOptions], Any] | None
    labelled: bool = False


def home() -> Path:
    """The directory that holds models/ and datasets/: $CORUN_HOME or the checkout of this file."""
    return Path(os.environ.get("CORUN_HOME") or Path(__file__).resolve().parents[2])


def data_root(name: str) -> Path:
    """Where data set `name` lies by default: $CORUN_DATA or ~/Documents/datasets, as the original has it."""
    base = os.environ.get("CORUN_DATA") or Path.home() / "Documents" / "datasets"
    return Path(base).expanduser() / name


@cache
def load_plugin(kind: str, stem: str) -> ModuleType:
    """Import `<home>/<kind>/<stem>.py` as `corun_plugins_<kind>_<stem>`."""
    path = home() / kind / f"{stem}.py"
    name = f"corun_plugins_{kind}_{stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _plugins(kind: str) -> list[ModuleType]:
    directory = home() / kind
    stems = sorted(path.stem for path in directory.glob("*.py") if not path.stem.startswith("_"))
    if not stems:
        raise InputError(f"no plug-ins in {directory}: set CORUN_HOME to a checkout that has {kind}/")
    return [load_plugin(kind, stem) for stem in stems]


@cache
def models() -> dict[str, Model]:
    """Every model by name."""
    return {row.name: row for module in _plugins("models") for row in module.MODELS}


@cache
def datasets() -> dict[str, Dataset]:
    """Every data set by name."""
    return {row.name: row for module in _plugins("datasets") for row in module.DATASETS}


def model(name: str) -> Model:
    """The model called `name`; InputError with a suggestion when there is none."""
    known = models()
    if name not in known:
        raise InputError(f'unknown model "{name}"{suggest(name, known)}', [f"known models: {', '.join(known)}"])
    return known[name]


def dataset(name: str) -> Dataset:
    """The data set called `name`, or `folder` for a path; InputError with a suggestion when there is none."""
    known = datasets()
    if name not in known:
        raise InputError(
            f'unknown data set "{name}"{suggest(name, known)}',
            [f"known data sets: {', '.join(known)}; a folder of images is given by its path"],
        )
    return known[name]


def resolve_data(spec: str) -> tuple[Dataset, Path | None]:
    """A data set's name, `name:/root`, or a folder's path, as (data set, root or None)."""
    name, colon, root = spec.partition(":")
    if colon and name in datasets():
        return dataset(name), Path(root).expanduser()
    if spec not in datasets() and (os.sep in spec or spec in (".", "..") or Path(spec).is_dir()):
        return dataset("folder"), Path(spec).expanduser()
    return dataset(spec), None


def fitting_data(spec: str, task: str) -> str:
    """The data set asked for; a model that generates text gets `text` in place of the default pictures."""
    return "text" if task == "generation" and spec in ("sample", "digits") else spec


def request_payloads(spec: str, options: DataOptions) -> Sequence[Payload]:
    """Payloads of a data set given as on the command line."""
    from dataclasses import replace

    source, root = resolve_data(spec)
    return source.requests(replace(options, root=root or options.root))
