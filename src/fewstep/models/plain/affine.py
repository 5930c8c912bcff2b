"""`Affine` of `block_functions`, and its two derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.models.plain.sums import sum_of_channel

_leaky_relu_backward = torch.ops.aten.leaky_relu_backward


def forward(d: Tensor, a: Tensor, b: Tensor, slope: float) -> Tensor:
    """Return z."""
    return F.leaky_relu_(torch.addcmul(b, d, a), slope)


def backward(gz: Tensor, d: Tensor, a: Tensor, z: Tensor, slope: float) -> tuple[Tensor, ...]:
    """Return gd, ga and gb."""
    g = _leaky_relu_backward(gz, z, slope, True)
    return g * a, sum_of_channel(g * d), sum_of_channel(g)


def second(
    hd: Tensor, ha: Tensor, hb: Tensor, d: Tensor, a: Tensor, z: Tensor, gz: Tensor, slope: float
) -> tuple[Tensor, ...]:
    """Return the gradients by gz, d and a of hd . gd + ha . ga + hb . gb."""
    g = _leaky_relu_backward(gz, z, slope, True)
    to_g = torch.addcmul(hb, d, ha).addcmul_(hd, a)
    to_gz = _leaky_relu_backward(to_g, z, slope, True)
    return to_gz, g * ha, sum_of_channel(g * hd)
