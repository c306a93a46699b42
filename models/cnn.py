"""The 22 torchvision classifiers: 21 networks of the original study and vit_l_32.

A request is one JPEG or PNG; a reply is the top five classes. Images are prepared as torchvision evaluates that
network's released weights (`weights=DEFAULT`), scaled to the image size in use:

    shorter side to round(image_size * resize / crop)  ->  centre crop image_size  ->  (x / 255 - mean) / std

where resize / crop is 256/224 for most networks, 232/224 for the newer recipes and 1 for efficientnet_v2_l; at
image_size = crop this equals `weights.transforms()` bit for bit.

Three things differ from calling torchvision's builders directly:

- googlenet and inception_v3 are built with init_weights=False (their truncated-normal initialisation takes
  seconds) and always with transform_input=True: released files expect it, and files trained here then agree.
- Auxiliary heads exist only where they are used: in training. Serving drops them, also from a checkpoint.
- A ViT at another size than its checkpoint's gets its position embedding interpolated (bicubic).
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from corun import images, torch_tools
from corun.errors import InputError
from corun.registry import Model, ModelOptions, ServableInfo

if TYPE_CHECKING:
    import torch

TOP = 5
TOP_DTYPE = np.dtype([("class", "<i4"), ("probability", "<f4")])
IMAGENET_CLASSES = 1000
CODE_LICENCE = "BSD-3-Clause (torchvision)"
WEIGHTS_LICENCE = "BSD-3-Clause (torchvision); trained on ImageNet-1k, whose terms are non-commercial research"

AUX_PREFIXES = ("aux1.", "aux2.", "AuxLogits.")
AUX_WEIGHT = {"googlenet": 0.3, "inception_v3": 0.4}
INCEPTION_AUX_FROM = 299
OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)")
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Network:
    """One classifier: sizes in pixels.

    minimum: smallest image a forward pass accepts. single_from: smallest image with which a batch of one can
    train (below it a BatchNorm sees one value per channel). patch: ViT only, image_size is a multiple of it.
    """

    name: str
    minimum: int = 1
    single_from: int = 33
    patch: int | None = None
    image_size: int = 224


NETWORKS = (
    Network("alexnet", minimum=63, single_from=63),
    Network("convnext_base", minimum=32, single_from=32),
    Network("densenet121", minimum=29, single_from=61),
    Network("densenet201", minimum=29, single_from=61),
    Network("efficientnet_v2_l"),
    Network("googlenet", minimum=15, single_from=47),
    Network("inception_v3", minimum=75, single_from=107, image_size=299),
    Network("mnasnet0_5"),
    Network("mobilenet_v2"),
    Network("mobilenet_v3_small"),
    Network("regnet_y_400mf"),
    Network("resnet18"),
    Network("resnet50"),
    Network("resnet152"),
    Network("shufflenet_v2_x1_0"),
    Network("squeezenet1_0", minimum=21, single_from=21),
    Network("squeezenet1_1", minimum=17, single_from=17),
    Network("vgg11", minimum=32, single_from=32),
    Network("vgg16", minimum=32, single_from=32),
    Network("vgg19", minimum=32, single_from=32),
    Network("vit_b_16", minimum=16, single_from=16, patch=16),
    Network("vit_l_32", minimum=32, single_from=32, patch=32),
)


@dataclass(frozen=True)
class Preset:
    """How torchvision prepares images for a network's released weights."""

    ratio: float
    interpolation: Image.Resampling
    mean: tuple[float, ...]
    std: tuple[float, ...]


def preset(network: Network) -> Preset:
    """The preset of the network's DEFAULT weights (no file is needed to ask)."""
    from torchvision.models import get_model_weights

    shown = get_model_weights(network.name).DEFAULT.transforms()
    return Preset(
        ratio=shown.resize_size[0] / shown.crop_size[0],
        interpolation=RESAMPLING[shown.interpolation.value],
        mean=tuple(shown.mean),
        std=tuple(shown.std),
    )


