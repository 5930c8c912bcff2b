"""`NormaliseAndPool` of `block_functions` in one kernel, and each of its derivatives in another."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.models.form import Form, channels_last
from fewstep.models.kernels import call, images_like, operations, take_by_channel

own = torch.ops.fewstep


def fits(form: Form, y: Tensor, *of_channels: Tensor | None) -> bool:
    """Whether the kernels take these images, and gamma, beta, mean and var."""
    return (
        form.pool
        and min(y.shape[2:]) >= 2
        and y.is_contiguous(memory_format=torch.channels_last)
        and take_by_channel(y, *of_channels)
    )


def forward(
    y: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor | None, var: Tensor | None, form: Form
) -> tuple[Tensor, ...]:
    """Subtract the mean from y, and return z, mean, var, r, p and the maxima's places."""
    examples = form.counted(len(y))
    return own.normalise(  # type: ignore[no-any-return]
        y, gamma, beta.contiguous(), mean, var, examples, form.slope, form.eps
    )


def backward(gz: Tensor, *saved: Tensor, form: Form) -> tuple[Tensor, ...]:
    """Return gy, ggamma and gbeta; `saved` are d, gamma, z, r, p and the places."""
    examples = form.counted(len(gz))
    return own.normalise_backward(channels_last(gz), *saved, examples, form.slope)  # type: ignore[no-any-return]


def second(
    hy: Tensor, hgamma: Tensor, hbeta: Tensor, *saved: Tensor, form: Form
) -> tuple[Tensor, ...]:
    """Return the gradients by gz, y and gamma of hy . gy + hgamma . ggamma + hbeta . gbeta."""
    *before, gz, ggamma, gbeta = saved
    h = channels_last(hy), hgamma.contiguous(), hbeta.contiguous()
    g = channels_last(gz), ggamma, gbeta
    examples = form.counted(len(gz))
    return own.normalise_second(*h, *before, *g, examples, form.slope)  # type: ignore[no-any-return]


def _forward(
    y: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor | None, var: Tensor | None,
    examples: int, slope: float, eps: float,
) -> list[Tensor]:  # fmt: skip
    mean, var = (torch.empty_like(gamma) if t is None else t.clone() for t in (mean, var))
    r, z, p = torch.empty_like(gamma), _pooled(y), _pooled(y)
    where = torch.empty_like(p, dtype=torch.uint8)
    call(
        "normalise", y.dtype, y, gamma, beta, z, mean, var, r, p, where, _shape(y, examples),
        slope, eps,
    )  # fmt: skip
    return [z, mean, var, r, p, where]


def _backward(
    gz: Tensor, d: Tensor, gamma: Tensor, z: Tensor, r: Tensor, p: Tensor, where: Tensor,
    examples: int, slope: float,
) -> list[Tensor]:  # fmt: skip
    gy, ggamma, gbeta = torch.empty_like(d), torch.empty_like(gamma), torch.empty_like(gamma)
    call(
        "normalise_backward", d.dtype, gy, ggamma, gbeta, gz, d, gamma, z, r, p, where,
        _shape(d, examples), slope,
    )  # fmt: skip
    return [gy, ggamma, gbeta]


def _second(
    hy: Tensor, hgamma: Tensor, hbeta: Tensor, d: Tensor, gamma: Tensor, z: Tensor, r: Tensor,
    p: Tensor, where: Tensor, gz: Tensor, ggamma: Tensor, gbeta: Tensor, examples: int,
    slope: float,
) -> list[Tensor]:  # fmt: skip
    to_gz, to_y, to_gamma = torch.empty_like(z), torch.empty_like(d), torch.empty_like(gamma)
    call(
        "normalise_second", d.dtype, to_gz, to_y, to_gamma, hy, hgamma, hbeta, d, gamma, z, r, p,
        where, gz, ggamma, gbeta, _shape(d, examples), slope,
    )  # fmt: skip
    return [to_gz, to_y, to_gamma]


def _pooled(y: Tensor) -> Tensor:
    return images_like(y, len(y), y.shape[1], y.shape[2] // 2, y.shape[3] // 2)


def _shape(y: Tensor, examples: int) -> tuple[int, ...]:
    return len(y), *y.shape[2:], y.shape[1], examples


operations.define(
    "normalise(Tensor(a!) y, Tensor gamma, Tensor beta, Tensor? mean, Tensor? var, int examples,"
    " float slope, float eps) -> Tensor[]"
)
operations.define(
    "normalise_backward(Tensor gz, Tensor d, Tensor gamma, Tensor z, Tensor r, Tensor p,"
    " Tensor where, int examples, float slope) -> Tensor[]"
)
operations.define(
    "normalise_second(Tensor hy, Tensor hgamma, Tensor hbeta, Tensor d, Tensor gamma, Tensor z,"
    " Tensor r, Tensor p, Tensor where, Tensor gz, Tensor ggamma, Tensor gbeta, int examples,"
    " float slope) -> Tensor[]"
)
operations.impl("normalise", _forward, "CPU")
operations.impl("normalise_backward", _backward, "CPU")
operations.impl("normalise_second", _second, "CPU")
