"""DeepLabV3 with three torchvision backbones: semantic segmentation, served as compressed class maps.

The whole picture is resized to a square of `image_size` (224 unless asked; torchvision's own evaluation uses 520
on the shorter side), so that pictures of any shape make one batch. The map answers for that square: point (x, y)
of the picture is in cell (x * width_map / width, y * height_map / height).

Reply, little endian: uint16 height, uint16 width, uint8 classes, then a zlib stream of height x width bytes, the
class of each cell, row by row. `decode_class_map` reads it.

The auxiliary head of released checkpoints exists for training; a served network is built with it, to load them
strictly, and then runs without it. Training needs two pictures at least: the network averages each picture to one
value per channel, and BatchNorm over one value is undefined.
"""

from __future__ import annotations

import struct
import zlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from corun import images, torch_tools
from corun.errors import InputError, suggest
from corun.registry import Model, ModelOptions, ServableInfo

if TYPE_CHECKING:
    import torch

ARCHITECTURES = ("deeplabv3_resnet50", "deeplabv3_resnet101", "deeplabv3_mobilenet_v3_large")
IMAGE_SIZE = 224
MAX_IMAGE_SIZE = 65_535
CLASSES = 21
MAX_CLASSES = 255
IGNORED = 255
AUX_WEIGHT = 0.5
LICENCE = "BSD-3-Clause"

HEADER = struct.Struct("<HHB")
# Level 1: maps are long runs of one class, and higher levels cost far more time than they save bytes.
ZLIB_LEVEL = 1


# --- The network and its weights --------------------------------------------------------------------------------


def build(name: str, num_classes: int, aux: bool, seed: int) -> Any:
    """The network `name` with random weights; nothing is downloaded, not even a backbone."""
    from torchvision.models import segmentation

    with torch_tools.seeded(seed):
        return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=aux)


def released(name: str) -> Any:
    """The network with torchvision's released weights (COCO, 21 classes of VOC, with the auxiliary head).

    They come from torch's cache or, once, from download.pytorch.org; InputError when neither works.
    """
    from torchvision.models import get_model

    try:
        return get_model(name, weights="DEFAULT", weights_backbone=None, progress=False)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f'weights "default" of {name} cannot be fetched: {error}',
            ["fetch them once on a machine with network, and give the file's path as weights"],
        ) from None


def network_of(name: str, options: ModelOptions, aux: bool) -> tuple[Any, str]:
    """The network and the label of its weights; the auxiliary head is there if `aux` or if the weights have it."""
    wanted = classes(options)
    if options.weights is None:
        return build(name, wanted or CLASSES, aux, options.seed), "random"
    if options.weights == "default":
        if wanted not in (None, CLASSES):
            raise InputError(f'weights "default" are for {CLASSES} classes, not for num_classes {wanted}')
        return released(name), "default"
    path = Path(options.weights).expanduser()
    state = torch_tools.read_state_dict(path)
    last = state.get("classifier.4.weight")
    found = wanted or CLASSES if last is None else int(last.shape[0])
    if wanted not in (None, found) or found > MAX_CLASSES:
        limit = f"num_classes {wanted}" if wanted else f"at most {MAX_CLASSES}"
        raise InputError(f"{path} is for {found} classes, not for {limit}")
    has_aux = any(key.startswith("aux_classifier.") for key in state)
    if aux and not has_aux:
        raise InputError(f"{path} has no auxiliary head (aux_classifier.*): leave aux out")
    network = build(name, found, has_aux, options.seed)
    torch_tools.load_strict(network, state, path)
    return network, torch_tools.sha256_label(path)


def classes(options: ModelOptions) -> int | None:
    """The number of classes asked for; a class is one byte of the map and 255 means "ignore"."""
    if options.num_classes is not None and not 1 <= options.num_classes <= MAX_CLASSES:
        raise InputError(f"num_classes {options.num_classes} does not fit: give 1 to {MAX_CLASSES}")
    return options.num_classes


def image_size(options: ModelOptions) -> int:
    """The side of the network's square input and of the map, in pixels."""
    size = IMAGE_SIZE if options.image_size is None else options.image_size
    if not 1 <= size <= MAX_IMAGE_SIZE:
        raise InputError(f"image size {size} does not fit: give 1 to {MAX_IMAGE_SIZE}")
    return size


def wants_aux(options: ModelOptions) -> bool:
    """`extra` as read: {"aux": true} trains random weights with the auxiliary head."""
    unknown = [name for name in options.extra if name != "aux"]
    if unknown:
        problems = [f'"{name}" is unknown{suggest(name, ["aux"])}' for name in unknown]
        raise InputError("the only option of DeepLabV3 is aux", problems)
    aux = options.extra.get("aux", False)
    if not isinstance(aux, bool):
        raise InputError(f"aux is {aux!r}: give true or false")
    return aux


def _info(name: str, options: ModelOptions, network: Any, weights: str, notes: str) -> ServableInfo:
    return ServableInfo(
        model=name,
        task="segmentation",
        params=torch_tools.count_params(network),
        image_size=image_size(options),
        weights=weights,
        precision=options.precision,
        device=options.device,
        notes=notes,
    )


# --- Serving ----------------------------------------------------------------------------------------------------


def encode_class_map(class_map: NDArray[np.uint8], num_classes: int) -> bytes:
    """The reply payload of one class map, uint8 (height, width)."""
    height, width = class_map.shape
    body = zlib.compress(np.ascontiguousarray(class_map).tobytes(), ZLIB_LEVEL)
    return HEADER.pack(height, width, num_classes) + body


