"""Changed images: (..., channels, height, width), by a number, or numbers, for each image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def turn(x: Tensor, quarters: Tensor) -> Tensor:
    """Turn each image by so many quarter turns, 0 to 3; `quarters` broadcasts over the images."""
    for k in (1, 2, 3):
        x = torch.where((quarters == k)[..., None, None, None], x.rot90(k, (-2, -1)), x)
    return x


def orient(x: Tensor, number: Tensor) -> Tensor:
    """Turn each image by `number` quarter turns, or by `number` - 4 and then mirror it; 0 to 7."""
    return mirror(turn(x, number % 4), number >= 4)


def mirror(x: Tensor, which: Tensor) -> Tensor:
    """Mirror the images that `which` marks left to right."""
    return torch.where(which[..., None, None, None], x.flip(-1), x)


def shift(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Take each pixel from so many rows further down and columns further right, or the edge."""
    rows = _from(x.shape[-2], down)[..., None, :, None]
    columns = _from(x.shape[-1], right)[..., None, None, :]
    return x.take_along_dim(rows, -2).take_along_dim(columns, -1)


def crop(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Cut a rectangle out of each image and stretch it to the whole, bilinearly.

    Args:
        x: Floating-point images.
        top: Where the rectangle begins, as a share of the image's height.
        left: The same across.
        height: Its height as a share of the image's, above 0; `top + height` is at most 1.
        width: The same across.
    """
    rows, columns = (
        2 * (start[..., None] + extent[..., None] * _centres(side, x)) - 1
        for start, extent, side in ((top, height, x.shape[-2]), (left, width, x.shape[-1]))
    )
    grid = torch.stack(torch.broadcast_tensors(columns[..., None, :], rows[..., None]), -1)
    grid = grid.expand(*x.shape[:-3], *grid.shape[-3:]).to(x.dtype)
    cut = F.grid_sample(
        x.reshape(-1, *x.shape[-3:]), grid.reshape(-1, *grid.shape[-3:]),
        padding_mode="border", align_corners=False,
    )  # fmt: skip
    return cut.view_as(x)


def _centres(side: int, like: Tensor) -> Tensor:
    """Return where the centres of pixels are, within 0 and 1."""
    return (torch.arange(side, device=like.device) + 0.5) / side


def recolour(x: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Multiply brightness, distance from the mean brightness, and distance from grey.

    Args:
        x: Floating-point images within 0 and 1, which the results are brought within.
        brightness: Factor on all values.
        contrast: Factor on what they differ by from their image's mean.
        saturation: Factor on what they differ by from the mean of their pixel's channels.
    """
    brightness, contrast, saturation = (
        factor[..., None, None, None].to(x.dtype) for factor in (brightness, contrast, saturation)
    )
    grey, mean = x.mean(-3, keepdim=True), x.mean((-3, -2, -1), keepdim=True)
    vivid = torch.lerp(grey, x, saturation)
    return torch.lerp(mean, vivid, contrast).mul_(brightness).clamp_(0, 1)


def _from(side: int, by: Tensor) -> Tensor:
    """Return which row, or column, comes where: (..., side)."""
    return (torch.arange(side, device=by.device) + by[..., None]).clamp(0, side - 1)
