"""3x3 convolutions of padding 1 and their gradients, by Winograd's kernel where it is faster.

Images are (examples, groups x channels, height, width), channels-last; each group of channels has
filters of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.models.kernels import winograd

aten, own = torch.ops.aten, torch.ops.fewstep


def convolve(factors: Sequence[Tensor], stride: int, groups: int) -> Tensor:
    """Return conv(x, w) of factors (x, w), or conv(x, w) + conv(x2, w2) of (x, w, x2, w2)."""
    x, w, *more = factors
    if winograd.fits(x, w, stride, groups):
        x2, w2 = more or (None, None)
        return own.winograd_convolve(x, w, x2, w2, groups, False)  # type: ignore[no-any-return]
    y = F.conv2d(x, w, None, stride, 1, 1, groups)
    return y.add_(convolve(more, stride, groups)) if more else y


def gradients(
    g: Tensor, x: Tensor, w: Tensor, stride: int, groups: int, *, by_x: bool, by_w: bool
) -> tuple[Any, Any]:
    """Return the gradients of conv(x, w) . g by x and by w, where they are asked for."""
    if winograd.fits(x, w, stride, groups):
        gx = own.winograd_convolve(g, w, None, None, groups, True) if by_x else None
        return gx, own.winograd_correlate(x, g, groups) if by_w else None
    space = ((stride, stride), (1, 1), (1, 1), False, (0, 0))
    gx, gw, _ = aten.convolution_backward(g, x, w, None, *space, groups, (by_x, by_w, False))
    return gx, gw
