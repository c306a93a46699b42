"""YOLOv5 n, s, m, l, x: the v5u networks of the `ultralytics` package, served and trained offline.

These are the anchor-free v5u networks, not the anchor-based ones of the original repository: neither times nor
boxes compare with numbers published for those. The package is AGPL-3.0, and so, its authors say, are its weights;
it is imported in this module only, and the user brings the weights.

Importing it changes the whole process, so `library` imports it once, in quarantine: offline, without telemetry
or automatic installation, with safe loading; what it does to OMP_NUM_THREADS, the thread count, `PIL.Image.open`
(a corrupt picture would end in `pip install`), `torch.save` (retries with sleeps) and print options is undone.
`YOLO(...)`, `predict` and their hidden resizing, fusing and thread count are not used.

    JPEG -> letterbox to S x S -> network -> candidates above conf -> NMS per class -> boxes of the original image
            `preprocess`          `forward`  `to_host`               `postprocess`

Reply, little endian: uint32 count, then count x (float32 x1, y1, x2, y2, score, int32 class), best first; corners
in pixels of the original image. Random weights find almost nothing above conf 0.25, so the cost of NMS is then
missing: lower `conf`.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from corun import images, torch_tools
from corun.errors import InputError, suggest
from corun.registry import Model, ModelOptions, ServableInfo

if TYPE_CHECKING:
    import torch

IMAGE_SIZE = 640
STRIDE = 32
CLASSES = 80
PAD_VALUE = 114
MAX_CANDIDATES = 30_000
FIRST_CHANNELS = {16: "yolov5n", 32: "yolov5s", 48: "yolov5m", 64: "yolov5l", 80: "yolov5x"}
LICENCE = "AGPL-3.0"
REMEDY = "give a detection checkpoint saved by the ultralytics package, or a state dict of a v5u network"
# What such a checkpoint may name; the package checks the classes one by one.
CHECKPOINT_PACKAGES = ("ultralytics", "torch", "torchvision", "numpy", "pathlib", "builtins")
RELEASES = "https://github.com/ultralytics/assets/releases"

ENVIRONMENT = {
    "YOLO_OFFLINE": "1",
    "YOLO_AUTOINSTALL": "false",
    "ULTRALYTICS_SAFE_LOAD": "1",
    "YOLO_VERBOSE": "false",
}
COUNT = struct.Struct("<I")
DETECTION = np.dtype([("x1", "<f4"), ("y1", "<f4"), ("x2", "<f4"), ("y2", "<f4"), ("score", "<f4"), ("class", "<i4")])
# What only the anchor-based head of the original has: `anchors` and one bare convolution per level.
_ORIGINAL_HEAD = re.compile(r"(^|\.)model\.\d+\.(anchors|anchor_grid|m\.\d+\.(weight|bias))$")


@dataclass(frozen=True)
class YoloOptions:
    """What `ModelOptions.extra` may hold: thresholds of serving, gains of the training loss.

    conf: lowest score of a box. iou: overlap above which the lower box of a class is dropped.
    max_det: most boxes per image. box, cls, dfl: weights of the three loss terms.
    """

    conf: float = 0.25
    iou: float = 0.45
    max_det: int = 300
    box: float = 7.5
    cls: float = 0.5
    dfl: float = 1.5

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> YoloOptions:
        """Read the options; InputError lists every unknown name and every value out of range."""
        known = asdict(cls())
        problems = [f'"{name}" is unknown{suggest(name, known)}' for name in extra if name not in known]
        given = {name: value for name, value in extra.items() if name in known}
        problems += [problem for name, value in given.items() if (problem := _problem(name, value))]
        if problems:
            raise InputError(f"options of YOLOv5 are {', '.join(known)}", problems)
        return cls(**{name: type(known[name])(value) for name, value in given.items()})


def _problem(name: str, value: object) -> str:
    """What is wrong with one option, or an empty string."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return f"{name} is {value!r}: give a number"
    if name in ("conf", "iou") and not 0 <= value <= 1:
        return f"{name} is {value}: give a number from 0 to 1"
    if name == "max_det" and (value < 1 or value != int(value)):
        return f"max_det is {value}: give a whole number of at least 1"
    return f"{name} is {value}: give a number of at least 0" if value < 0 else ""


