"""The parts of a fast block, each with its first and its second derivative.

Images are (examples, tasks x channels, height, width), channels-last; what belongs to a channel is
(1, tasks x channels, 1, 1). g is a gradient of the meta-loss or of a support loss, and h the
gradient of something further with respect to such a g.
"""

# ruff: noqa: D102 (the classes say what their two methods compute)

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fewstep.models.convolution import Space, convolve, gradients
from fewstep.models.form import Form, channels_last
from fewstep.models.kernels import affine as compiled_affine
from fewstep.models.kernels import normalise as compiled_normalise
from fewstep.models.kernels import pooled as compiled_pooled
from fewstep.models.plain import affine, normalise, pooled

Grad = Tensor | None


class _End(Function):
    """Outputs that depend on inputs in a way that nobody has written a derivative for."""

    @staticmethod
    def forward(ctx: Any, outputs: tuple[Grad, ...], *_: Grad) -> tuple[Grad, ...]:
        return tuple(None if t is None else t.view_as(t) for t in outputs)

    @staticmethod
    def backward(ctx: Any, *_: Grad) -> None:
        raise RuntimeError(
            "batch norm has two derivatives here, and a third was asked for; pass "
            "vectorize=False, and in place of a ConvBlock its conv, norm, activation and pool"
        )


def last_derivative(
    backward: Callable[..., tuple[Grad, ...]],
) -> Callable[..., tuple[Grad, ...]]:
    """Mark a `backward` that has no derivative itself.

    PyTorch's `once_differentiable` would let `torch.autograd.grad` pass by in silence: the error
    that it puts in the graph leads to no input, so it is never reached.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *h: Grad) -> tuple[Grad, ...]:
        with torch.no_grad():
            outputs = backward(ctx, *h)
        if torch.is_grad_enabled():
            outputs = _End.apply(outputs, *h, *ctx.saved_tensors)
        return outputs

    return wrapper


class Convolve(Function):
    """y = conv(x, s w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, sign: Tensor, stride: int, groups: int) -> Tensor:
        signed = torch.empty_like(w, memory_format=torch.channels_last)
        torch.mul(w, sign.view(-1, 1, 1, 1), out=signed)
        ctx.save_for_backward(x, w, sign, signed)
        ctx.args = Space((stride, stride)), groups
        return convolve((x, signed), *ctx.args)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Grad, ...]:
        needs_x, needs_w, *_ = ctx.needs_input_grad
        gx, gw = _ConvolveBackward.apply(
            channels_last(g), *ctx.saved_tensors, ctx.args, needs_x, needs_w
        )
        return gx, gw, None, None, None


class _ConvolveBackward(Function):
    """gx = conv^T(g, s w),  gw = s corr(x, g)."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, sign: Tensor, signed: Tensor,
        args: tuple[Space, int], needs_x: bool, needs_w: bool,
    ) -> tuple[Grad, Grad]:  # fmt: skip
        ctx.save_for_backward(g, x, sign, signed)
        ctx.args = args
        ctx.set_materialize_grads(False)
        gx, gw = gradients(g, x, signed, *args, by_x=needs_x, by_w=needs_w)
        return gx, gw if gw is None else gw.mul_(sign.view(-1, 1, 1, 1))

    @staticmethod
    @last_derivative
    def backward(ctx: Any, hx: Grad, hw: Grad) -> tuple[Grad, ...]:
        g, x, sign, signed = ctx.saved_tensors
        _, needs_x, needs_w, *_ = ctx.needs_input_grad
        factors: list[Tensor] = []
        to_x, to_w = None, None
        if hx is not None:
            hx = channels_last(hx)
            factors += (hx, signed)
            if needs_w:
                _, to_w = gradients(g, hx, signed, *ctx.args, by_x=False, by_w=True)
                to_w.mul_(sign.view(-1, 1, 1, 1))
        if hw is not None:
            hw = torch.mul(hw, sign.view(-1, 1, 1, 1), out=torch.empty_like(signed))
            factors += (x, hw)
            if needs_x:
                to_x, _ = gradients(g, x, hw, *ctx.args, by_x=True, by_w=False)
        to_g = convolve(factors, *ctx.args) if factors else None
        return to_g, to_x, to_w, None, None, None, None, None


class NormaliseAndPool(Function):
    """z = act(gamma r p + beta), p the pooled d = y - mu, and mu, r of y itself; gamma >= 0.

    With n elements a channel, a = gamma r, and ga = act'(z) gz:
        gbeta = sum ga
        ggamma = r sum ga p
        gy = unpool(a ga) - a (gbeta + r d ggamma) / n
    where the last term is of the examples that mu and r are of: none, where these are given.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gamma: Tensor, beta: Tensor, mean: Grad, var: Grad, form: Form
    ) -> tuple[Tensor, Tensor, Tensor]:
        if mean is not None:
            form = form._replace(examples=0)
        fits = compiled_normalise.fits(form, y, gamma, beta, mean, var)
        by: Any = compiled_normalise if fits else normalise
        # Nothing else holds y.
        z, mean, var, r, p, where = by.forward(y, gamma, beta, mean, var, form)
        ctx.save_for_backward(y, gamma, z, r, p, where)
        ctx.args = by, form
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return z, mean, var

    @staticmethod
    def backward(ctx: Any, gz: Grad, *_: Grad) -> tuple[Grad, ...]:
        if gz is None:
            return (None,) * 6
        return *_NormaliseAndPoolBackward.apply(*ctx.args, gz, *ctx.saved_tensors), *[None] * 3


