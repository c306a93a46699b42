"""The RIDCP network (Wu et al., CVPR 2023) on torch and torchvision, with the checkpoint's names at the door.

    hazy ── encoder ── f (1/4 size) ── project ── z ── nearest code q ── unproject ── prior 0 ── prior 1
                       │                                                                v0         v1
                       └─ detached ── up 0 ── + warp(v0) ── up 1 ── + warp(v1) ── head ── clear
                                      └───────── the residual decoder ──────┘

The code book and the `prior` decoder were learnt on clear pictures and stay frozen; the residual decoder bends
their features onto the hazy picture by deformable convolutions (`warp`). Everything here was rebuilt from the
paper and from the published shapes, names and formulas; none of the authors' code is used.

Deviations from the authors' implementation, all of them deliberate:
- `mean(x) / mean(u)` after a warp is taken per sample, theirs over the whole batch: there an image's answer
  depends on its batch mates. Equal at batch 1.
- Deformable convolution runs as `grid_sample` plus one matmul on CPU, where torchvision's operator reads out of
  bounds on NaN offsets and is slower; on CUDA it is torchvision's. Offsets are made finite for both.
- No process-global cuDNN switches, and the picture of the prior branch, which nobody reads, is not computed.
- The attention mask is made by torchvision for the size at hand, on the device (theirs: always on the CPU).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import SwinTransformerBlock
from torchvision.ops import deform_conv2d

from corun.errors import InputError

WINDOW = 8
STRIDE = 32
"""Padded sizes are multiples of this: 4 (downsampling) times the attention window."""
DEFORM_GROUPS = 4
TAPS = 9
COMMITMENT = 0.25
MASKED = -100.0

FROZEN = ("quantize", "decoder_group", "after_quant_group", "out_conv")
"""Parameters whose upstream name has one of these are not trained in stage 2."""
IGNORED = re.compile(r"(^|\.)(attn_mask|relative_position_index)$|^vgg_feat_extractor\.|^conv_semantic\.")
"""Entries of a checkpoint that are recomputed here, or belong to stage 1 only."""

CODE_WEIGHTS = "quantize_group.0.weight"
_HINTS = {CODE_WEIGHTS: " (of use_weight: name a file of them in the option code_weights)"}

_UPSTREAM_NAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\.body\.([03])\.", r".conv.\1.norm."),
        (r"\.body\.", ".conv."),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.3\.", ".mlp.fc2."),
        (r"^encoder\.stem\.", "multiscale_encoder.in_conv."),
        (r"^encoder\.down\.", "multiscale_encoder.blocks."),
        (r"^encoder\.groups\.(\d+)\.blocks\.", r"multiscale_encoder.blocks.2.swin_blks.\1.residual_group.blocks."),
        (r"^encoder\.groups\.", "multiscale_encoder.blocks.2.swin_blks."),
        (r"^project\.", "before_quant_group.0."),
        (r"^codebook\.", "quantize_group.0.embedding."),
        (r"^code_weights$", CODE_WEIGHTS),
        (r"^unproject\.", "after_quant_group.0.conv."),
        (r"^prior\.(\d+)\.", r"decoder_group.\1.block."),
        (r"^prior_out\.", "out_conv."),
        (r"^decoder\.up\.", "multiscale_decoder.upsampler."),
        (r"^decoder\.warp\.(\d+)\.mix\.", r"multiscale_decoder.warp.\1.offset."),
        (r"^decoder\.warp\.", "multiscale_decoder.warp."),
        (r"^head\.", "residual_conv."),
    )
)


@dataclass(frozen=True)
class Size:
    """Widths at full, half and quarter resolution, and the depth of the attention part."""

    widths: tuple[int, int, int] = (64, 128, 256)
    groups: int = 4
    depth: int = 6
    heads: int = 8
    codes: int = 1024
    code_width: int = 512


FULL = Size()
TINY = Size(widths=(32, 64, 64), groups=1, depth=2, heads=2, codes=64, code_width=64)


class Restored(NamedTuple):
    """What the network computes: the picture (B, 3, H, W) and z, the features before quantisation."""

    image: Tensor
    z: Tensor


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off where the tensor lives; the meta device has none to switch."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def finite_offset(offset: Tensor) -> Tensor:
    """Offsets without NaN, held to where a sample can still touch the picture: finite ones act the same.

    offset: (B, groups * 9 * 2, H, W) in pixels. A point moved by more than max(H, W) + 1 reads zeros anyway.
    """
    limit = float(max(offset.shape[-2:]) + 1)
    return torch.nan_to_num(offset, nan=0.0, posinf=limit, neginf=-limit).clamp(-limit, limit)


def _sampling_grid(offset: Tensor, groups: int) -> Tensor:
    """Offsets as `grid_sample` coordinates, (B * groups, 9 * H, W, 2) in (x, y) order; H and W above 1."""
    batch, _, height, width = offset.shape
    moved = offset.view(batch, groups, TAPS, 2, height, width)
    step = torch.arange(-1, 2, device=offset.device, dtype=offset.dtype)
    row = torch.arange(height, device=offset.device, dtype=offset.dtype).view(height, 1)
    column = torch.arange(width, device=offset.device, dtype=offset.dtype)
    y = moved[:, :, :, 0] + (step.repeat_interleave(3).view(TAPS, 1, 1) + row)
    x = moved[:, :, :, 1] + (step.repeat(3).view(TAPS, 1, 1) + column)
    grid = torch.stack((x * (2 / (width - 1)) - 1, y * (2 / (height - 1)) - 1), dim=-1)
    return grid.view(batch * groups, TAPS * height, width, 2)


def deform_by_sampling(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Modulated deformable 3x3 convolution, stride 1, padding 1, by bilinear sampling and one matmul.

    x (B, C, H, W); offset (B, groups * 9 * 2, H, W), per tap (y, x); mask (B, groups * 9, H, W); weight
    (O, C, 3, 3); bias (O,). Equals torchvision.ops.deform_conv2d: outside the picture is zero, point by point.
    Source: Zhu et al., Deformable ConvNets v2, CVPR 2019, equation 1.
    """
    batch, channels, height, width = x.shape
    groups = mask.shape[1] // TAPS
    per_group = x.reshape(batch * groups, channels // groups, height, width)
    sampled = F.grid_sample(
        per_group, _sampling_grid(offset, groups), mode="bilinear", padding_mode="zeros", align_corners=True
    )
    sampled = sampled.view(batch, groups, channels // groups, TAPS, height * width)
    sampled = sampled * mask.reshape(batch, groups, 1, TAPS, height * width)
    columns = sampled.view(batch, channels * TAPS, height * width)
    out = torch.matmul(weight.reshape(weight.shape[0], -1), columns) + bias.view(-1, 1)
    return out.view(batch, weight.shape[0], height, width)


def deform(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Modulated deformable convolution in float32, by whichever implementation suits the device.

    Half precision would place samples an eighth of a pixel apart at column 200, so positions never use it.
    """
    with full_precision(x):
        parts = (x.float(), finite_offset(offset.float()), mask.float(), weight.float(), bias.float())
        if x.is_cuda:
            source, moved, gate, kernel, shift = parts
            return deform_conv2d(source, moved, kernel, shift, padding=1, mask=gate).to(x.dtype)
        return deform_by_sampling(*parts).to(x.dtype)


def match_mean(moved: Tensor, like: Tensor) -> Tensor:
    """`moved` scaled so that each sample's mean is that of `like`; both (B, C, H, W)."""
    ratio = like.float().mean((1, 2, 3), keepdim=True) / moved.float().mean((1, 2, 3), keepdim=True)
    return moved * ratio.to(moved.dtype)


class ResBlock(nn.Module):
    """x + two rounds of (group norm, SiLU, 3x3 convolution)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = [
            (nn.GroupNorm(32, width, eps=1e-6), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(2)
        ]
        self.body = nn.Sequential(*half[0], *half[1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def upsampler(before: int, after: int) -> nn.Sequential:
    """Nearest doubling, one convolution, two residual blocks."""
    conv = nn.Conv2d(before, after, 3, padding=1)
    return nn.Sequential(nn.Upsample(scale_factor=2), conv, ResBlock(after), ResBlock(after))


class SwinGroup(nn.Module):
    """x + convolution of `depth` windowed attention blocks, every second one shifted by half a window."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        shifts = [WINDOW // 2 * (index % 2) for index in range(depth)]
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(width, heads, [WINDOW, WINDOW], [shift, shift], mlp_ratio=4.0) for shift in shifts
        )
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            tokens = block(tokens)
        return x + self.conv(tokens.permute(0, 3, 1, 2))


class Encoder(nn.Module):
    """Picture (B, 3, H, W) to features (B, widths[2], H / 4, W / 4)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        full, half, quarter = size.widths
        self.stem = nn.Conv2d(3, full, 4, padding=1)
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), ResBlock(after), ResBlock(after))
            for before, after in ((full, half), (half, quarter))
        )
        self.groups = nn.ModuleList(SwinGroup(quarter, size.depth, size.heads) for _ in range(size.groups))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in (*self.down, *self.groups):
            x = stage(x)
        return x


class DeformConv(nn.Module):
    """A deformable convolution whose offsets come from a second input; starts as an undeformed one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        bound = (width * TAPS) ** -0.5
        self.weight = nn.Parameter(torch.empty(width, width, 3, 3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(width))
        self.conv_offset = nn.Conv2d(width, 3 * DEFORM_GROUPS * TAPS, 3, padding=1)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        plan = self.conv_offset(guide)
        split = 2 * DEFORM_GROUPS * TAPS
        return deform(x, plan[:, :split], torch.sigmoid(plan[:, split:]), self.weight, self.bias)


class Warp(nn.Module):
    """Features of the prior, bent towards those of the hazy picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2 * width, width, 3, padding=1)
        self.dcn = DeformConv(width)

    def forward(self, prior: Tensor, x: Tensor) -> Tensor:
        return self.dcn(prior, self.mix(torch.cat((prior, x), dim=1)))


class ResidualDecoder(nn.Module):
    """Features at a quarter of the size back to full size, taking in the prior's features at each level."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        full, half, quarter = size.widths
        self.up = nn.ModuleList((upsampler(quarter, half), upsampler(half, full)))
        self.warp = nn.ModuleList((Warp(half), Warp(full)))

    def forward(self, x: Tensor, priors: list[Tensor]) -> Tensor:
        for up, warp, prior in zip(self.up, self.warp, priors, strict=True):
            x = up(x)
            x = x + match_mean(warp(prior, x), x)
        return x


class Ridcp(nn.Module):
    """The network over pictures whose sides are multiples of 32 and at least 64; float RGB in [0, 1].

    use_weight: controllable matching: distances to code k are multiplied by exp(alpha * code_weights[k]).
    """

    def __init__(self, size: Size = FULL, use_weight: bool = False, alpha: float = -21.25) -> None:
        super().__init__()
        full, half, quarter = size.widths
        self.size, self.alpha = size, alpha
        self.encoder = Encoder(size)
        self.project = nn.Conv2d(quarter, size.code_width, 1)
        self.codebook = nn.Embedding(size.codes, size.code_width)
        self.unproject = nn.Conv2d(size.code_width, quarter, 3, padding=1)
        self.prior = nn.ModuleList((upsampler(quarter, half), upsampler(half, full)))
        self.prior_out = nn.Conv2d(full, 3, 3, padding=1)
        self.decoder = ResidualDecoder(size)
        self.head = nn.Conv2d(full, 3, 3, padding=1)
        weights = torch.empty(size.codes).normal_(std=0.02) if use_weight else None
        self.register_buffer("code_weights", weights)

    @torch.no_grad()
    def nearest(self, z: Tensor, weighted: bool = True) -> Tensor:
        """Index of the code nearest to each feature: z (B, C, h, w) to int64 (B, h, w), in float32."""
        batch, width, height, columns = z.shape
        with full_precision(z):
            points = z.float().permute(0, 2, 3, 1).reshape(-1, width)
            codes = self.codebook.weight.float()
            distance = points.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * (points @ codes.t())
            if weighted and self.code_weights is not None:
                distance = distance * torch.exp(self.alpha * self.code_weights.float())
            return distance.argmin(1).view(batch, height, columns)

    def entries(self, index: Tensor) -> Tensor:
        """The codes at int64 (B, h, w), as features (B, C, h, w)."""
        return self.codebook(index).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Restored:
        """Restore (B, 3, H, W); the code step passes its gradient straight through to z."""
        features = self.encoder(x)
        z = self.project(features)
        code = self.entries(self.nearest(z)).to(z.dtype)
        if torch.is_grad_enabled():
            code = z + (code - z).detach()
        y = self.unproject(code)
        priors = []
        for stage in self.prior:
            y = stage(y)
            priors.append(y)
        return Restored(self.head(self.decoder(features.detach(), priors)), z)


def mirror_pad(x: Tensor, height: int, width: int) -> Tensor:
    """Grow (B, C, H, W) to the bottom and right by its own mirror image, edge included; at most doubled."""
    x = torch.cat((x, x.flip(2)), dim=2)[:, :, :height]
    return torch.cat((x, x.flip(3)), dim=3)[:, :, :, :width]


def served_side(side: int) -> int:
    """The padded side when serving: the next multiple of 32 *above* it, as released (224 becomes 256)."""
    return (side // STRIDE + 1) * STRIDE


def trained_side(side: int) -> int:
    """The padded side when training: a multiple of 32, at least 64; ValueError when the picture is too small."""
    if side < STRIDE:
        raise ValueError(f"pictures to train on need {STRIDE} pixels a side, not {side}")
    return max(2 * STRIDE, -(-side // STRIDE) * STRIDE)


class Restorer(nn.Module):
    """Pictures of any size from 32 pixels a side to pictures of the same size.

    max_side: from max_side ** 2 pixels on, the picture is halved, restored and enlarged again; 0 never does.
    """

    def __init__(self, network: Ridcp, max_side: int = 1500) -> None:
        super().__init__()
        self.network = network
        self.max_side = max_side

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if not self.max_side or height * width < self.max_side**2:
            return self.whole(x)
        half = F.interpolate(x, size=(height // 2, width // 2), mode="bilinear", align_corners=True)
        return F.interpolate(self.whole(half), size=(height, width), mode="bilinear", align_corners=True)

    def whole(self, x: Tensor) -> Tensor:
        """Pad, restore, crop back."""
        height, width = x.shape[-2:]
        if min(height, width) < STRIDE:
            raise ValueError(f"a picture of {width}x{height} pixels is too small: both sides need {STRIDE}")
        padded = mirror_pad(x, served_side(height), served_side(width))
        return self.network(padded).image[:, :, :height, :width]


def commitment_loss(z: Tensor, target: Tensor) -> Tensor:
    """0.25 * mean (z - e)^2 + mean (gram(z) - gram(e))^2 against the codes e of the clear picture, float32.

    Both (B, C, h, w); gram(x) = x^T x / (h * w), (B, C, C).
    """
    with full_precision(z):
        ours, theirs = (value.float().flatten(2) for value in (z, target))
        cells = ours.shape[2]
        gram = (ours @ ours.transpose(1, 2) - theirs @ theirs.transpose(1, 2)) / cells
        return COMMITMENT * F.mse_loss(ours, theirs) + gram.square().mean()


def upstream_name(name: str) -> str:
    """The authors' name of one of our parameters or buffers."""
    for pattern, replacement in _UPSTREAM_NAMES:
        name = pattern.sub(replacement, name)
    return name


def trainable_part(network: Ridcp) -> Ridcp:
    """Freeze what stage 2 of the paper's training keeps: code book, its way out and the prior's decoder."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not any(word in upstream_name(name) for word in FROZEN))
    return network


def shift_mask(side: int = 32) -> Tensor:
    """The (windows, 64, 64) mask of a shifted block over side x side tokens, as checkpoints carry it."""
    half = WINDOW // 2
    region = torch.arange(side)
    region = (region >= side - WINDOW).long() + (region >= side - half).long()
    cells = (3 * region[:, None] + region).view(side // WINDOW, WINDOW, side // WINDOW, WINDOW)
    cells = cells.transpose(1, 2).reshape(-1, WINDOW * WINDOW)
    return (cells[:, None] != cells[:, :, None]).float() * MASKED


def to_upstream(network: Ridcp) -> dict[str, Tensor]:
    """The network's state under the authors' names and shapes, with the buffers their class stores."""
    state = {}
    for name, value in network.state_dict().items():
        key = upstream_name(name)
        if key.endswith("relative_position_index"):
            value = value.view(WINDOW**2, WINDOW**2)
        state[key] = value
    for group in range(network.size.groups):
        for block in range(1, network.size.depth, 2):
            prefix = f"encoder.groups.{group}.blocks.{block}."
            state[upstream_name(prefix) + "attn_mask"] = shift_mask()
    return state


def load_checkpoint(network: Ridcp, state: Mapping[str, Tensor], source: str) -> None:
    """Load a checkpoint with the authors' names, or our own state dict, strictly.

    Recomputed buffers and stage 1 parts are dropped; code weights are taken if the network wants them.
    Raises InputError that names every missing, unknown and misshapen entry (in the authors' names).
    """
    own = network.state_dict()
    ours = {upstream_name(name): name for name in own}
    given = {upstream_name(name): value for name, value in state.items()}
    given = {name: value for name, value in given.items() if not IGNORED.search(name)}
    if network.code_weights is None:
        given.pop(CODE_WEIGHTS, None)
    elif CODE_WEIGHTS in given:
        given[CODE_WEIGHTS] = given[CODE_WEIGHTS].reshape(-1)
    wanted = {name: own[local] for name, local in ours.items() if not IGNORED.search(name)}
    problems = [f"missing: {name}{_HINTS.get(name, '')}" for name in wanted if name not in given]
    problems += [f"unknown: {name}" for name in given if name not in wanted]
    problems += [
        f"shape of {name}: {tuple(given[name].shape)} in the file, {tuple(value.shape)} in the network"
        for name, value in wanted.items()
        if name in given and given[name].shape != value.shape
    ]
    if problems:
        raise InputError(f"the weights in {source} do not fit RIDCP", problems)
    network.load_state_dict(own | {ours[name]: value for name, value in given.items()})
