"""`ConvolveAndPool` of `block_functions`, and its two derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.models.convolution import Space, gradients
from fewstep.models.form import Form, channels_last
from fewstep.models.plain.pool import pick, pool, unpool


def convolve(
    x: Tensor, w: Tensor, b: Tensor, form: Form, groups: int
) -> tuple[Tensor, Tensor | None]:
    """Return the pooled conv(x, w) + b, and where the maxima are."""
    return pool(_convolved(x, w, b, form, groups), form)


def convolve_at(
    x: Tensor, w: Tensor, b: Tensor, where: Tensor | None, form: Form, groups: int
) -> Tensor:
    """Return conv(x, w) + b where `convolve` found the maxima."""
    return pick(_convolved(x, w, b, form, groups), where)


def correlate(
    x: Tensor, g: Tensor, where: Tensor | None, form: Form, groups: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients by w and b, of g by the maxima."""
    out, channels = g.shape[1], x.shape[1] // groups
    size = [(length - 1) // form.stride + 1 for length in x.shape[2:]]
    gy = unpool(g, where, torch.Size((len(x), out, *size)))
    w = x.new_empty(out, channels, 3, 3)  # for its shape
    _, gw = gradients(gy, x, w, Space((form.stride,) * 2), groups, by_x=False, by_w=True)
    return gw, g.sum((0, 2, 3))


def _convolved(x: Tensor, w: Tensor, b: Tensor, form: Form, groups: int) -> Tensor:
    return F.conv2d(x, channels_last(w), b, form.stride, 1, 1, groups)
