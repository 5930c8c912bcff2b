"""Decoding one image."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from fewstep.core.errors import InputError
from fewstep.data.prepared import Pixels


def decode(content: bytes, name: str, size: int, mode: Literal["L", "RGB"]) -> Pixels:
    """Return an image as (channels, size, size), resized with antialiasing.

    The conversion comes before the resizing: on 1-bit images PIL ignores the filter.

    Args:
        content: An image file.
        name: What to call it in an error.
        size: Height and width of the result.
        mode: "L" for one channel, "RGB" for three.

    Raises:
        InputError: `content` is not a whole image.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            converted = image.convert(mode)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(
            f"{name} is not a readable image ({str(error)[:80]}); replace or remove it"
        ) from error
    if converted.size != (size, size):
        converted = converted.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(converted, dtype=np.uint8)
    return pixels[None] if mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def strokes(content: bytes, name: str, size: int) -> Pixels:
    """Return an image of dark ink on light paper with strokes of 255 on 0, (1, size, size)."""
    return np.subtract(255, decode(content, name, size, "L"), dtype=np.uint8)
