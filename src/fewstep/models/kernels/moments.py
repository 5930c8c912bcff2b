"""Moments of the patches of images with few channels; no patch is written."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.models.form import channels_last
from fewstep.models.kernels import call, operations, take

own = torch.ops.fewstep

_MOST = 3  # channels


def fits(x: Tensor, stride: int, groups: int) -> bool:
    """Whether the kernel takes these images."""
    return stride == 1 and x.shape[1] // groups <= _MOST and min(x.shape[2:]) >= 2 and take(x)


def of_patches(x: Tensor, stride: int, groups: int) -> tuple[Tensor, Tensor]:
    """Return the mean of each group's 3x3 patches and of their products, in float64.

    (groups, channels x 9, 1) and (groups, channels x 9, channels x 9).
    """
    return own.moments(channels_last(x), groups)  # type: ignore[no-any-return]


def _moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    n, all_channels, height, width = x.shape
    channels = all_channels // groups
    first = x.new_empty(groups, channels * 9, 1, dtype=torch.float64)
    second = x.new_empty(groups, channels * 9, channels * 9, dtype=torch.float64)
    call("moments", x.dtype, first, second, x, (n, height, width, groups, channels))
    return first, second


operations.define("moments(Tensor x, int groups) -> (Tensor, Tensor)")
operations.impl("moments", _moments, "CPU")
