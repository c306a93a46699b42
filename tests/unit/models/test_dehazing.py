"""RIDCP: the graph against an independent reference, its checkpoints, its service and its training."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import deform_conv2d

from corun import images
from corun.errors import InputError
from corun.registry import ModelOptions, load_plugin

dehazing = load_plugin("models", "dehazing")
net = load_plugin("models", "_ridcp")

State = dict[str, Tensor]
TINY_OPTIONS = ModelOptions(image_size=64, seed=3)
ALPHA = -21.25


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(use_weight: bool = False, seed: int = 0) -> Any:
    """A small network whose every parameter is away from its initial value, so that each of them matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = net.Ridcp(net.TINY, use_weight=use_weight, alpha=ALPHA).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.03)
    return network


def picture(batch: int, height: int, width: int, seed: int = 1) -> Tensor:
    made = [images.scaled(images.made_image(seed + index, height, width)) for index in range(batch)]
    return torch.from_numpy(np.stack(made))


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# --- The reference: batch 1, plain functions over the authors' parameter names ---------------------------------


class Reference:
    """RIDCP for one picture as the publication's formulas give it, over a state dict with the authors' names."""

    def __init__(self, state: State, heads: int, alpha: float | None = None) -> None:
        self.state, self.heads, self.alpha = state, heads, alpha

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], stride, padding)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-5)

    def res_block(self, name: str, x: Tensor) -> Tensor:
        y = x
        for norm, conv in ((0, 2), (3, 5)):
            scale, shift = self.state[f"{name}.conv.{norm}.norm.weight"], self.state[f"{name}.conv.{norm}.norm.bias"]
            y = F.silu(F.group_norm(y, 32, scale, shift, eps=1e-6))
            y = self.conv(f"{name}.conv.{conv}", y)
        return x + y

    def upsample(self, name: str, x: Tensor) -> Tensor:
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return self.res_block(f"{name}.3", self.res_block(f"{name}.2", self.conv(f"{name}.1", x)))

    def attend(self, name: str, tokens: Tensor, allowed: Tensor) -> Tensor:
        """One window: tokens (64, C), allowed (64, 64)."""
        width = tokens.shape[1] // self.heads
        query, key, value = self.linear(f"{name}.qkv", tokens).view(64, 3, self.heads, width).permute(1, 2, 0, 3)
        table = self.state[f"{name}.relative_position_bias_table"]
        cell = torch.arange(64)
        rows = (cell // 8)[:, None] - (cell // 8)[None, :] + 7
        columns = (cell % 8)[:, None] - (cell % 8)[None, :] + 7
        score = query @ key.transpose(1, 2) / math.sqrt(width) + table[rows * 15 + columns].permute(2, 0, 1)
        score = score + torch.where(allowed, 0.0, -100.0)
        mixed = (score.softmax(-1) @ value).transpose(0, 1).reshape(64, -1)
        return self.linear(f"{name}.proj", mixed)

    def window_attention(self, name: str, x: Tensor, shift: int) -> Tensor:
        """All windows of (H, W, C), one after the other; a wrapped token sees only tokens wrapped alike."""
        height, width, channels = x.shape
        x = x.roll((-shift, -shift), (0, 1))
        wrapped_row = torch.arange(height) + shift >= height
        wrapped_column = torch.arange(width) + shift >= width
        out = torch.empty_like(x)
        for top in range(0, height, 8):
            for left in range(0, width, 8):
                kind = 2 * wrapped_row[top : top + 8, None].int() + wrapped_column[left : left + 8].int()
                kind = kind.flatten()
                window = x[top : top + 8, left : left + 8].reshape(64, channels)
                mixed = self.attend(name, window, kind[:, None] == kind[None, :])
                out[top : top + 8, left : left + 8] = mixed.view(8, 8, channels)
        return out.roll((shift, shift), (0, 1))

    def swin_group(self, name: str, x: Tensor, depth: int) -> Tensor:
        tokens = x[0].permute(1, 2, 0)
        for index in range(depth):
            block = f"{name}.residual_group.blocks.{index}"
            normed = self.layer_norm(f"{block}.norm1", tokens)
            tokens = tokens + self.window_attention(f"{block}.attn", normed, 4 * (index % 2))
            hidden = F.gelu(self.linear(f"{block}.mlp.fc1", self.layer_norm(f"{block}.norm2", tokens)))
            tokens = tokens + self.linear(f"{block}.mlp.fc2", hidden)
        return x + self.conv(f"{name}.conv", tokens.permute(2, 0, 1)[None])

    def encode(self, x: Tensor, groups: int, depth: int) -> Tensor:
        x = self.conv("multiscale_encoder.in_conv", x)
        for index in range(2):
            name = f"multiscale_encoder.blocks.{index}"
            x = self.conv(f"{name}.0", x, stride=2)
            x = self.res_block(f"{name}.2", self.res_block(f"{name}.1", x))
        for index in range(groups):
            x = self.swin_group(f"multiscale_encoder.blocks.2.swin_blks.{index}", x, depth)
        return x

    def quantise(self, z: Tensor) -> Tensor:
        codes = self.state["quantize_group.0.embedding.weight"]
        points = z[0].flatten(1).t()
        distance = torch.cdist(points.double(), codes.double()) ** 2
        if self.alpha is not None:
            distance = distance * torch.exp(self.alpha * self.state["quantize_group.0.weight"].double())
        return codes[distance.argmin(1)].t().view_as(z)

    def warp(self, name: str, prior: Tensor, x: Tensor) -> Tensor:
        guide = self.conv(f"{name}.offset", torch.cat((prior, x), 1))
        first, second, mask = self.conv(f"{name}.dcn.conv_offset", guide).chunk(3, dim=1)
        moved = deform_conv2d(
            prior,
            torch.cat((first, second), 1),
            self.state[f"{name}.dcn.weight"],
            self.state[f"{name}.dcn.bias"],
            padding=1,
            mask=mask.sigmoid(),
        )
        return moved * (x.mean() / moved.mean())

    def __call__(self, x: Tensor, groups: int, depth: int) -> Tensor:
        features = self.encode(x, groups, depth)
        y = self.conv(
            "after_quant_group.0.conv", self.quantise(self.conv("before_quant_group.0", features, padding=0))
        )
        x = features
        for index in range(2):
            y = self.upsample(f"decoder_group.{index}.block", y)
            x = self.upsample(f"multiscale_decoder.upsampler.{index}", x)
            x = x + self.warp(f"multiscale_decoder.warp.{index}", y, x)
        return self.conv("residual_conv", x)


# --- The graph ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_weight", [False, True])
@torch.no_grad()
def test_network_equals_the_reference(use_weight: bool) -> None:
    """The network computes what the published formulas give, with and without controllable matching."""
    network = tiny(use_weight)
    reference = Reference(net.to_upstream(network), net.TINY.heads, ALPHA if use_weight else None)
    x = picture(1, 96, 64)
    expected = reference(x, net.TINY.groups, net.TINY.depth)
    assert difference(network(x).image, expected) < 1e-4


@torch.no_grad()
def test_code_weights_change_the_codes() -> None:
    """Controllable matching picks other codes than plain matching does, and `weighted=False` turns it off."""
    weighted, plain = tiny(use_weight=True), tiny()
    plain.load_state_dict(weighted.state_dict(), strict=False)
    z = torch.randn(1, net.TINY.code_width, 12, 12, generator=torch.Generator().manual_seed(5))
    assert (weighted.nearest(z) != plain.nearest(z)).any()
    assert torch.equal(weighted.nearest(z, weighted=False), plain.nearest(z))


@torch.no_grad()
def test_batch_mates_do_not_matter() -> None:
    """An image's answer is the same alone and in a batch (the mean ratio is taken per sample)."""
    restorer = net.Restorer(tiny())
    batch = picture(2, 64, 64)
    batch[1] *= 0.2
    together = restorer(batch)
    for index in range(2):
        assert difference(together[index : index + 1], restorer(batch[index : index + 1])) < 1e-4


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(2, 11),
    width=st.integers(2, 11),
    groups=st.sampled_from([1, 2, 4]),
    batch=st.integers(1, 2),
    reach=st.sampled_from([0.0, 0.5, 3.0, 40.0]),
    seed=st.integers(0, 1000),
)
def test_sampling_equals_torchvision_deform_conv(
    height: int, width: int, groups: int, batch: int, reach: float, seed: int
) -> None:
    """Deformable convolution by sampling equals torchvision's operator, inside and outside the picture."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 8, height, width, generator=rng)
    offset = torch.randn(batch, groups * 18, height, width, generator=rng) * reach
    mask = torch.rand(batch, groups * 9, height, width, generator=rng)
    weight, bias = torch.randn(5, 8, 3, 3, generator=rng), torch.randn(5, generator=rng)
    expected = deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)
    torch.testing.assert_close(net.deform_by_sampling(x, offset, mask, weight, bias), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(net.deform(x, offset, mask, weight, bias), expected, rtol=1e-3, atol=1e-3)


@given(st.lists(st.floats(width=32), min_size=1, max_size=8), st.integers(2, 30))
def test_offsets_are_made_finite(values: list[float], side: int) -> None:
    """Offsets come out finite; those that can still touch the picture are unchanged."""
    offset = torch.tensor(values).view(1, -1, 1, 1).expand(1, -1, side, side)
    safe = net.finite_offset(offset)
    assert safe.isfinite().all()
    near = offset.abs() <= side
    assert torch.equal(safe[near], offset[near])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@torch.no_grad()
def test_bad_offsets_do_not_end_the_process(poison: float) -> None:
    """Offsets of NaN or infinity, as broken weights make them, still give an answer of the right size."""
    network = tiny()
    network.decoder.warp[0].dcn.conv_offset.bias[:7] = poison
    assert net.Restorer(network)(picture(1, 63, 40)).shape == (1, 3, 63, 40)


@torch.no_grad()
def test_a_new_deformable_convolution_starts_undeformed() -> None:
    """At the start offsets are zero and masks one half, so random weights are sane."""
    torch.manual_seed(2)
    layer = net.DeformConv(8)
    x, guide = torch.randn(1, 8, 6, 7), torch.randn(1, 8, 6, 7)
    torch.testing.assert_close(layer(x, guide), F.conv2d(x, layer.weight, layer.bias, padding=1) / 2)


@given(st.integers(32, 90), st.integers(32, 90))
def test_padding_mirrors_to_the_next_multiple(height: int, width: int) -> None:
    """Serving pads to (side // 32 + 1) * 32 with the mirror image, edge included, also from a multiple of 32."""
    x = np.arange(height * width, dtype=np.float32).reshape(1, 1, height, width)
    tall, wide = (height // 32 + 1) * 32, (width // 32 + 1) * 32
    expected = np.pad(x, ((0, 0), (0, 0), (0, tall - height), (0, wide - width)), mode="symmetric")
    padded = net.mirror_pad(torch.from_numpy(x), net.served_side(height), net.served_side(width))
    assert np.array_equal(padded.numpy(), expected)


class _Halfway(torch.nn.Module):
    """A network in name only: it records the size it sees and returns the picture."""

    def forward(self, x: Tensor) -> Any:
        self.seen = tuple(x.shape[-2:])
        return net.Restored(x, x)


@pytest.mark.parametrize(
    ("height", "width", "max_side", "seen"),
    [
        (99, 100, 100, (128, 128)),
        (100, 100, 100, (64, 64)),
        (101, 130, 100, (64, 96)),
        (130, 130, 0, (160, 160)),
    ],
)
def test_large_pictures_are_halved(height: int, width: int, max_side: int, seen: tuple[int, int]) -> None:
    """From max_side ** 2 pixels on the network sees half the picture; the answer keeps its size."""
    network = _Halfway()
    out = net.Restorer(network, max_side)(picture(1, height, width))
    assert network.seen == seen
    assert out.shape == (1, 3, height, width)


def test_too_small_pictures_are_refused() -> None:
    """Under 32 pixels a side there is no second attention window, and the mirror ends."""
    with pytest.raises(ValueError, match="31x40 pixels is too small"):
        net.Restorer(_Halfway())(torch.zeros(1, 3, 40, 31))


def test_size_of_the_published_network() -> None:
    """29,479,902 parameters, and about 397 GFLOP at 224 pixels, deformable convolutions included."""
    with torch.device("meta"):
        network = net.Ridcp().eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == 29_479_902
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.Restorer(network)(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 1e9 == pytest.approx(396.7, abs=0.1)


# --- Checkpoints -------------------------------------------------------------------------------------------------


def _pair(*stems: str) -> set[str]:
    return {f"{stem}.{leaf}" for stem in stems for leaf in ("weight", "bias")}


def _res_block_names(stem: str) -> set[str]:
    return _pair(*(f"{stem}.conv.{index}{norm}" for index, norm in ((0, ".norm"), (2, ""), (3, ".norm"), (5, ""))))


def published_names() -> set[str]:
    """Every state-dict key of the authors' class, spelled out from its documented pattern."""
    names = _pair("multiscale_encoder.in_conv", "out_conv", "residual_conv", "before_quant_group.0")
    names |= _pair("after_quant_group.0.conv") | {"quantize_group.0.embedding.weight"}
    for level in range(2):
        encoder, up = f"multiscale_encoder.blocks.{level}", f"multiscale_decoder.upsampler.{level}"
        warp, prior = f"multiscale_decoder.warp.{level}", f"decoder_group.{level}.block"
        names |= _pair(
            f"{encoder}.0", f"{up}.1", f"{prior}.1", f"{warp}.offset", f"{warp}.dcn", f"{warp}.dcn.conv_offset"
        )
        for stem in (f"{encoder}.1", f"{encoder}.2", f"{up}.2", f"{up}.3", f"{prior}.2", f"{prior}.3"):
            names |= _res_block_names(stem)
    for group in range(4):
        stem = f"multiscale_encoder.blocks.2.swin_blks.{group}"
        names |= _pair(f"{stem}.conv")
        for index in range(6):
            block = f"{stem}.residual_group.blocks.{index}"
            names |= _pair(*(f"{block}.{part}" for part in ("norm1", "norm2", "attn.qkv", "attn.proj")))
            names |= _pair(f"{block}.mlp.fc1", f"{block}.mlp.fc2")
            names |= {f"{block}.attn.relative_position_bias_table", f"{block}.attn.relative_position_index"}
            names |= {f"{block}.attn_mask"} if index % 2 else set()
    return names


def test_names_and_shapes_of_the_published_checkpoint() -> None:
    """Our state under the authors' names has exactly their 487 entries, buffers in their shapes."""
    with torch.device("meta"):
        network = net.Ridcp()
    state = net.to_upstream(network)
    assert set(state) == published_names()
    assert len(state) == 487
    block = "multiscale_encoder.blocks.2.swin_blks.3.residual_group.blocks.5"
    assert state[f"{block}.attn_mask"].shape == (16, 64, 64)
    assert state[f"{block}.attn.relative_position_index"].shape == (64, 64)
    assert state[f"{block}.attn.relative_position_bias_table"].shape == (225, 8)
    assert state["quantize_group.0.embedding.weight"].shape == (1024, 512)
    assert state["multiscale_decoder.warp.1.dcn.conv_offset.weight"].shape == (108, 64, 3, 3)


def test_stored_mask_separates_wrapped_tokens() -> None:
    """The stored mask is -100 between tokens of which only one was wrapped around by the shift, else 0."""
    mask, wrapped = net.shift_mask(32), torch.arange(32) + 4 >= 32
    for index in (0, 3, 9, 12, 15):
        top, left = 8 * (index // 4), 8 * (index % 4)
        kind = (2 * wrapped[top : top + 8, None].int() + wrapped[left : left + 8].int()).flatten()
        assert torch.equal(mask[index] == 0, kind[:, None] == kind[None, :])
    assert set(mask.unique().tolist()) == {0.0, -100.0}


def published_file(path: Path, network: Any, **more: Tensor) -> str:
    """A checkpoint as the authors save it."""
    torch.save({"params": {**net.to_upstream(network), **more}}, path)
    return str(path)


def test_published_checkpoint_loads(tmp_path: Path) -> None:
    """A published file loads strictly; stage 1 parts in it and unwanted code weights are dropped."""
    source = tiny(seed=7)
    more = {
        "quantize_group.0.weight": torch.ones(64),
        "vgg_feat_extractor.vgg_net.conv1_1.weight": torch.ones(2),
        "conv_semantic.0.bias": torch.ones(3),
    }
    path = published_file(tmp_path / "ridcp.pth", source, **more)
    network, label = dehazing.build(replace(TINY_OPTIONS, weights=path), dehazing.TINY_NAME)
    assert label.startswith("sha256:")
    assert label.endswith(path)
    loaded = network.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in source.state_dict().items())


def test_code_weights_come_with_the_checkpoint_or_a_file(tmp_path: Path) -> None:
    """With use_weight the code weights are the checkpoint's, or those of the file named in the options."""
    weights = torch.linspace(-0.1, 0.1, 64)
    checkpoint = published_file(tmp_path / "with.pth", tiny(), **{"quantize_group.0.weight": weights})
    torch.save(weights.flip(0)[None], tmp_path / "bare.pth")
    extra = {"use_weight": True}
    options = replace(TINY_OPTIONS, weights=checkpoint, extra=extra)
    assert torch.equal(dehazing.build(options, dehazing.TINY_NAME)[0].code_weights, weights)
    for source in (checkpoint, None):
        own = replace(options, weights=source, extra=extra | {"code_weights": str(tmp_path / "bare.pth")})
        assert torch.equal(dehazing.build(own, dehazing.TINY_NAME)[0].code_weights, weights.flip(0))


def test_missing_code_weights_are_an_error(tmp_path: Path) -> None:
    """use_weight with a checkpoint that lacks them says which option names their file."""
    path = published_file(tmp_path / "without.pth", tiny())
    with pytest.raises(InputError, match=r"missing: quantize_group\.0\.weight .*code_weights"):
        dehazing.build(replace(TINY_OPTIONS, weights=path, extra={"use_weight": True}), dehazing.TINY_NAME)


@pytest.mark.parametrize("content", [{"not": "a tensor"}, None])
def test_code_weights_must_be_one_tensor(tmp_path: Path, content: object) -> None:
    """A file that holds no bare tensor, or no file at all, is named in the error."""
    path = tmp_path / "weights.pth"
    if content is not None:
        torch.save(content, path)
    extra = {"use_weight": True, "code_weights": str(path)}
    with pytest.raises(InputError, match=r"weights\.pth"):
        dehazing.build(replace(TINY_OPTIONS, extra=extra), dehazing.TINY_NAME)


def test_own_state_dict_loads(tmp_path: Path) -> None:
    """What a trainer saved with our names loads as well."""
    source = tiny(use_weight=True, seed=9)
    torch.save(source.state_dict(), tmp_path / "own.pt")
    options = replace(TINY_OPTIONS, weights=str(tmp_path / "own.pt"), extra={"use_weight": True})
    loaded = dehazing.build(options, dehazing.TINY_NAME)[0].state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in source.state_dict().items())


def test_strict_loader_names_everything_that_is_left(tmp_path: Path) -> None:
    """Every missing, unknown and misshapen entry is named, in the authors' words."""
    state = net.to_upstream(tiny())
    dropped = [name for name in state if name.startswith("decoder_group.1.")]
    kept = {name: value for name, value in state.items() if name not in dropped}
    added = {f"net_d.{index}.weight": torch.ones(1) for index in range(9)}
    misshapen = {"residual_conv.bias": torch.ones(4)}
    torch.save({"params": kept | added | misshapen}, tmp_path / "bad.pth")
    with pytest.raises(InputError) as caught:
        dehazing.build(replace(TINY_OPTIONS, weights=str(tmp_path / "bad.pth")), dehazing.TINY_NAME)
    problems = set(caught.value.problems)
    assert problems >= {f"missing: {name}" for name in dropped}
    assert problems >= {f"unknown: {name}" for name in added}
    assert "shape of residual_conv.bias: (4,) in the file, (3,) in the network" in problems
    assert len(problems) == len(dropped) + len(added) + 1


def test_no_weights_to_download() -> None:
    """Weights called default are refused with the reason: the weights are non-commercial and not ours to give."""
    with pytest.raises(InputError, match=r"CC BY-NC 4\.0"):
        dehazing.build(replace(TINY_OPTIONS, weights="default"), dehazing.TINY_NAME)


# --- The service -------------------------------------------------------------------------------------------------


def service(**extra: Any) -> Any:
    return dehazing.DehazingServable(replace(TINY_OPTIONS, extra=extra), dehazing.TINY_NAME)


def answer(servable: Any, payloads: list[bytes]) -> list[bytes]:
    samples = [servable.decode(payload) for payload in payloads]
    output = servable.to_host(servable.forward(servable.to_device(servable.preprocess(samples))))
    return servable.postprocess(output, len(payloads))


@pytest.mark.parametrize(("reply", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8")])
def test_reply_is_a_picture_of_the_served_size(reply: str, magic: bytes) -> None:
    """One picture file per sample, at the service's image size whatever the requests' sizes."""
    payloads = [images.encode_jpeg(images.made_image(0, height, 90)) for height in (70, 120)]
    servable = service(reply=reply)
    replies = answer(servable, [*payloads, servable.example()])
    assert len(replies) == 3
    assert all(item.startswith(magic) for item in replies)
    assert all(images.decode_rgb(item).shape == (64, 64, 3) for item in replies)


def test_native_reply_keeps_the_size_of_the_request() -> None:
    """With native the answer is as large as the question; mixed sizes in a batch and tiny pictures are refused."""
    servable = service(native=True)
    wide = images.encode_jpeg(images.made_image(0, 40, 70))
    assert images.decode_rgb(answer(servable, [wide])[0]).shape == (40, 70, 3)
    with pytest.raises(ValueError, match=r"mixes pictures of 64x64, 70x40"):
        answer(servable, [wide, images.encode_jpeg(images.made_image(0, 64, 64))])
    with pytest.raises(ValueError, match="20x64 pixels"):
        servable.decode(images.encode_jpeg(images.made_image(0, 64, 20)))


def test_reply_is_clamped_and_rounded() -> None:
    """The reply is the network's picture clamped to [0, 1], times 255, rounded; NaN becomes black."""
    values = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 7.0, math.nan, math.inf])
    levels = service().to_host(values.view(1, 1, 2, 4).expand(1, 3, 2, 4))
    assert levels[0, :, :, 0].flatten().tolist() == [0, 0, 0, 1, 255, 255, 0, 255]
    assert levels.shape == (1, 2, 4, 3)


def test_png_reply_is_lossless() -> None:
    """A PNG reply decodes to the very pixels that were computed."""
    pixels = images.made_image(3, 33, 65)
    assert np.array_equal(images.decode_rgb(dehazing.encode_png(pixels)), pixels)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_serves(precision: str) -> None:
    """Half precision gives a finite picture near the float32 one's level."""
    options = replace(TINY_OPTIONS, precision=precision)
    servable = dehazing.DehazingServable(options, dehazing.TINY_NAME)
    out = servable.forward(servable.to_device(picture(1, 64, 64)))
    assert out.isfinite().all()
    assert servable.info.precision == precision


def test_service_describes_itself() -> None:
    """HELLO says the model, its size, its weights and the matching in force."""
    info = service(use_weight=True).info
    assert (info.model, info.task, info.weights) == ("RIDCP_dehazing_tiny", "dehazing", "random")
    assert info.params == sum(parameter.numel() for parameter in tiny().parameters())
    assert info.notes == "controllable matching, alpha -21.25; mean ratio per sample"


def test_same_seed_same_weights() -> None:
    """Random weights depend on the seed alone and leave the process's random state alone."""
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one, other = (dehazing.build(TINY_OPTIONS, dehazing.TINY_NAME)[0] for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.head.weight, other.head.weight)
    third = dehazing.build(replace(TINY_OPTIONS, seed=4), dehazing.TINY_NAME)[0]
    assert not torch.equal(one.head.weight, third.head.weight)


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"aplha": 1.0}, 'did you mean "alpha"'),
        ({"use_weight": 1}, "use_weight is 1: give a bool"),
        ({"alpha": "x"}, "alpha is 'x': give a float"),
        ({"quality": 0}, "quality is 0"),
        ({"quality": True}, "quality is True: give a int"),
        ({"reply": "gif"}, "give one of png, jpeg"),
        ({"max_size": 20}, "max_size is 20"),
        ({"code_weights": "w.pth"}, "only with use_weight"),
    ],
)
def test_bad_options_are_named(extra: dict[str, Any], problem: str) -> None:
    """An unknown option or a value that does not do is an InputError that says what to give."""
    with pytest.raises(InputError, match=problem):
        dehazing.DehazingOptions.of(extra)


