"""`ConvolveAndPool` of `block_functions`, for images with few channels.

Nothing of full resolution is written: not the convolution's outputs, nor their gradient, which is 0
in three of four places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.models.form import Form, channels_last
from fewstep.models.kernels import call, images_like, operations, take_filters

own = torch.ops.fewstep

_MOST = 3  # channels


def fits(x: Tensor, w: Tensor, b: Tensor, form: Form, groups: int) -> bool:
    """Whether the kernels take these images, filters and shifts."""
    return (
        form.pool
        and form.stride == 1
        and w.shape[1] <= _MOST
        and min(x.shape[2:]) >= 2
        and b.numel() == w.shape[0]
        and take_filters(x, w, groups)
    )


def convolve(x: Tensor, w: Tensor, b: Tensor, form: Form, groups: int) -> tuple[Tensor, Tensor]:
    """Return the pooled conv(x, w) + b, and the maxima's places in their squares, 0 to 3."""
    return own.pooled_convolve(x, w.contiguous(), b.contiguous(), groups)  # type: ignore[no-any-return]


def convolve_at(x: Tensor, w: Tensor, b: Tensor, where: Tensor, form: Form, groups: int) -> Tensor:
    """Return conv(x, w) + b where `convolve` found the maxima."""
    return own.pooled_convolve_at(x, w.contiguous(), b.contiguous(), where, groups)  # type: ignore[no-any-return]


def correlate(
    x: Tensor, g: Tensor, where: Tensor, form: Form, groups: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients by w and b, of g by the maxima."""
    return own.pooled_correlate(x, channels_last(g), where, groups)  # type: ignore[no-any-return]


def _convolve(x: Tensor, w: Tensor, b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    p = _pooled(x, w)
    where = torch.empty_like(p, dtype=torch.uint8)
    call("pooled_convolve", x.dtype, p, where, x, w, b, _shape(x, w, groups))
    return p, where


def _convolve_at(x: Tensor, w: Tensor, b: Tensor, where: Tensor, groups: int) -> Tensor:
    p = _pooled(x, w)
    call("pooled_convolve_at", x.dtype, p, where, x, w, b, _shape(x, w, groups))
    return p


def _correlate(x: Tensor, g: Tensor, where: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    out, channels = g.shape[1], x.shape[1] // groups
    gw, gb = g.new_empty(out, channels, 3, 3), g.new_empty(out)
    call("pooled_correlate", x.dtype, gw, gb, x, g, where, _shape(x, gw, groups))
    return gw, gb


def _pooled(x: Tensor, w: Tensor) -> Tensor:
    return images_like(x, len(x), w.shape[0], x.shape[2] // 2, x.shape[3] // 2)


def _shape(x: Tensor, w: Tensor, groups: int) -> tuple[int, ...]:
    return len(x), *x.shape[2:], groups, w.shape[1], w.shape[0] // groups


operations.define("pooled_convolve(Tensor x, Tensor w, Tensor b, int groups) -> (Tensor, Tensor)")
operations.define(
    "pooled_convolve_at(Tensor x, Tensor w, Tensor b, Tensor where, int groups) -> Tensor"
)
operations.define(
    "pooled_correlate(Tensor x, Tensor g, Tensor where, int groups) -> (Tensor, Tensor)"
)
operations.impl("pooled_convolve", _convolve, "CPU")
operations.impl("pooled_convolve_at", _convolve_at, "CPU")
operations.impl("pooled_correlate", _correlate, "CPU")
