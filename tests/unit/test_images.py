"""Image bytes and geometry: torchvision's numbers, letterbox coordinates, and no crash on damaged bytes."""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional

from corun import images

JPEG = images.encode_jpeg(images.made_image(0, 60, 80))


@given(st.integers(1, 120), st.integers(1, 120), st.integers(1, 64), st.sampled_from(["bilinear", "bicubic"]))
@settings(max_examples=50, deadline=None)
def test_geometry_equals_torchvision(height: int, width: int, side: int, how: str) -> None:
    """resize_shorter and centre_crop give torchvision's pixels for every shape, padding included."""
    picture = images.made_image(1, height, width)
    resampling = images.BILINEAR if how == "bilinear" else images.BICUBIC
    theirs = functional.resize(Image.fromarray(picture), side, functional.InterpolationMode(how))
    mine = images.resize_shorter(picture, side, resampling)
    assert np.array_equal(mine, np.asarray(theirs))
    for crop in (side, side + 3):
        assert np.array_equal(
            images.centre_crop(mine, crop), np.asarray(functional.center_crop(theirs, [crop, crop]))
        )


def test_normalise_equals_torchvision() -> None:
    """The float32 result equals to_tensor and normalize bit for bit."""
    picture = images.made_image(2, 33, 47)
    theirs = functional.normalize(
        functional.to_tensor(picture), list(images.IMAGENET_MEAN), list(images.IMAGENET_STD)
    )
    assert np.array_equal(images.normalise(picture), theirs.numpy())
    assert torch.from_numpy(images.scaled(picture)).is_contiguous()


@given(st.integers(1, 300), st.integers(1, 300), st.integers(8, 128))
@settings(max_examples=50, deadline=None)
def test_letterbox_places_the_picture(height: int, width: int, size: int) -> None:
    """The square has the picture where scale, left and top say, to a pixel, and the pad value elsewhere."""
    square, scale, left, top = images.letterbox(np.zeros((height, width, 3), np.uint8), size)
    assert square.shape == (size, size, 3)
    rows, columns = np.nonzero((square == 0).all(axis=2))
    assert (rows.min(), columns.min()) == (top, left)
    assert abs(rows.max() + 1 - (height * scale + top)) <= 1
    assert abs(columns.max() + 1 - (width * scale + left)) <= 1
    assert set(np.unique(square)) <= {0, 114}


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_decode_or_raise_value_error(data: st.DataObject) -> None:
    """Whatever bytes are changed or cut off, decoding gives an RGB array or a ValueError, nothing else."""
    damaged = bytearray(JPEG[: data.draw(st.integers(0, len(JPEG)))])
    for _ in range(data.draw(st.integers(0, 6)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ValueError):
        decoded = images.decode_rgb(damaged)
        assert decoded.ndim == 3
        assert decoded.shape[2] == 3


def test_a_picture_of_too_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file that would unpack to a huge picture is refused before it is unpacked."""
    monkeypatch.setattr(images, "MAX_PIXELS", 60 * 80 - 1)
    with pytest.raises(ValueError, match="more than"):
        images.decode_rgb(JPEG)


def test_other_formats_are_refused() -> None:
    """Only JPEG and PNG are decoded, so no other decoder can be reached from a socket."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="BMP")
    with pytest.raises(ValueError, match="neither JPEG nor PNG"):
        images.decode_rgb(buffer.getvalue())


def test_jpeg_round_trip_is_close() -> None:
    """Encoding and decoding keeps the shape and, on a smooth picture, every value to a few levels."""
    ramp = np.linspace(0, 255, 80).astype(np.uint8)
    picture = np.repeat(np.repeat(ramp[None, :, None], 60, axis=0), 3, axis=2)
    back = images.decode_rgb(images.encode_jpeg(picture))
    assert back.shape == picture.shape
    assert np.abs(back.astype(int) - picture).max() <= 6