def test_all_option_problems_at_once() -> None:
    """Every problem is listed, not the first only."""
    with pytest.raises(InputError) as caught:
        dehazing.DehazingOptions.of({"reply": "gif", "what": 1, "alpha": None})
    assert len(caught.value.problems) == 3


def test_image_size_has_a_least_value() -> None:
    """A service or trainer below 32 pixels is refused when it is built."""
    with pytest.raises(InputError, match="at least 32"):
        dehazing.DehazingServable(replace(TINY_OPTIONS, image_size=16), dehazing.TINY_NAME)


def test_listing_is_cheap() -> None:
    """Importing the plug-in imports no torch."""
    code = (
        "import sys; from corun.registry import load_plugin; rows = load_plugin('models', 'dehazing').MODELS;"
        "assert [row.name for row in rows] == ['RIDCP_dehazing', 'RIDCP_dehazing_tiny'];"
        "assert all('CC BY-NC 4.0' in row.weights_licence for row in rows);"
        "assert not {'torch', 'torchvision'} & set(sys.modules)"
    )
    source = Path(__file__).resolve().parents[3] / "src"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(source)})


# --- Training ----------------------------------------------------------------------------------------------------


def training_batch(side: int = 64) -> tuple[Tensor, Tensor]:
    clear = picture(2, side, side)
    return 0.4 * clear + 0.5, clear