class Classifier(torch_tools.ImageServable):
    """A classifier that answers with its top five classes."""

    unserved = AUX_PREFIXES

    def __init__(self, module: torch.nn.Module, options: ModelOptions, info: ServableInfo, how: Preset) -> None:
        super().__init__(module, options, info)
        self.how = how

    def preprocess(self, samples: list[images.Rgb]) -> torch.Tensor:
        """RGB arrays to one normalised float32 batch (B, 3, image_size, image_size)."""
        return torch_tools.host_batch([self._prepared(sample) for sample in samples], self.device)

    def _prepared(self, sample: images.Rgb) -> images.Chw:
        size, how = self.info.image_size, self.how
        resized = images.resize_shorter(sample, round(size * how.ratio), how.interpolation)
        return images.normalise(images.centre_crop(resized, size), how.mean, how.std)

    def postprocess(self, output: torch.Tensor, count: int) -> list[bytes]:
        """Softmax and top five of the first `count` rows, packed as `read_reply` reads them."""
        logits = output[:count].numpy().astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
        reply = np.zeros((count, TOP), dtype=TOP_DTYPE)
        reply["class"] = -1
        reply["class"][:, : best.shape[1]] = best
        reply["probability"][:, : best.shape[1]] = np.take_along_axis(probabilities, best, axis=1)
        return [row.tobytes() for row in reply]


def read_reply(payload: bytes) -> list[tuple[int, float]]:
    """The (class, probability) pairs of a reply, best first; fewer than five when the network has fewer."""
    rows = np.frombuffer(payload, dtype=TOP_DTYPE)
    return [(int(row["class"]), float(row["probability"])) for row in rows if row["class"] >= 0]