# --- The package, in quarantine ---------------------------------------------------------------------------------


def config_dir() -> Path:
    """Where the package keeps its settings file: $CORUN_CACHE or ~/.cache/corun, never the user's own."""
    base = os.environ.get("CORUN_CACHE") or Path.home() / ".cache" / "corun"
    directory = Path(base).expanduser() / "ultralytics"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="corun-ultralytics-"))
    return directory if os.access(directory, os.W_OK) else Path(tempfile.mkdtemp(prefix="corun-ultralytics-"))


@contextmanager
def _one_process_at_a_time(directory: Path) -> Iterator[None]:
    """Services start together and the first import writes the settings file: one after the other."""
    with open(directory / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _process_restored() -> Iterator[None]:
    """Undo what the import does to this process, except for the variables of ENVIRONMENT.

    The package sets OMP_NUM_THREADS=1 where it is unset or empty, which every child would inherit.
    """
    import torch
    from PIL import Image

    threads, environment = torch.get_num_threads(), dict(os.environ)
    open_image, save = Image.open, torch.save
    if not environment.get("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        with np.printoptions():
            yield
    finally:
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        Image.open, torch.save = open_image, save
        torch.set_printoptions(profile="default")
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@cache
def library() -> SimpleNamespace:
    """The parts of `ultralytics` in use, imported once: DetectionModel, v8DetectionLoss, torch_safe_load, recipe."""
    directory = config_dir()
    os.environ.update(ENVIRONMENT, YOLO_CONFIG_DIR=str(directory))
    with _process_restored(), _one_process_at_a_time(directory):
        from ultralytics.nn.tasks import DetectionModel, torch_safe_load
        from ultralytics.utils import ROOT, SETTINGS, YAML
        from ultralytics.utils.loss import v8DetectionLoss

        if SETTINGS["sync"]:
            SETTINGS.update(sync=False)
    return SimpleNamespace(
        DetectionModel=DetectionModel,
        v8DetectionLoss=v8DetectionLoss,
        torch_safe_load=torch_safe_load,
        recipe=partial(YAML.load, ROOT / "cfg" / "models" / "v5" / "yolov5.yaml"),
    )


# --- The network and its weights --------------------------------------------------------------------------------


def build(name: str, num_classes: int, seed: int) -> Any:
    """The network `name` with random weights, in train mode.

    Built from the package's own description, by content: a file of that name in the working directory, which
    the package would prefer, has no say.
    """
    parts = library()
    with torch_tools.seeded(seed):
        return parts.DetectionModel({**parts.recipe(), "scale": name[-1]}, nc=num_classes, verbose=False)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a v5u file: a checkpoint saved by the package, a bare state dict, or safetensors.

    Nothing of the file runs and nothing is downloaded. Raises InputError with what to do: a missing or
    damaged file, one of the original YOLOv5, one that holds more than a network.
    """
    if not path.is_file():
        raise InputError(f"weights file {path} does not exist: give a v5u checkpoint (.pt) or a state dict")
    named = [] if path.suffix == ".safetensors" else _named_by(path)
    if any(name.split(".")[0] == "models" for name in named):
        raise _original(path, "an original-YOLOv5 pickle")
    checkpoint = any(name.startswith("ultralytics.") for name in named)
    strange = [name for name in named if not checkpoint or name.split(".")[0] not in CHECKPOINT_PACKAGES]
    if strange:
        problem = f"loading it would import {', '.join(sorted(strange)[:6])}"
        raise InputError(f"{path} is refused: it holds more than a v5u network", [problem, REMEDY])
    state = _read_checkpoint(path) if checkpoint else torch_tools.read_state_dict(path)
    if any(_ORIGINAL_HEAD.search(name) for name in state):
        raise _original(path, "a state dict of the original YOLOv5 (its head has anchors)")
    return state


def _named_by(path: Path) -> list[str]:
    """The classes and functions that unpickling the file would import; nothing of it runs."""
    import pickle

    import torch

    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        problems = [str(error).splitlines()[0], "save it again with torch.save (torch 1.6 or later)"]
        raise InputError(f"{path} is not a checkpoint that can be checked before loading", problems) from None


def _original(path: Path, what: str) -> InputError:
    return InputError(
        f"{path} is {what}, and the networks served here are v5u, which its weights do not fit",
        [f"give a v5u checkpoint: one trained with the ultralytics package, or yolov5*u.pt from {RELEASES}"],
    )


@contextmanager
def _allow_list_restored() -> Iterator[None]:
    """Forget the classes that a load of the package allows for the rest of the process."""
    import torch

    allowed = torch.serialization.get_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The state dict inside a checkpoint of the package, loaded with its list of allowed classes.

    The package is shown the file under a neutral name: a path like `yolov5n.pt` it would rewrite to
    `yolov5nu.pt`, then load that file instead, or try to download it.
    """
    import pickle

    import torch

    with _allow_list_restored(), tempfile.TemporaryDirectory(prefix="corun-") as directory:
        neutral = Path(directory, "checkpoint.pt")
        neutral.symlink_to(path.resolve())
        try:
            checkpoint, _ = library().torch_safe_load(str(neutral), safe_only=True)
        except (TypeError, ImportError, AttributeError, RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0].replace(str(neutral), str(path))
            raise InputError(f"{path} cannot be loaded safely", [reason, REMEDY]) from None
    network = checkpoint.get("ema") or checkpoint.get("model")
    if not isinstance(network, torch.nn.Module):
        raise InputError(f"{path} holds no network", [REMEDY])
    return dict(network.float().state_dict())


def _classes_in(state: Mapping[str, torch.Tensor]) -> int | None:
    """How many classes the head of a state dict has, or None when it has no v5u head."""
    bias = state.get("model.24.cv3.0.2.bias")
    return None if bias is None else int(bias.shape[0])


def network_of(name: str, options: ModelOptions) -> tuple[Any, int, str]:
    """The network, its number of parameters before folding, and the label of its weights."""
    if options.weights is None:
        network = build(name, options.num_classes or CLASSES, options.seed)
        return network, torch_tools.count_params(network), "random"
    if options.weights == "default":
        raise InputError(
            f'weights "default" of {name} are not downloaded (they are {LICENCE})',
            [f"get {name}u.pt from {RELEASES} and give its path as weights"],
        )
    path = Path(options.weights).expanduser()
    state = read_weights(path)
    classes = _classes_in(state) or options.num_classes or CLASSES
    if options.num_classes not in (None, classes):
        raise InputError(f"{path} is for {classes} classes, not for num_classes {options.num_classes}")
    network = build(name, classes, options.seed)
    params = torch_tools.count_params(network)
    _load(network, state, name, path)
    return network, params, torch_tools.sha256_label(path)


def _load(network: Any, state: Mapping[str, torch.Tensor], name: str, path: Path) -> None:
    """Load strictly; a checkpoint saved after its BatchNorm was folded is loaded into a folded network."""
    first = state.get("model.0.conv.weight")
    fits = FIRST_CHANNELS.get(first.shape[0]) if first is not None else None
    if fits not in (None, name):
        raise InputError(f"{path} holds the weights of {fits}, not of {name}: name the model {fits}")
    if "model.0.conv.bias" in state and "model.0.bn.weight" not in state:
        network.fuse(verbose=False)
    torch_tools.load_strict(network, state, path)


def image_size(options: ModelOptions) -> int:
    """The side of the network's input in pixels; InputError unless it is a multiple of 32."""
    size = options.image_size or IMAGE_SIZE
    if size < STRIDE or size % STRIDE:
        below = max(STRIDE, size // STRIDE * STRIDE)
        raise InputError(
            f"image size {size} does not fit YOLOv5: give a multiple of {STRIDE}, e.g. {below} or {below + STRIDE}"
        )
    return size


def _info(name: str, options: ModelOptions, params: int, weights: str, notes: str) -> ServableInfo:
    return ServableInfo(
        name, "detection", params, image_size(options), weights, options.precision, options.device, notes
    )


# --- Geometry and suppression -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """How an image lies in its square: a point (x, y) of it is at (x * gain_x + left, y * gain_y + top)."""

    width: int
    height: int
    gain_x: float
    gain_y: float
    left: int
    top: int

    def back(self, boxes: torch.Tensor) -> torch.Tensor:
        """Corners (n, 4) in the square to corners in the original image, clipped to it."""
        offset = boxes.new_tensor((self.left, self.top) * 2)
        gain = boxes.new_tensor((self.gain_x, self.gain_y) * 2)
        limit = boxes.new_tensor((self.width, self.height) * 2)
        return ((boxes - offset) / gain).clamp(min=0).minimum(limit)


def letterbox(image: images.Rgb, size: int) -> tuple[images.Rgb, Fit]:
    """Fit an RGB image into a size x size square on grey 114, bit for bit as the package's `predict` does.

    That includes OpenCV's bilinear resize, which does not antialias; hence not `images.letterbox`.
    """
    import cv2

    height, width = image.shape[:2]
    scale = min(size / height, size / width)
    new_width, new_height = max(round(width * scale), 1), max(round(height * scale), 1)
    left, top = (size - new_width) // 2, (size - new_height) // 2
    square = np.full((size, size, 3), PAD_VALUE, dtype=np.uint8)
    if (new_height, new_width) != (height, width):
        image = np.asarray(cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR), np.uint8)
    square[top : top + new_height, left : left + new_width] = image
    return square, Fit(width, height, new_width / width, new_height / height, left, top)


def decode_heads(heads: Mapping[str, Any], strides: Sequence[float]) -> torch.Tensor:
    """Decode raw head outputs in float32: (B, 4 + classes, N), rows x, y, width, height, scores.

    Distances to the four sides are expectations over 16 bins (distribution focal loss, arXiv:2006.04388).
    The network's own decoding runs in its precision: bfloat16 has steps of 4 pixels at 640.
    """
    import torch

    bins = heads["boxes"].float().unflatten(1, (4, -1)).softmax(2)
    sides = (bins * torch.arange(bins.shape[2], device=bins.device)[:, None]).sum(2)
    centres, scales = [], []
    for level, stride in zip(heads["feats"], strides, strict=True):
        rows, columns = (torch.arange(n, device=bins.device) + 0.5 for n in level.shape[2:])
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centres.append(torch.stack((x.flatten(), y.flatten())))
        scales.append(torch.full((x.numel(),), float(stride), device=bins.device))
    centre, near, far = torch.cat(centres, 1), sides[:, :2], sides[:, 2:]
    boxes = torch.cat((centre + (far - near) / 2, near + far), 1) * torch.cat(scales)
    return torch.cat((boxes, heads["scores"].float().sigmoid()), 1)


def candidates(predictions: torch.Tensor, conf: float) -> torch.Tensor:
    """Places whose best class scores above `conf`: rows of (x1, y1, x2, y2, score, class, image), float32."""
    import torch

    predictions = predictions.float()
    scores, classes = predictions[:, 4:].max(1)
    image, place = (scores > conf).nonzero(as_tuple=True)
    centre, size = predictions[image, :4, place].split(2, 1)
    columns = (scores[image, place], classes[image, place], image)
    return torch.cat(
        (centre - size / 2, centre + size / 2, torch.stack([column.float() for column in columns], 1)), 1
    )


def suppress(boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, iou: float) -> torch.Tensor:
    """Non-maximum suppression per class: indices of the boxes kept, best first."""
    import torch
    import torchvision

    if not hasattr(torch.ops.torchvision, "nms"):
        return suppress_in_torch(boxes, scores, classes, iou)
    kept: torch.Tensor = torchvision.ops.batched_nms(boxes, scores, classes, iou)
    return kept


def suppress_in_torch(boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, iou: float) -> torch.Tensor:
    """The same as `suppress` for a torchvision built without its compiled operators; slow with many boxes."""
    import torch
    from torchvision.ops import box_iou

    order, kept = scores.argsort(descending=True, stable=True), []
    while order.numel():
        best, order = order[0], order[1:]
        kept.append(best)
        overlap = box_iou(boxes[best, None], boxes[order])[0]
        order = order[(overlap <= iou) | (classes[order] != classes[best])]
    return torch.stack(kept) if kept else order


def encode_detections(rows: NDArray[Any]) -> bytes:
    """The reply payload of detections, an array of dtype DETECTION."""
    return COUNT.pack(len(rows)) + rows.tobytes()


def decode_detections(payload: bytes) -> NDArray[Any]:
    """A reply payload as an array of dtype DETECTION; ValueError when its length is not what it counts."""
    if len(payload) < COUNT.size:
        raise ValueError(f"a detection reply has at least {COUNT.size} bytes, this one {len(payload)}")
    (count,) = COUNT.unpack_from(payload)
    if len(payload) != COUNT.size + count * DETECTION.itemsize:
        raise ValueError(f"a detection reply of {count} boxes does not have {len(payload)} bytes")
    return np.frombuffer(payload, DETECTION, count, COUNT.size)


# --- Serving ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Letterboxed:
    """A batch between two stages: a tensor, and how each image lies in its square.

    tensor: squares (B, 3, S, S), then predictions (B, 4 + classes, N), then candidate rows (K, 7).
    """

    tensor: torch.Tensor
    fits: tuple[Fit, ...]


class YoloServable(torch_tools.ImageServable):
    """YOLOv5u behind JPEG or PNG requests; the reply's layout is in the module's docstring."""

    def __init__(self, network: Any, options: ModelOptions, info: ServableInfo, thresholds: YoloOptions) -> None:
        self.strides = tuple(network.stride.tolist())
        self.thresholds = thresholds
        super().__init__(network.fuse(verbose=False), options, info)

    def preprocess(self, samples: list[images.Rgb]) -> Letterboxed:
        """Squares in [0, 1], RGB, on the host."""
        boxed = [letterbox(sample, self.info.image_size) for sample in samples]
        squares = torch_tools.host_batch([images.scaled(square) for square, _ in boxed], self.device)
        return Letterboxed(squares, tuple(fit for _, fit in boxed))

    def to_device(self, batch: Any) -> Any:
        """The squares to the device and into the network's precision."""
        return Letterboxed(super().to_device(batch.tensor), batch.fits)

    def forward(self, batch: Any) -> Any:
        """Decoded predictions, (B, 4 + classes, N); in float32 whatever the precision of the network."""
        decoded, heads = super().forward(batch.tensor)
        if self.info.precision != "fp32":
            decoded = decode_heads(heads, self.strides)
        return Letterboxed(decoded, batch.fits)

    def to_host(self, output: Any) -> Any:
        """Only the candidates cross to the host: they are few, the predictions 2.8 MB an image at 640."""
        return Letterboxed(candidates(output.tensor, self.thresholds.conf).cpu(), output.fits)

    def postprocess(self, output: Letterboxed, count: int) -> list[bytes]:
        """Suppression per class, then boxes in pixels of each original image."""
        rows = output.tensor
        return [self._reply(rows[rows[:, 6] == index], output.fits[index]) for index in range(count)]

    def _reply(self, rows: torch.Tensor, fit: Fit) -> bytes:
        if len(rows) > MAX_CANDIDATES:
            rows = rows[rows[:, 4].topk(MAX_CANDIDATES).indices]
        kept = suppress(rows[:, :4], rows[:, 4], rows[:, 5], self.thresholds.iou)
        rows = rows[kept[: self.thresholds.max_det]]
        found = np.empty(len(rows), DETECTION)
        for name, column in zip(("x1", "y1", "x2", "y2"), fit.back(rows[:, :4]).T, strict=True):
            found[name] = column.numpy()
        found["score"], found["class"] = rows[:, 4].numpy(), rows[:, 5].numpy()
        return encode_detections(found)


def serve(name: str, options: ModelOptions) -> YoloServable:
    """Build `name` for serving. extra: conf, iou, max_det."""
    image_size(options)
    thresholds = YoloOptions.of(options.extra)
    network, params, weights = network_of(name, options)
    notes = f"v5u; conf {thresholds.conf:g}, iou {thresholds.iou:g}, max_det {thresholds.max_det}"
    return YoloServable(network, options, _info(name, options, params, weights, notes), thresholds)


# --- Training ---------------------------------------------------------------------------------------------------


class YoloTrainable:
    """YOLOv5u under the package's own detection loss: CIoU + class BCE + distribution focal loss."""

    def __init__(self, network: Any, options: ModelOptions, info: ServableInfo, gains: YoloOptions) -> None:
        self.module = torch_tools.place_for_training(network, options)
        self.info = info
        # At 32 pixels the deepest map has one cell, and BatchNorm needs two values per channel.
        self.min_batch = 1 if info.image_size > STRIDE else 2
        self._options = options
        self._classes = network.model[-1].nc
        network.args = SimpleNamespace(box=gains.box, cls=gains.cls, dfl=gains.dfl)
        self._criterion = library().v8DetectionLoss(network)

    def loss(self, batch: tuple[torch.Tensor, list[dict[str, torch.Tensor]]]) -> torch.Tensor:
        """Loss per image, a scalar, of (images (B, 3, H, W) in [0, 1], B targets {"boxes", "labels"}).

        boxes: float (n, 4), corners x1, y1, x2, y2 in pixels of the image; labels: int64 (n,).
        Raises InputError: fewer images than min_batch, sides that are no multiples of 32, a class too high.
        """
        pictures, targets = batch
        self._check(pictures, targets)
        with torch_tools.autocast(self._options):
            heads = self._criterion.parse_output(self.module(pictures))
        heads = {**heads, "boxes": heads["boxes"].float(), "scores": heads["scores"].float()}
        total, _ = self._criterion.loss(heads, _flat_targets(pictures, targets))
        mean: torch.Tensor = total.sum() / len(pictures)
        return mean

    def _check(self, pictures: torch.Tensor, targets: Sequence[Mapping[str, torch.Tensor]]) -> None:
        count, _, height, width = pictures.shape
        if count < self.min_batch:
            raise InputError(
                f"a batch of {count} cannot train {self.info.model} at {width} pixels: BatchNorm needs more than"
                f" one value per channel; use a batch of at least {self.min_batch}"
            )
        if height % STRIDE or width % STRIDE:
            raise InputError(f"training images of {width}x{height} do not fit: give multiples of {STRIDE}")
        highest = max((int(target["labels"].max()) for target in targets if len(target["labels"])), default=0)
        if highest >= self._classes:
            raise InputError(
                f"label {highest} is outside the network's {self._classes} classes: set num_classes to the data's"
            )


def _flat_targets(pictures: torch.Tensor, targets: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Targets as the package's loss takes them: one row per box, centre and size relative to the image."""
    import torch

    height, width = pictures.shape[2:]
    boxes = torch.cat([target["boxes"].reshape(-1, 4) for target in targets]).to(pictures.device, torch.float32)
    labels = torch.cat([target["labels"] for target in targets]).to(pictures.device, torch.float32)
    counts = torch.tensor([len(target["labels"]) for target in targets], device=pictures.device)
    image = torch.arange(len(targets), device=pictures.device).repeat_interleave(counts)
    near, far = boxes[:, :2], boxes[:, 2:]
    relative = torch.cat(((near + far) / 2, far - near), 1) / boxes.new_tensor((width, height) * 2)
    return {"batch_idx": image.float(), "cls": labels, "bboxes": relative}


def train(name: str, options: ModelOptions) -> YoloTrainable:
    """Build `name` for training. extra: box, cls, dfl."""
    image_size(options)
    gains = YoloOptions.of(options.extra)
    network, params, weights = network_of(name, options)
    if network.is_fused():
        raise InputError(
            f"{options.weights} was saved with its BatchNorm folded, so it can be served but not trained",
            ["give the checkpoint as it was saved before predict or fuse was called on it"],
        )
    return YoloTrainable(network, options, _info(name, options, params, weights, "v5u"), gains)


MODELS = tuple(
    Model(
        name=name,
        family="yolov5",
        task="detection",
        image_size=IMAGE_SIZE,
        serve=partial(serve, name),
        train=partial(train, name),
        code_licence=LICENCE,
        weights_licence=f"{LICENCE} (brought by the user)",
        notes="the v5u network of the ultralytics package, not the original YOLOv5",
    )
    for name in FIRST_CHANNELS.values()
)