def test_training_reduces_the_loss_and_keeps_the_frozen_part() -> None:
    """Some Adam steps lower the loss; code book, its way out and the prior decoder stay as they were."""
    trainable = dehazing.DehazingTrainable(TINY_OPTIONS, dehazing.TINY_NAME)
    before = {name: value.clone() for name, value in trainable.module.state_dict().items()}
    free = [parameter for parameter in trainable.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(free, lr=1e-3, betas=(0.9, 0.99))
    batch, losses = training_batch(), []
    for _ in range(6):
        loss = trainable.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, value in trainable.module.state_dict().items() if not torch.equal(value, before[name])}
    frozen = ("codebook.", "unproject.", "prior.", "prior_out.")
    assert changed == {
        name for name, value in before.items() if value.is_floating_point() and not name.startswith(frozen)
    }


def test_frozen_names_follow_the_paper() -> None:
    """Not trained: parameters named quantize, decoder_group, after_quant_group or out_conv upstream."""
    with torch.device("meta"):
        network = net.trainable_part(net.Ridcp())
    frozen = {net.upstream_name(name).split(".")[0] for name, p in network.named_parameters() if not p.requires_grad}
    trained = {net.upstream_name(name).split(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert frozen == {"quantize_group", "decoder_group", "after_quant_group", "out_conv"}
    assert trained == {"multiscale_encoder", "multiscale_decoder", "before_quant_group", "residual_conv"}


def test_features_reach_the_residual_decoder_detached() -> None:
    """With the code step cut, pixel losses leave the encoder alone: its features are detached."""
    network = tiny()
    network.unproject.register_forward_pre_hook(lambda _module, inputs: inputs[0].detach())
    network(picture(1, 64, 64)).image.sum().backward()
    assert all(parameter.grad is None for parameter in network.encoder.parameters())
    assert network.decoder.up[0][1].weight.grad.abs().sum() > 0


def test_code_step_passes_gradients_straight_through() -> None:
    """Through the code step the gradient reaches z unchanged, while the value is the code itself."""
    network = tiny()
    seen: list[Tensor] = []
    network.unproject.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    z = network(picture(1, 64, 64)).z
    gradient = torch.randn(z.shape, generator=torch.Generator().manual_seed(6))
    assert torch.equal(torch.autograd.grad(seen[0], z, gradient)[0], gradient)
    torch.testing.assert_close(seen[0], network.entries(network.nearest(z)))


def test_commitment_loss_is_its_formula() -> None:
    """0.25 * mse(z, e) + mse of the Gram matrices over positions; zero when z is the code."""
    rng = torch.Generator().manual_seed(0)
    z, e = torch.randn(2, 3, 4, 5, generator=rng), torch.randn(2, 3, 4, 5, generator=rng)
    grams = [torch.einsum("bchw,bdhw->bcd", x, x) / 20 for x in (z, e)]
    expected = 0.25 * ((z - e) ** 2).mean() + ((grams[0] - grams[1]) ** 2).mean()
    torch.testing.assert_close(net.commitment_loss(z, e), expected)
    assert net.commitment_loss(e, e) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_takes_any_size(precision: str) -> None:
    """Pictures whose sides are no multiples of 32 are padded for the step; bf16 keeps the loss in float32."""
    trainable = dehazing.DehazingTrainable(replace(TINY_OPTIONS, precision=precision), dehazing.TINY_NAME)
    loss = trainable.loss(training_batch(50))
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert trainable.min_batch == 1


@given(st.integers(32, 1000))
def test_training_pads_only_where_needed(side: int) -> None:
    """A multiple of 32 from 64 on is left alone; anything else grows by less than a window, at most doubled."""
    padded = net.trained_side(side)
    assert padded % 32 == 0
    assert padded == side if side % 32 == 0 and side >= 64 else side < padded <= 2 * side


def test_training_refuses_tiny_pictures() -> None:
    """Under 32 pixels a side the trainer says so."""
    with pytest.raises(ValueError, match="need 32 pixels"):
        net.trained_side(31)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.no_grad()
def test_cuda_equals_cpu() -> None:
    """On CUDA (torchvision's operator) the network gives what it gives on the CPU (sampling)."""
    network, x = tiny(), picture(2, 96, 64)
    expected = network(x).image
    assert difference(network.cuda()(x.cuda()).image.cpu(), expected) < 1e-2