class ClassifierTraining:
    """A classifier and its cross-entropy, with the usual weights on auxiliary heads.

    0.3 per head for googlenet (Szegedy et al. 2015, section 5), 0.4 for inception_v3 (torchvision's recipe).
    """

    def __init__(self, module: torch.nn.Module, options: ModelOptions, info: ServableInfo, min_batch: int) -> None:
        self.module = torch_tools.place_for_training(module, options)
        self.options = options
        self.info = info
        self.min_batch = min_batch

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy of (images (B, 3, H, W), labels (B,))."""
        import torch
        from torch.nn.functional import cross_entropy

        pixels, labels = batch
        if self.options.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch_tools.autocast(self.options):
            output = self.module(pixels)
        logits, *extra = output if isinstance(output, tuple) else (output,)
        total = cross_entropy(logits.float(), labels)
        for head in extra:
            total = total + AUX_WEIGHT[self.info.model] * cross_entropy(head.float(), labels)
        return total


def serve(network: Network, options: ModelOptions) -> Classifier:
    """Build the network for serving; InputError on a bad size, option, device or weights file."""
    size = _image_size(network, options)
    state, label, note = _weights(network, options)
    module = _build(network, options, size, aux=False)
    if state is not None:
        _adapt(network, state, size, aux=False)
        torch_tools.load_strict(module, state, label)
    return Classifier(module, options, _info(network, options, size, module, label, note), preset(network))


def train(network: Network, options: ModelOptions) -> ClassifierTraining:
    """Build the network for training; a checkpoint of another number of classes gets a fresh last layer."""
    size = _image_size(network, options)
    state, label, note = _weights(network, options)
    aux = network.name in AUX_WEIGHT and not (network.name == "inception_v3" and size < INCEPTION_AUX_FROM)
    if state is not None:
        aux = aux and any(name.startswith(AUX_PREFIXES) for name in state)
    module = _build(network, options, size, aux)
    if state is not None:
        _adapt(network, state, size, aux)
        note = "; ".join(filter(None, [note, _fresh_head(module, state, options.num_classes)]))
        torch_tools.load_strict(module, state, label)
    alone = size >= network.single_from and not (aux and network.name == "inception_v3")
    info = _info(network, options, size, module, label, note)
    return ClassifierTraining(module, options, info, min_batch=1 if alone else 2)


def _image_size(network: Network, options: ModelOptions) -> int:
    """The size in use; refuses sizes the network cannot take and options nobody reads."""
    size = network.image_size if options.image_size is None else options.image_size
    problems = [f'option "{key}" is unknown: classifiers have none of their own' for key in options.extra]
    if size < network.minimum:
        problems.append(f"image_size {size} is too small: at least {network.minimum}")
    elif network.patch is not None and size % network.patch:
        problems.append(f"image_size {size} must be a multiple of its patch, {network.patch}")
    if problems:
        raise InputError(f"{network.name} cannot be built", problems)
    return size


def _build(network: Network, options: ModelOptions, size: int, aux: bool) -> torch.nn.Module:
    from torchvision.models import get_model

    arguments: dict[str, Any] = {"num_classes": options.num_classes or IMAGENET_CLASSES}
    if network.name in AUX_WEIGHT:
        arguments |= {"aux_logits": aux, "init_weights": False, "transform_input": True}
    if network.patch is not None:
        arguments["image_size"] = size
    with torch_tools.seeded(options.seed):
        module: torch.nn.Module = get_model(network.name, weights=None, **arguments)
    return module


def _weights(network: Network, options: ModelOptions) -> tuple[dict[str, Any] | None, str, str]:
    """(state dict or None, label, note) of the weights asked for."""
    if options.weights is None:
        return None, "random", ""
    if options.weights != "default":
        state = torch_tools.read_state_dict(options.weights)
        return state, torch_tools.sha256_label(options.weights), ""
    path, name = _released(network)
    return torch_tools.read_state_dict(path), "default", f"torchvision {name}"


def _released(network: Network) -> tuple[Path, str]:
    """Torchvision's DEFAULT weights in torch.hub's cache, downloaded when they are not there."""
    import torch
    from torchvision.models import get_model_weights

    weights = get_model_weights(network.name).DEFAULT
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    if not path.is_file():
        prefix = path.stem.rpartition("-")[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(weights.url, str(path), hash_prefix=prefix, progress=False)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"the released weights of {network.name} are not on this machine and cannot be downloaded",
                [str(error), f"put {weights.url} at {path}", "or give the path of a state dict as weights"],
            ) from None
    return path, weights.name


def _adapt(network: Network, state: dict[str, Any], size: int, aux: bool) -> None:
    """Bring a state dict, in place, to the network as built: names, auxiliary heads, position embedding."""
    for name in list(state):
        if not aux and name.startswith(AUX_PREFIXES):
            del state[name]
        elif network.name.startswith("densenet") and OLD_DENSENET.fullmatch(name):
            state[OLD_DENSENET.sub(r"\1\2", name)] = state.pop(name)
    if network.patch is not None and "encoder.pos_embedding" in state:
        from torchvision.models.vision_transformer import interpolate_embeddings

        with suppress(ValueError):  # not a square grid: load_strict names the shapes
            interpolate_embeddings(size, network.patch, state)


def _fresh_head(module: torch.nn.Module, state: dict[str, Any], num_classes: int | None) -> str:
    """Where the file differs only in the number of classes asked for, keep the module's own tensors.

    Changes `state` in place and returns a note that names those tensors ("" when there are none).
    """
    own = module.state_dict()
    fresh = [
        name
        for name, value in own.items()
        if name in state
        and value.shape[:1] == (num_classes,)
        and value.shape[:1] != state[name].shape[:1]
        and value.shape[1:] == state[name].shape[1:]
    ]
    state.update({name: own[name] for name in fresh})
    return f"fresh last layer: {', '.join(fresh)}" if fresh else ""


def _info(
    network: Network, options: ModelOptions, size: int, module: torch.nn.Module, label: str, note: str
) -> ServableInfo:
    return ServableInfo(
        model=network.name,
        task="classification",
        params=torch_tools.count_params(module),
        image_size=size,
        weights=label,
        precision=options.precision,
        device=options.device,
        notes=note,
    )


MODELS = tuple(
    Model(
        name=network.name,
        family="cnn",
        task="classification",
        image_size=network.image_size,
        serve=partial(serve, network),
        train=partial(train, network),
        code_licence=CODE_LICENCE,
        weights_licence=WEIGHTS_LICENCE,
    )
    for network in NETWORKS
)
