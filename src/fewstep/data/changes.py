"""Turned, mirrored and shifted images: (..., channels, height, width), a number for each image."""

from __future__ import annotations

import torch
from torch import Tensor


def turn(x: Tensor, quarters: Tensor) -> Tensor:
    """Turn each image by so many quarter turns, 0 to 3; `quarters` broadcasts over the images."""
    for k in (1, 2, 3):
        x = torch.where((quarters == k)[..., None, None, None], x.rot90(k, (-2, -1)), x)
    return x


def mirror(x: Tensor, which: Tensor) -> Tensor:
    """Mirror the images that `which` marks left to right."""
    return torch.where(which[..., None, None, None], x.flip(-1), x)


def shift(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Take each pixel from so many rows further down and columns further right, or the edge."""
    rows = _from(x.shape[-2], down)[..., None, :, None]
    columns = _from(x.shape[-1], right)[..., None, None, :]
    return x.take_along_dim(rows, -2).take_along_dim(columns, -1)


def _from(side: int, by: Tensor) -> Tensor:
    """Return which row, or column, comes where: (..., side)."""
    return (torch.arange(side, device=by.device) + by[..., None]).clamp(0, side - 1)
