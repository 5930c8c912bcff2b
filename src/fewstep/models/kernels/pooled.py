"""3x3 convolutions of images with few channels, of which the pool alone reads the outputs.

Nothing of full resolution is written: not the convolution's outputs, nor their gradient, which is 0
in three of four places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.models.kernels import LANES, call, channels_last, operations, take

_MOST = 3  # channels


def fits(x: Tensor, w: Tensor, stride: int, groups: int) -> bool:
    """Whether the kernel takes these images and filters."""
    return (
        stride == 1
        and w.shape[1] <= _MOST
        and w.shape[0] // groups % LANES == 0
        and min(x.shape[2:]) >= 2
        and take(x, w)
    )


def convolve(x: Tensor, w: Tensor, b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the maxima of conv(x, w) + b in squares of 2x2, and their places in these, 0 to 3.

    Args:
        x: (examples, groups x channels, height, width), channels-last.
        w: 3x3 filters, (groups x out, channels, 3, 3), contiguous.
        b: (groups x out,).
        groups: Groups of channels.
    """
    p = _pooled(x, w)
    where = torch.empty_like(p, dtype=torch.uint8)
    call("pooled_convolve", x.dtype, p, where, x, w, b, _shape(x, w, groups))
    return p, where


def convolve_at(x: Tensor, w: Tensor, b: Tensor, where: Tensor, groups: int) -> Tensor:
    """Return conv(x, w) + b at places that `convolve` found, of the same shapes."""
    p = _pooled(x, w)
    call("picked_convolve", x.dtype, p, where, x, w, b, _shape(x, w, groups))
    return p


def correlate(x: Tensor, g: Tensor, where: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the gradients by w and b, of g by the maxima."""
    out, channels = g.shape[1], x.shape[1] // groups
    gw, gb = g.new_empty(out, channels, 3, 3), g.new_empty(out)
    call("pooled_correlate", x.dtype, gw, gb, x, g, where, _shape(x, gw, groups))
    return gw, gb


def _pooled(x: Tensor, w: Tensor) -> Tensor:
    return channels_last(x, len(x), w.shape[0], x.shape[2] // 2, x.shape[3] // 2)


def _shape(x: Tensor, w: Tensor, groups: int) -> tuple[int, ...]:
    return len(x), *x.shape[2:], groups, w.shape[1], w.shape[0] // groups


operations.define("pooled_convolve(Tensor x, Tensor w, Tensor b, int groups) -> (Tensor, Tensor)")
operations.define(
    "pooled_convolve_at(Tensor x, Tensor w, Tensor b, Tensor where, int groups) -> Tensor"
)
operations.define(
    "pooled_correlate(Tensor x, Tensor g, Tensor where, int groups) -> (Tensor, Tensor)"
)
operations.impl("pooled_convolve", convolve, "CPU")
operations.impl("pooled_convolve_at", convolve_at, "CPU")
operations.impl("pooled_correlate", correlate, "CPU")
