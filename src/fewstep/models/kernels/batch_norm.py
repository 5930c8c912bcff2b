"""`BatchNorm` of `layer_functions` in one kernel, and each of its derivatives in another."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.models.form import channels_last
from fewstep.models.kernels import call, operations, take_by_channel

own = torch.ops.fewstep


def fits(y: Tensor, *of_channels: Tensor | None) -> bool:
    """Whether the kernels take these images, channels-last, and gamma, beta, mean and var."""
    return take_by_channel(y, *of_channels)


def forward(
    y: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor | None, var: Tensor | None,
    examples: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return z, mean, var and r."""
    return own.batch_norm(y, gamma.contiguous(), beta.contiguous(), mean, var, examples, eps)  # type: ignore[no-any-return]


def backward(
    g: Tensor, y: Tensor, gamma: Tensor, mean: Tensor, r: Tensor, *, examples: int
) -> tuple[Tensor, ...]:
    """Return gy, ggamma and gbeta."""
    saved = y, gamma.contiguous(), mean, r
    return own.batch_norm_backward(channels_last(g), *saved, examples)  # type: ignore[no-any-return]


def second(
    h: Tensor, hgamma: Tensor, hbeta: Tensor, g: Tensor, y: Tensor, gamma: Tensor, *saved: Tensor,
    examples: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients by g, y and gamma of h . gy + hgamma . ggamma + hbeta . gbeta."""
    h_of_channels = hgamma.contiguous(), hbeta.contiguous()
    of_g = channels_last(g), y, gamma.contiguous(), *saved
    return own.batch_norm_second(channels_last(h), *h_of_channels, *of_g, examples)  # type: ignore[no-any-return]


def _forward(
    y: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor | None, var: Tensor | None,
    examples: int, eps: float,
) -> list[Tensor]:  # fmt: skip
    mean, var = (torch.empty_like(gamma) if t is None else t.clone() for t in (mean, var))
    z, r = torch.empty_like(y), torch.empty_like(gamma)
    call("batch_norm", y.dtype, y, gamma, beta, z, mean, var, r, _shape(y, examples), eps)
    return [z, mean, var, r]


def _backward(
    g: Tensor, y: Tensor, gamma: Tensor, mean: Tensor, r: Tensor, examples: int
) -> list[Tensor]:
    gy, ggamma, gbeta = torch.empty_like(y), torch.empty_like(gamma), torch.empty_like(gamma)
    call(
        "batch_norm_backward", y.dtype, gy, ggamma, gbeta, g, y, gamma, mean, r,
        _shape(y, examples),
    )  # fmt: skip
    return [gy, ggamma, gbeta]


def _second(
    h: Tensor, hgamma: Tensor, hbeta: Tensor, g: Tensor, y: Tensor, gamma: Tensor, mean: Tensor,
    r: Tensor, ggamma: Tensor, gbeta: Tensor, examples: int,
) -> list[Tensor]:  # fmt: skip
    to_g, to_y, to_gamma = torch.empty_like(y), torch.empty_like(y), torch.empty_like(gamma)
    call(
        "batch_norm_second", y.dtype, to_g, to_y, to_gamma, h, hgamma, hbeta, g, y, gamma, mean, r,
        ggamma, gbeta, _shape(y, examples),
    )  # fmt: skip
    return [to_g, to_y, to_gamma]


def _shape(y: Tensor, examples: int) -> tuple[int, ...]:
    return len(y), y.shape[2] * y.shape[3], y.shape[1], examples


operations.define(
    "batch_norm(Tensor y, Tensor gamma, Tensor beta, Tensor? mean, Tensor? var, int examples,"
    " float eps) -> Tensor[]"
)
operations.define(
    "batch_norm_backward(Tensor g, Tensor y, Tensor gamma, Tensor mean, Tensor r, int examples)"
    " -> Tensor[]"
)
operations.define(
    "batch_norm_second(Tensor h, Tensor hgamma, Tensor hbeta, Tensor g, Tensor y, Tensor gamma,"
    " Tensor mean, Tensor r, Tensor ggamma, Tensor gbeta, int examples) -> Tensor[]"
)
operations.impl("batch_norm", _forward, "CPU")
operations.impl("batch_norm_backward", _backward, "CPU")
operations.impl("batch_norm_second", _second, "CPU")
