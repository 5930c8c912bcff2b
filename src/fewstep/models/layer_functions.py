"""Convolution, batch norm and max-pool, each with its first and its second derivative.

Images are (examples, tasks x channels, height, width), channels-last; what belongs to a channel is
(1, tasks x channels, 1, 1). g is a gradient of a loss, h the gradient of something further with
respect to such a g.
"""

# ruff: noqa: D102 (the classes say what their two methods compute)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from fewstep.models.block_functions import Grad, last_derivative
from fewstep.models.convolution import Space, convolve, gradients
from fewstep.models.form import channels_last
from fewstep.models.kernels import batch_norm as compiled_batch_norm
from fewstep.models.plain import batch_norm
from fewstep.models.plain.pool import pick

Pair = tuple[int, int]


class Convolve(Function):
    """y = conv(x, w).

    Convolve, ByInput and ByFilters are linear in each factor, and each other's derivatives.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, space: Space, groups: int) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.args = space, groups
        return channels_last(convolve((channels_last(x), w), space, groups))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Grad, ...]:
        x, w = ctx.saved_tensors
        by_x, by_w, *_ = ctx.needs_input_grad
        gx = ByInput.apply(g, w, x, *ctx.args) if by_x else None
        gw = ByFilters.apply(x, g, w, *ctx.args) if by_w else None
        return gx, gw, None, None


class ByInput(Function):
    """gx = conv^T(g, w), of the shape of x."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, x: Tensor, space: Space, groups: int) -> Tensor:
        ctx.save_for_backward(g, w, x)
        ctx.args = space, groups
        gx, _ = gradients(channels_last(g), x, w, space, groups, by_x=True, by_w=False)
        return channels_last(gx)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Grad, ...]:
        g, w, _ = ctx.saved_tensors
        by_g, by_w, *_ = ctx.needs_input_grad
        to_g = Convolve.apply(h, w, *ctx.args) if by_g else None
        to_w = ByFilters.apply(h, g, w, *ctx.args) if by_w else None
        return to_g, to_w, None, None, None


class ByFilters(Function):
    """gw = corr(x, g), of the shape of w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, w: Tensor, space: Space, groups: int) -> Tensor:
        ctx.save_for_backward(x, g)
        ctx.args = space, groups
        factors = channels_last(g), channels_last(x)
        _, gw = gradients(*factors, w, space, groups, by_x=False, by_w=True)
        return gw  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Grad, ...]:
        x, g = ctx.saved_tensors
        by_x, by_g, *_ = ctx.needs_input_grad
        to_x = ByInput.apply(g, h, x, *ctx.args) if by_x else None
        to_g = Convolve.apply(x, h, *ctx.args) if by_g else None
        return to_x, to_g, None, None, None


class MaxPool(Function):
    """p = max-pool(y); then unpool and pick, linear, are each other's derivatives."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
        p, where = F.max_pool2d(y, kernel, stride, padding, return_indices=True)
        ctx.save_for_backward(where)
        ctx.args = y.shape, kernel, stride, padding
        return p

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Grad, ...]:
        return Unpool.apply(g, *ctx.saved_tensors, *ctx.args), None, None, None


class Unpool(Function):
    """gy = g at the maxima, 0 elsewhere, and their sum where windows share one."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, where: Tensor, shape: torch.Size, *window: Pair) -> Tensor:
        ctx.save_for_backward(where)
        ctx.args = shape, *window
        like = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=torch.channels_last)
        return torch.ops.aten.max_pool2d_with_indices_backward(  # type: ignore[no-any-return]
            channels_last(g), like, *window, (1, 1), False, where
        )

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Grad, ...]:
        return Pick.apply(h, *ctx.saved_tensors, *ctx.args), *[None] * 5


class Pick(Function):
    """What lies where the maxima were."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, where: Tensor, shape: torch.Size, *window: Pair) -> Tensor:
        ctx.save_for_backward(where)
        ctx.args = shape, *window
        return pick(h, where)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Grad, ...]:
        return Unpool.apply(g, *ctx.saved_tensors, *ctx.args), *[None] * 5


class BatchNorm(Function):
    """z = gamma r d + beta, d = y - mu, r = 1 / sqrt(var + eps), mu and var of y or given.

    With n elements a channel and a = gamma r:
        gbeta = sum g
        ggamma = r sum g d
        gy = a g - a (gbeta + r d ggamma) / n
    where the last term is of the examples that mu and var are of: none, where these are given.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gamma: Tensor, beta: Tensor, mean: Grad, var: Grad, examples: int,
        eps: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        fits = compiled_batch_norm.fits(y, gamma, beta, mean, var)
        by: Any = compiled_batch_norm if fits else batch_norm
        z, mean, var, r = by.forward(y, gamma, beta, mean, var, examples, eps)
        ctx.save_for_backward(y, gamma, mean, r)
        ctx.args = by, examples
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return z, mean, var

    @staticmethod
    def backward(ctx: Any, g: Grad, *_: Grad) -> tuple[Grad, ...]:
        if g is None:
            return (None,) * 7
        return *_BatchNormBackward.apply(*ctx.args, g, *ctx.saved_tensors), *[None] * 4


class _BatchNormBackward(Function):
    @staticmethod
    def forward(ctx: Any, by: Any, examples: int, g: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        gy, ggamma, gbeta = by.backward(g, *saved, examples=examples)
        ctx.save_for_backward(g, *saved, ggamma, gbeta)
        ctx.args = by, examples
        return gy, ggamma, gbeta

    @staticmethod
    @last_derivative
    def backward(ctx: Any, *h: Tensor) -> tuple[Grad, ...]:
        by, examples = ctx.args
        to_g, to_y, to_gamma = by.second(*h, *ctx.saved_tensors, examples=examples)
        return None, None, to_g, to_y, to_gamma, None, None