class _NormaliseAndPoolBackward(Function):
    @staticmethod
    def forward(ctx: Any, by: Any, form: Form, gz: Tensor, *saved: Grad) -> tuple[Tensor, ...]:
        gy, ggamma, gbeta = by.backward(gz, *saved, form=form)
        ctx.save_for_backward(*saved, gz, ggamma, gbeta)
        ctx.args = by, form
        return gy, ggamma, gbeta

    @staticmethod
    @last_derivative
    def backward(ctx: Any, *h: Tensor) -> tuple[Grad, ...]:
        by, form = ctx.args
        to_gz, to_y, to_gamma = by.second(*h, *ctx.saved_tensors, form=form)
        return None, None, to_gz, to_y, to_gamma, None, None, None, None


class ConvolveAndPool(Function):
    """p = max-pool(conv(x, w) + b), linear in w and b; x has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, form: Form, groups: int) -> Tensor:
        by: Any = compiled_pooled if compiled_pooled.fits(x, w, b, form, groups) else pooled
        p: Tensor
        p, where = by.convolve(x, w, b, form, groups)
        ctx.save_for_backward(x, where)
        ctx.args = by, form, groups
        return p

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Grad, ...]:
        gw, gb = _ConvolveAndPoolBackward.apply(g, *ctx.saved_tensors, *ctx.args)
        return None, gw, gb, None, None


class _ConvolveAndPoolBackward(Function):
    """gw = corr(x, unpool(g)),  gb = sum g."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, where: Grad, by: Any, form: Form, groups: int
    ) -> Any:
        ctx.save_for_backward(x, where)
        ctx.args = by, form, groups
        return by.correlate(x, g, where, form, groups)

    @staticmethod
    @last_derivative
    def backward(ctx: Any, hw: Tensor, hb: Tensor) -> tuple[Grad, ...]:
        x, where = ctx.saved_tensors
        by, form, groups = ctx.args
        return by.convolve_at(x, hw, hb, where, form, groups), *[None] * 5


class Affine(Function):
    """z = act(a d + b), a and b by channel."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, a: Tensor, b: Tensor, slope: float) -> Tensor:
        by: Any = compiled_affine if compiled_affine.fits(d, a, b) else affine
        z: Tensor = by.forward(d, a, b, slope)
        ctx.save_for_backward(d, a, z)
        ctx.args = by, slope
        return z

    @staticmethod
    def backward(ctx: Any, gz: Tensor) -> tuple[Grad, ...]:
        return *_AffineBackward.apply(*ctx.args, gz, *ctx.saved_tensors), None


class _AffineBackward(Function):
    """With g = act'(z) gz:  gd = a g,  ga = sum g d,  gb = sum g."""

    @staticmethod
    def forward(ctx: Any, by: Any, slope: float, gz: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        gd, ga, gb = by.backward(gz, *saved, slope=slope)
        ctx.save_for_backward(*saved, gz)
        ctx.args = by, slope
        return gd, ga, gb

    @staticmethod
    @last_derivative
    def backward(ctx: Any, *h: Tensor) -> tuple[Grad, ...]:
        by, slope = ctx.args
        to_gz, to_d, to_a = by.second(*h, *ctx.saved_tensors, slope=slope)
        return None, None, to_gz, to_d, to_a, None
