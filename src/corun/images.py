"""Images as services see them: encoded bytes <-> RGB arrays, and the geometry between (PIL and numpy only).

One representation everywhere: an RGB `uint8` array of shape (height, width, 3). Resizing goes through PIL, so
results equal torchvision's evaluation transforms bit for bit, which resize PIL images the same way:

    decode_rgb -> resize_shorter(round(size * 256 / 224)) -> centre_crop(size) -> normalise -> float32 CHW

Clients use this module too, so it must never import torch.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Rgb = NDArray[np.uint8]
Chw = NDArray[np.float32]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FORMATS = ("JPEG", "PNG")
SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_PIXELS = 64 * 1024 * 1024
BILINEAR = Image.Resampling.BILINEAR
BICUBIC = Image.Resampling.BICUBIC

# What PIL's JPEG and PNG decoders raise on damaged input.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


def decode_rgb(payload: bytes | bytearray | memoryview) -> Rgb:
    """Decode a JPEG or PNG to RGB, shape (height, width, 3); EXIF orientation is not applied.

    Raises ValueError with a sentence: not an image, another format, truncated, or over MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(payload), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width}x{picture.height} pixels, more than {MAX_PIXELS}")
            return np.asarray(picture.convert("RGB"))
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        foreign = isinstance(error, UnidentifiedImageError)
        reason = "it is neither JPEG nor PNG" if foreign else str(error)
        raise ValueError(f"payload of {len(payload)} bytes is not a readable image: {reason}") from None


def encode_jpeg(image: Rgb, quality: int = 90) -> bytes:
    """Encode an RGB array as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def resize(image: Rgb, height: int, width: int, interpolation: Image.Resampling = BILINEAR) -> Rgb:
    """Resize to exactly (height, width), antialiased."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), interpolation))


def resize_shorter(image: Rgb, side: int, interpolation: Image.Resampling = BILINEAR) -> Rgb:
    """Resize so that the shorter side is `side`; the longer one is truncated as torchvision does."""
    height, width = image.shape[:2]
    if height <= width:
        return resize(image, side, int(side * width / height), interpolation)
    return resize(image, int(side * height / width), side, interpolation)


def centre_crop(image: Rgb, height: int, width: int | None = None) -> Rgb:
    """Cut (height, width) from the middle; a smaller image is padded with black first, like torchvision."""
    width = height if width is None else width
    missing_h, missing_w = max(0, height - image.shape[0]), max(0, width - image.shape[1])
    if missing_h or missing_w:
        before_h, before_w = missing_h // 2, missing_w // 2
        image = np.pad(image, ((before_h, missing_h - before_h), (before_w, missing_w - before_w), (0, 0)))
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]


def letterbox(image: Rgb, size: int, value: int = 114) -> tuple[Rgb, float, int, int]:
    """Fit into a size x size square and pad with `value`: (square, scale, left, top).

    A point (x, y) of the input lies at (x * scale + left, y * scale + top) in the square.
    """
    height, width = image.shape[:2]
    scale = min(size / height, size / width)
    new_h, new_w = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size - new_h) // 2, (size - new_w) // 2
    square = np.full((size, size, 3), value, dtype=np.uint8)
    square[top : top + new_h, left : left + new_w] = resize(image, new_h, new_w)
    return square, scale, left, top


def scaled(image: Rgb) -> Chw:
    """To float32 in [0, 1], shape (3, height, width), contiguous."""
    return np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)


def normalise(image: Rgb, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> Chw:
    """To float32 (x / 255 - mean) / std, shape (3, height, width); ImageNet's statistics by default."""
    chw = scaled(image)
    chw -= np.asarray(mean, dtype=np.float32)[:, None, None]
    chw /= np.asarray(std, dtype=np.float32)[:, None, None]
    return chw


def made_image(seed: int, height: int, width: int) -> Rgb:
    """A seeded picture with the statistics of a photograph (energy at low frequencies), not white noise."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), dtype=np.float32)
    for cells, weight in ((3, 0.6), (12, 0.3), (48, 0.1)):
        coarse = rng.integers(0, 256, size=(cells, cells, 3), dtype=np.uint8)
        total += np.float32(weight) * resize(coarse, height, width, BICUBIC)
    return total.clip(0, 255).astype(np.uint8)