def decode_class_map(payload: bytes) -> tuple[NDArray[np.uint8], int]:
    """A reply payload as (class map uint8 (height, width), number of classes); ValueError when it is corrupt."""
    if len(payload) < HEADER.size:
        raise ValueError(f"a class map has at least {HEADER.size} bytes, this one {len(payload)}")
    height, width, num_classes = HEADER.unpack_from(payload)
    size = height * width
    stream = zlib.decompressobj()
    try:
        cells = stream.decompress(payload[HEADER.size :], size + 1)
    except zlib.error as error:
        raise ValueError(f"a class map of {len(payload)} bytes is corrupt: {error}") from None
    if len(cells) != size or not stream.eof or stream.unused_data:
        raise ValueError(f"a class map of {height}x{width} does not hold just {size} cells")
    return np.frombuffer(cells, np.uint8).reshape(height, width), num_classes


class DeepLabServable(torch_tools.ImageServable):
    """DeepLabV3 behind JPEG or PNG requests; the reply's layout is in the module's docstring."""

    def __init__(self, network: Any, options: ModelOptions, info: ServableInfo) -> None:
        self.num_classes = network.classifier[-1].out_channels
        super().__init__(network, options, info)

    def preprocess(self, samples: list[images.Rgb]) -> torch.Tensor:
        """Whole pictures as squares with ImageNet's statistics, float32 (B, 3, S, S)."""
        side = self.info.image_size
        squares = [images.normalise(images.resize(sample, side, side)) for sample in samples]
        return torch_tools.host_batch(squares, self.device)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Class maps, uint8 (B, S, S): the largest score is found on the device, and one byte a cell leaves it."""
        import torch

        maps: torch.Tensor = super().forward(batch)["out"].argmax(1).to(torch.uint8)
        return maps

    def to_host(self, output: torch.Tensor) -> torch.Tensor:
        """The maps on the host, still uint8."""
        return output.cpu()

    def postprocess(self, output: torch.Tensor, count: int) -> list[bytes]:
        """One compressed map per sample."""
        return [encode_class_map(output[index].numpy(), self.num_classes) for index in range(count)]


def serve(name: str, options: ModelOptions) -> DeepLabServable:
    """Build `name` for serving, without its auxiliary head."""
    image_size(options)
    wants_aux(options)
    network, weights = network_of(name, options, aux=False)
    network.aux_classifier = None
    notes = f"{network.classifier[-1].out_channels} classes; map at the network's input size"
    return DeepLabServable(network, options, _info(name, options, network, weights, notes))


# --- Training ---------------------------------------------------------------------------------------------------


class DeepLabTrainable:
    """DeepLabV3 under pixel-wise cross-entropy: loss(out) + 0.5 loss(aux) where there is an auxiliary head."""

    min_batch = 2

    def __init__(self, network: Any, options: ModelOptions, info: ServableInfo) -> None:
        self.module = torch_tools.place_for_training(network, options)
        self.info = info
        self.num_classes = network.classifier[-1].out_channels
        self._options = options

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Mean over labelled pixels of (images (B, 3, H, W), masks int64 (B, H, W) with 255 = ignore): a scalar.

        Raises InputError: one image only, or a class the network does not have.
        """
        pictures, masks = batch
        self._check(pictures, masks)
        with torch_tools.autocast(self._options):
            output = self.module(pictures)
        total = _cross_entropy(output["out"], masks)
        return total + AUX_WEIGHT * _cross_entropy(output["aux"], masks) if "aux" in output else total

    def _check(self, pictures: torch.Tensor, masks: torch.Tensor) -> None:
        if len(pictures) < self.min_batch and self.module.training:
            raise InputError(
                f"a batch of {len(pictures)} cannot train {self.info.model}: its pooling branch leaves one value per"
                f" channel and picture, and BatchNorm needs two; use a batch of at least {self.min_batch}"
            )
        highest = int(masks.where(masks != IGNORED, 0).max())
        if highest >= self.num_classes:
            raise InputError(
                f"class {highest} in a mask is outside the network's {self.num_classes}:"
                " set num_classes to the data's"
            )


def _cross_entropy(scores: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Cross-entropy per labelled pixel, in float32; 0 and not NaN when no pixel is labelled."""
    from torch.nn import functional

    total = functional.cross_entropy(scores.float(), masks, ignore_index=IGNORED, reduction="sum")
    return total / (masks != IGNORED).sum().clamp(min=1)


def train(name: str, options: ModelOptions) -> DeepLabTrainable:
    """Build `name` for training. extra: aux (weights from a file decide that themselves)."""
    image_size(options)
    network, weights = network_of(name, options, wants_aux(options))
    notes = "with auxiliary head" if network.aux_classifier is not None else ""
    return DeepLabTrainable(network, options, _info(name, options, network, weights, notes))


MODELS = tuple(
    Model(
        name=name,
        family="deeplabv3",
        task="segmentation",
        image_size=IMAGE_SIZE,
        serve=partial(serve, name),
        train=partial(train, name),
        code_licence=LICENCE,
        weights_licence=f"{LICENCE} (torchvision's, trained on COCO)",
        notes="21 classes unless num_classes says otherwise (Cityscapes: 19); trains in batches of 2 or more",
    )
    for name in ARCHITECTURES
)
