"""Convolutions and their gradients, by Winograd's kernel where it is faster.

Images are (examples, groups x channels, height, width), channels-last; each group of channels has
filters of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.models.kernels import winograd

aten, own = torch.ops.aten, torch.ops.fewstep


class Space(NamedTuple):
    """Where a convolution's filters go: (vertically, horizontally) each."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)


def convolve(factors: Sequence[Tensor], space: Space, groups: int) -> Tensor:
    """Return conv(x, w) of factors (x, w), or conv(x, w) + conv(x2, w2) of (x, w, x2, w2)."""
    x, w, *more = factors
    if _has_kernel(x, w, space, groups):
        x2, w2 = more or (None, None)
        return own.winograd_convolve(x, w, x2, w2, groups, False)  # type: ignore[no-any-return]
    y = F.conv2d(x, w, None, *space, groups)
    return y.add_(convolve(more, space, groups)) if more else y


def gradients(
    g: Tensor, x: Tensor, w: Tensor, space: Space, groups: int, *, by_x: bool, by_w: bool
) -> tuple[Any, Any]:
    """Return the gradients of conv(x, w) . g by x and by w, where they are asked for."""
    if _has_kernel(x, w, space, groups):
        gx = own.winograd_convolve(g, w, None, None, groups, True) if by_x else None
        return gx, own.winograd_correlate(x, g, groups) if by_w else None
    if w.dtype == torch.float64:  # which oneDNN does not take, and PyTorch's own wants so
        w = w.contiguous()
    where = (*space, False, (0, 0))
    gx, gw, _ = aten.convolution_backward(g, x, w, None, *where, groups, (by_x, by_w, False))
    return gx, gw


def _has_kernel(x: Tensor, w: Tensor, space: Space, groups: int) -> bool:
    return space == Space() and w.shape[2:] == (3, 3) and winograd.fits(x, w, groups)
