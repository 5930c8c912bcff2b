"""Batch norm, activation and 2x2 pool in one kernel, and each of its two derivatives in another.

The equations are those of `NormaliseAndPool` in `block_functions`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.models.kernels import LANES, call, channels_last, operations, take


def fits(y: Tensor, gamma: Tensor) -> bool:
    """Whether the kernels take these images and scales."""
    return y.shape[1] % LANES == 0 and min(y.shape[2:]) >= 2 and take(y, gamma)


def forward(y: Tensor, gamma: Tensor, beta: Tensor, slope: float, eps: float) -> list[Tensor]:
    """Subtract its mean from y, and return z, mean, var, r, p and the maxima's places.

    Args:
        y: (examples, channels, height, width), channels-last; becomes d.
        gamma: (1, channels, 1, 1), not negative.
        beta: Of the same shape.
        slope: Slope of the activation below 0.
        eps: Added to the variance.
    """
    mean, var, r = (torch.empty_like(gamma) for _ in range(3))
    z, p = _pooled(y), _pooled(y)
    where = torch.empty_like(p, dtype=torch.uint8)
    call("normalise", y.dtype, y, gamma, beta, z, mean, var, r, p, where, _shape(y), slope, eps)
    return [z, mean, var, r, p, where]


def backward(
    gz: Tensor, d: Tensor, gamma: Tensor, z: Tensor, r: Tensor, p: Tensor, where: Tensor,
    slope: float,
) -> list[Tensor]:  # fmt: skip
    """Return gy, ga, ggamma and gbeta."""
    gy, ga = torch.empty_like(d), torch.empty_like(z)
    ggamma, gbeta = torch.empty_like(gamma), torch.empty_like(gamma)
    call(
        "normalise_backward", d.dtype, gy, ga, ggamma, gbeta, gz, d, gamma, z, r, p, where,
        _shape(d), slope,
    )  # fmt: skip
    return [gy, ga, ggamma, gbeta]


def second(
    hy: Tensor, hgamma: Tensor, hbeta: Tensor, d: Tensor, gamma: Tensor, z: Tensor, r: Tensor,
    p: Tensor, where: Tensor, ga: Tensor, ggamma: Tensor, gbeta: Tensor, slope: float,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients by gz, y and gamma."""
    to_gz, to_y, to_gamma = torch.empty_like(z), torch.empty_like(d), torch.empty_like(gamma)
    call(
        "normalise_second", d.dtype, to_gz, to_y, to_gamma, hy, hgamma, hbeta, d, gamma, z, r, p,
        where, ga, ggamma, gbeta, _shape(d), slope,
    )  # fmt: skip
    return [to_gz, to_y, to_gamma]


def _pooled(y: Tensor) -> Tensor:
    return channels_last(y, len(y), y.shape[1], y.shape[2] // 2, y.shape[3] // 2)


def _shape(y: Tensor) -> tuple[int, ...]:
    return len(y), *y.shape[2:], y.shape[1]


operations.define(
    "normalise(Tensor(a!) y, Tensor gamma, Tensor beta, float slope, float eps) -> Tensor[]"
)
operations.define(
    "normalise_backward(Tensor gz, Tensor d, Tensor gamma, Tensor z, Tensor r, Tensor p,"
    " Tensor where, float slope) -> Tensor[]"
)
operations.define(
    "normalise_second(Tensor hy, Tensor hgamma, Tensor hbeta, Tensor d, Tensor gamma, Tensor z,"
    " Tensor r, Tensor p, Tensor where, Tensor ga, Tensor ggamma, Tensor gbeta, float slope)"
    " -> Tensor[]"
)
operations.impl("normalise", forward, "CPU")
operations.impl("normalise_backward", backward, "CPU")
operations.impl("normalise_second", second, "CPU")
