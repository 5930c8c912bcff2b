"""3x3 convolutions with fewer multiplications.

Winograd's F(4x4, 3x3) takes 36 multiplications where a convolution has 144. In float32 it is 4e-7
to 9e-7 of the whole off, where PyTorch's convolutions are 2e-7 to 4e-7.

Reference: Lavin and Gray, Fast algorithms for convolutional neural networks, CVPR 2016.
"""

from __future__ import annotations

from torch import Tensor

from fewstep.models.kernels import LANES, call, images_like, operations, take_filters

_TILE = 4  # height and width of the outputs of a tile


def fits(x: Tensor, w: Tensor, groups: int) -> bool:
    """Whether the kernel takes these images and filters, and saves half of the multiplications."""
    height, width = x.shape[2:]
    tiles = -(-height // _TILE) * -(-width // _TILE)
    return w.shape[1] % LANES == 0 and height * width >= 8 * tiles and take_filters(x, w, groups)


def convolve(
    x: Tensor, w: Tensor, x2: Tensor | None, w2: Tensor | None, groups: int, turned: bool
) -> Tensor:
    """Return conv(x, w), or conv(x, w) + conv(x2, w2); transposed ones, if `turned`.

    Args:
        x: (examples, groups x channels, height, width), channels-last.
        w: 3x3 filters, (groups x out, channels, 3, 3), in any layout.
        x2: More images, of the same shape.
        w2: Their filters.
        groups: Groups of channels.
        turned: Of the convolution with these filters, take the gradient by its input.
    """
    examples, _, height, width = x.shape
    out, channels = w.shape[0] // groups, w.shape[1]
    if turned:
        out, channels = channels, out
    y = images_like(x, examples, groups * out, height, width)
    more = (None, None, None) if x2 is None or w2 is None else (x2, w2, w2.stride())
    shape = (examples, height, width, groups, channels, out)
    call("winograd_convolve", x.dtype, y, x, w, w.stride(), *more, shape, int(turned))
    return y


def correlate(x: Tensor, g: Tensor, groups: int) -> Tensor:
    """Return the gradient of conv(x, w) by w, of g by the outputs; its layout is channels-last.

    Args:
        x: (examples, groups x channels, height, width), channels-last.
        g: (examples, groups x out, height, width), channels-last.
        groups: Groups of channels.
    """
    examples, _, height, width = x.shape
    channels, out = x.shape[1] // groups, g.shape[1] // groups
    gw = images_like(x, groups * out, channels, 3, 3)
    shape = (examples, height, width, groups, channels, out)
    call("winograd_correlate", x.dtype, gw, x, g, shape)
    return gw


operations.define(
    "winograd_convolve(Tensor x, Tensor w, Tensor? x2, Tensor? w2, int groups, bool turned)"
    " -> Tensor"
)
operations.define("winograd_correlate(Tensor x, Tensor g, int groups) -> Tensor")
operations.impl("winograd_convolve", convolve, "CPU")
operations.impl("winograd_correlate", correlate, "CPU")
