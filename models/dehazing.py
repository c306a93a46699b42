"""RIDCP (Wu et al., CVPR 2023), which removes haze from photographs: the heaviest vision service of the set.

    JPEG -> resize to S x S -> mirror pad to (S // 32 + 1) * 32 -> network -> crop -> PNG or JPEG of S x S
            `preprocess`       `forward`                                      `postprocess`

About 397 GFLOP for one picture of 224 x 224 (padded to 256, as the released code does even when 224 is a multiple of
32 already). Input is RGB in [0, 1] without mean or deviation. The network itself is in `_ridcp.py`.

Training is stage 2 of the paper: code book, prior decoder and what hangs on them stay frozen. The loss is
L1(restored, clear) + the commitment to the codes of the clear picture. Left out: the perceptual term (LPIPS, needs
VGG weights) and the adversarial term (0.1 of a hinge GAN). The codes of the clear picture come from a frozen copy
of the encoder as it was when training began; the authors use the separate network of their stage 1.

Licence: the authors' code and weights are CC BY-NC 4.0, so non-commercial. The network was written anew from the
published facts and no weights come with it: bring `pretrained_RIDCP.pth` as `weights`, and mind its licence.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from corun import images, torch_tools
from corun.errors import InputError, suggest
from corun.registry import Model, ModelOptions, ServableInfo, load_plugin

if TYPE_CHECKING:
    import torch

IMAGE_SIZE = 224
SMALLEST = 32
NAME = "RIDCP_dehazing"
TINY_NAME = "RIDCP_dehazing_tiny"
REPLIES = ("png", "jpeg")
PNG_LEVEL = 1
"""zlib level of replies: lossless at every level, and the fastest keeps the network the bottleneck."""


@dataclass(frozen=True)
class DehazingOptions:
    """What `ModelOptions.extra` may hold.

    use_weight: controllable matching; its code weights come with the checkpoint or from `code_weights`.
    alpha: its strength; the original sets -21.25 and then does not use it.
    code_weights: file of one bare tensor, a weight per code.
    max_size: pictures of max_size ** 2 pixels and more are halved, restored and enlarged; 0 never does.
    native: answer at the request's own size instead of S x S; a batch must then be of one size.
    reply, quality: "png" or "jpeg", and the latter's quality from 1 to 100.
    """

    use_weight: bool = False
    alpha: float = -21.25
    code_weights: str = ""
    max_size: int = 1500
    native: bool = False
    reply: str = "png"
    quality: int = 90

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> DehazingOptions:
        """Read the options; InputError lists every unknown name and every value that does not do."""
        known = {item.name: item.default for item in fields(cls)}
        problems = [f'"{name}" is unknown{suggest(name, known)}' for name in extra if name not in known]
        given = {name: value for name, value in extra.items() if name in known}
        problems += [problem for name, value in given.items() if (problem := _problem(name, value, known[name]))]
        if given.get("code_weights") and not given.get("use_weight"):
            problems.append("code_weights is read only with use_weight: set both or neither")
        if problems:
            raise InputError(f"options of RIDCP are {', '.join(known)}", problems)
        return cls(**given)


def _problem(name: str, value: object, default: object) -> str:
    """What is wrong with one option, or an empty string."""
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
        return f"{name} is {value!r}: give a {type(default).__name__}, such as {default!r}"
    if name == "reply" and value not in REPLIES:
        return f"reply is {value!r}: give one of {', '.join(REPLIES)}"
    if name == "quality" and not 1 <= value <= 100:  # type: ignore[operator]
        return f"quality is {value}: give a number from 1 to 100"
    if name == "max_size" and value != 0 and value < 2 * SMALLEST:  # type: ignore[operator]
        return f"max_size is {value}: give 0 (never halve) or at least {2 * SMALLEST}"
    return ""


def ridcp() -> ModuleType:
    """The module of the network; importing it imports torch and torchvision."""
    return load_plugin("models", "_ridcp")


def read_code_weights(path: str) -> torch.Tensor:
    """One bare tensor, a weight per code; InputError when the file holds anything else."""
    import torch

    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(f"code weights {path} cannot be read as a tensor: {error}") from None
    if not isinstance(weights, torch.Tensor):
        raise InputError(f"code weights {path} hold a {type(weights).__name__}: give a file of one bare tensor")
    return weights


def build(options: ModelOptions, name: str) -> tuple[Any, str]:
    """The network, random by the seed or from a checkpoint, and the label of its weights."""
    net, extra = ridcp(), DehazingOptions.of(options.extra)
    size = net.TINY if name == TINY_NAME else net.FULL
    with torch_tools.seeded(options.seed):
        network = net.Ridcp(size, use_weight=extra.use_weight, alpha=extra.alpha)
    if options.weights == "default":
        hint = "give the path of pretrained_RIDCP.pth (CC BY-NC 4.0), or no weights for random ones"
        raise InputError("RIDCP has no weights that could be downloaded", [hint])
    state, label = network.state_dict(), "random"
    if options.weights is not None:
        state = torch_tools.read_state_dict(options.weights, wrappers=("params", "state_dict", "model"))
        label = torch_tools.sha256_label(options.weights)
    if extra.code_weights:
        state = state | {net.upstream_name("code_weights"): read_code_weights(extra.code_weights)}
    net.load_checkpoint(network, state, options.weights or extra.code_weights)
    return network, label


def check_size(options: ModelOptions) -> int:
    """The side of the pictures; InputError below 32, where the attention windows no longer fit."""
    size = options.image_size or IMAGE_SIZE
    if size < SMALLEST:
        raise InputError(f"image size {size} is too small for RIDCP: give at least {SMALLEST}")
    return size


def describe(network: Any, options: ModelOptions, name: str, weights: str) -> ServableInfo:
    """What a built network says about itself."""
    extra = DehazingOptions.of(options.extra)
    matching = f"controllable matching, alpha {extra.alpha}" if extra.use_weight else "plain matching"
    return ServableInfo(
        model=name,
        task="dehazing",
        params=torch_tools.count_params(network),
        image_size=check_size(options),
        weights=weights,
        precision=options.precision,
        device=options.device,
        notes=f"{matching}; mean ratio per sample",
    )


def encode_png(image: images.Rgb) -> bytes:
    """An RGB array as a PNG file, compressed quickly."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


