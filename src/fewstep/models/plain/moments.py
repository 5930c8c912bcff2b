"""Moments of the patches of images."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def of_patches(x: Tensor, stride: int, groups: int) -> tuple[Tensor, Tensor]:
    """Return the mean of each group's 3x3 patches and of their products, in float64.

    (groups, channels x 9, 1) and (groups, channels x 9, channels x 9).
    """
    windows = F.pad(x.double(), (1, 1, 1, 1)).unfold(2, 3, stride).unfold(3, 3, stride)
    n, channels, height, width, _, _ = windows.shape
    windows = windows.reshape(n, groups, channels // groups, height, width, 3, 3)
    patches = windows.permute(1, 2, 5, 6, 0, 3, 4).reshape(groups, channels // groups * 9, -1)
    return patches.mean(2, keepdim=True), patches @ patches.mT / patches.shape[2]
