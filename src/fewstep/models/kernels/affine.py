"""`Affine` of `block_functions` in one kernel, and each of its derivatives in another."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.models.form import channels_last
from fewstep.models.kernels import call, operations, take_by_channel

own = torch.ops.fewstep


def fits(d: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether the kernels take these images, scales and shifts."""
    return take_by_channel(d, a, b)


def forward(d: Tensor, a: Tensor, b: Tensor, slope: float) -> Tensor:
    """Return z."""
    return own.affine(channels_last(d), a.contiguous(), b.contiguous(), slope)  # type: ignore[no-any-return]


def backward(gz: Tensor, d: Tensor, a: Tensor, z: Tensor, slope: float) -> tuple[Tensor, ...]:
    """Return gd, ga and gb."""
    gz, d, a = channels_last(gz), channels_last(d), a.contiguous()
    return own.affine_backward(gz, d, a, z, slope)  # type: ignore[no-any-return]


def second(
    hd: Tensor, ha: Tensor, hb: Tensor, d: Tensor, a: Tensor, z: Tensor, gz: Tensor, slope: float
) -> tuple[Tensor, ...]:
    """Return the gradients by gz, d and a of hd . gd + ha . ga + hb . gb."""
    hd, d, gz = channels_last(hd), channels_last(d), channels_last(gz)
    ha, hb, a = ha.contiguous(), hb.contiguous(), a.contiguous()
    return own.affine_second(hd, ha, hb, d, a, z, gz, slope)  # type: ignore[no-any-return]


def _forward(d: Tensor, a: Tensor, b: Tensor, slope: float) -> Tensor:
    z = torch.empty_like(d)
    call("affine", d.dtype, z, d, a, b, _shape(d), slope)
    return z


def _backward(gz: Tensor, d: Tensor, a: Tensor, z: Tensor, slope: float) -> list[Tensor]:
    gd, ga, gb = torch.empty_like(d), torch.empty_like(a), torch.empty_like(a)
    call("affine_backward", d.dtype, gd, ga, gb, gz, d, a, z, _shape(d), slope)
    return [gd, ga, gb]


def _second(
    hd: Tensor, ha: Tensor, hb: Tensor, d: Tensor, a: Tensor, z: Tensor, gz: Tensor, slope: float
) -> list[Tensor]:
    to_gz, to_d, to_a = torch.empty_like(d), torch.empty_like(d), torch.empty_like(a)
    call("affine_second", d.dtype, to_gz, to_d, to_a, hd, ha, hb, d, a, z, gz, _shape(d), slope)
    return [to_gz, to_d, to_a]


def _shape(d: Tensor) -> tuple[int, ...]:
    return len(d) * d.shape[2], d.shape[3], d.shape[1]


operations.define("affine(Tensor d, Tensor a, Tensor b, float slope) -> Tensor")
operations.define(
    "affine_backward(Tensor gz, Tensor d, Tensor a, Tensor z, float slope) -> Tensor[]"
)
operations.define(
    "affine_second(Tensor hd, Tensor ha, Tensor hb, Tensor d, Tensor a, Tensor z, Tensor gz,"
    " float slope) -> Tensor[]"
)
operations.impl("affine", _forward, "CPU")
operations.impl("affine_backward", _backward, "CPU")
operations.impl("affine_second", _second, "CPU")