class DehazingServable(torch_tools.ImageServable):
    """Hazy pictures in, restored ones of S x S (or of their own size) out."""

    def __init__(self, options: ModelOptions, name: str) -> None:
        self.options = DehazingOptions.of(options.extra)
        network, weights = build(options, name)
        info = describe(network, options, name, weights)
        super().__init__(ridcp().Restorer(network, self.options.max_size), options, info)

    def decode(self, payload: bytes) -> images.Rgb:
        """One JPEG or PNG to an RGB array; ValueError when corrupt, or too small to answer at its own size."""
        image = images.decode_rgb(payload)
        if self.options.native and min(image.shape[:2]) < SMALLEST:
            raise ValueError(f"{image.shape[1]}x{image.shape[0]} pixels: both sides must have {SMALLEST}")
        return image

    def preprocess(self, samples: list[images.Rgb]) -> torch.Tensor:
        """To one float32 batch (B, 3, H, W) in [0, 1]; ValueError when own sizes differ within a batch."""
        side = self.info.image_size
        if not self.options.native:
            samples = [images.resize(sample, side, side) for sample in samples]
        sizes = sorted({f"{sample.shape[1]}x{sample.shape[0]}" for sample in samples})
        if len(sizes) > 1:
            raise ValueError(f"a batch mixes pictures of {', '.join(sizes)}: serve own sizes with batch 1")
        return torch_tools.host_batch([images.scaled(sample) for sample in samples], self.device)

    def to_host(self, output: torch.Tensor) -> NDArray[np.uint8]:
        """Rounded to 8 bits on the device, a quarter of the bytes to copy; (B, H, W, 3), NaN becomes black."""
        import torch

        levels = torch.nan_to_num(output.float()).clamp(0, 1).mul(255).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def postprocess(self, output: NDArray[np.uint8], count: int) -> list[bytes]:
        """One PNG or JPEG file per sample."""
        if self.options.reply == "jpeg":
            return [images.encode_jpeg(picture, self.options.quality) for picture in output[:count]]
        return [encode_png(picture) for picture in output[:count]]


class DehazingTrainable:
    """Stage 2 of RIDCP's training on batches of (hazy, clear), both float32 (B, 3, H, W) in [0, 1].

    Parameters to train have `requires_grad`; the authors use Adam, 1e-4, betas (0.9, 0.99), constant rate.
    """

    min_batch = 1

    def __init__(self, options: ModelOptions, name: str) -> None:
        import torch

        network, weights = build(options, name)
        self.info = describe(network, options, name, weights)
        self.options = options
        teacher = torch.nn.Sequential(copy.deepcopy(network.encoder), copy.deepcopy(network.project))
        self.teacher = teacher.requires_grad_(False).to(torch_tools.torch_device(options.device))
        self.module = torch_tools.place_for_training(ridcp().trainable_part(network), options)

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Mean L1 to the clear pictures plus the commitment of z to the clear pictures' codes."""
        import torch

        net = ridcp()
        hazy, clear = batch
        height, width = hazy.shape[-2:]
        padded = [net.mirror_pad(x, net.trained_side(height), net.trained_side(width)) for x in (hazy, clear)]
        with torch_tools.autocast(self.options):
            with torch.no_grad():
                index = self.module.nearest(self.teacher(padded[1]), weighted=False)
            restored = self.module(padded[0])
            pixels = (restored.image[:, :, :height, :width].float() - clear).abs().mean()
            return pixels + net.commitment_loss(restored.z, self.module.entries(index))


def _row(name: str, notes: str) -> Model:
    return Model(
        name=name,
        family="RIDCP",
        task="dehazing",
        image_size=IMAGE_SIZE,
        serve=partial(DehazingServable, name=name),
        train=partial(DehazingTrainable, name=name),
        code_licence="Apache-2.0 (written anew; the authors' code is CC BY-NC 4.0)",
        weights_licence="CC BY-NC 4.0 (non-commercial); none included",
        notes=notes,
    )


MODELS: tuple[Model, ...] = (
    _row(NAME, "29,479,902 parameters, about 397 GFLOP at 224; bring pretrained_RIDCP.pth"),
    _row(TINY_NAME, "the same graph at reduced width, for tests and smoke runs; no released weights fit"),
)
