"""Decoding one image."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

from fewstep.core.errors import InputError
from fewstep.data.prepared import Pixels

DECODING = 1
"""Raised with each change of the pixels below, so that what was prepared before is not taken."""


def decode(content: bytes, name: str, size: int, mode: Literal["L", "RGB"]) -> Pixels:
    """Return an image as (channels, size, size), resized with antialiasing.

    It is turned upright as its EXIF orientation says, and laid on white where it is transparent.
    The conversion comes before the resizing: on 1-bit images PIL ignores the filter.

    Args:
        content: An image file.
        name: What to call it in an error.
        size: Height and width of the result.
        mode: "L" for one channel, "RGB" for three.

    Raises:
        InputError: `content` is not a whole image, or one of more than 16 bits.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            tags = getattr(image, "tag_v2", {})  # of a TIFF
            converted = _opaque(ImageOps.exif_transpose(image), tags).convert(mode)
    except Exception as error:  # of any kind: PIL's parsers trust a damaged file
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "of no known format" if is_unknown else str(error)[:120]
        raise InputError(
            f"{name} is not a readable image ({reason}); replace or remove it"
        ) from error
    if converted.size != (size, size):
        converted = converted.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(converted, dtype=np.uint8)
    return pixels[None] if mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _opaque(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Return an image of 8 bits and no transparency, where PIL's conversions clip or drop."""
    if image.mode in ("I", "F"):
        raise ValueError("its pixels of 32 bits have no known white; save 8 or 16 bits")
    if image.mode.startswith("I;16"):
        return _of_16_bits(image, tags)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA"))
    return image


def _of_16_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Return 8 bits of a grey image of up to 16, which PIL leaves as they were stored."""
    full = 2 ** tags.get(BITSPERSAMPLE, (16,))[0] - 1
    stored = np.asarray(image).astype(np.uint32)
    grey = (stored.clip(max=full) * 255 + full // 2) // full
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero
        grey = 255 - grey
    if (key := image.info.get("transparency")) is not None:
        grey[stored == key] = 255
    return Image.fromarray(grey.astype(np.uint8))


def strokes(content: bytes, name: str, size: int) -> Pixels:
    """Return an image of dark ink on light paper with strokes of 255 on 0, (1, size, size)."""
    return np.subtract(255, decode(content, name, size, "L"), dtype=np.uint8)
