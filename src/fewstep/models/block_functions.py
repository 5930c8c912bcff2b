"""The parts of a fast block, each with its first and its second derivative.

Images are (examples, tasks x channels, height, width), channels-last; what belongs to a channel is
(1, tasks x channels, 1, 1). g is a gradient of the meta-loss or of a support loss, and h the
gradient of something further with respect to such a g.
"""

# ruff: noqa: D102 (the classes say what their two methods compute)

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from fewstep.models.convolution import convolve, gradients
from fewstep.models.kernels import normalise, pooled

aten, own = torch.ops.aten, torch.ops.fewstep
Grad = Tensor | None
_SPACE = (0, 2, 3)


class Form(NamedTuple):
    """What a block computes, besides its tensors."""

    stride: int
    pool: bool
    slope: float
    eps: float


def channels_last(t: Tensor) -> Tensor:
    """Return `t` with its channels next to each other in memory."""
    return t.contiguous(memory_format=torch.channels_last)


class _End(Function):
    """Outputs that depend on inputs in a way that nobody has written a derivative for."""

    @staticmethod
    def forward(ctx: Any, outputs: tuple[Grad, ...], *_: Grad) -> tuple[Grad, ...]:
        return tuple(None if t is None else t.view_as(t) for t in outputs)

    @staticmethod
    def backward(ctx: Any, *_: Grad) -> None:
        raise RuntimeError(
            "ConvBlock has two derivatives under batch norm, and a third was asked for; "
            "call its conv, norm, activation and pool in turn instead"
        )


def _last_derivative(
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
        ctx.args = stride, groups
        return convolve((x, signed), stride, groups)

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
        args: tuple[int, int], needs_x: bool, needs_w: bool,
    ) -> tuple[Grad, Grad]:  # fmt: skip
        ctx.save_for_backward(g, x, sign, signed)
        ctx.args = args
        ctx.set_materialize_grads(False)
        gx, gw = gradients(g, x, signed, *args, by_x=needs_x, by_w=needs_w)
        return gx, gw if gw is None else gw.mul_(sign.view(-1, 1, 1, 1))

    @staticmethod
    @_last_derivative
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
    """z = act(gamma r p + beta), p the pooled y - mu, and mu, r of y itself; gamma >= 0."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gamma: Tensor, beta: Tensor, form: Form
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.by_kernel = form.pool and normalise.fits(y, gamma)
        if ctx.by_kernel:
            d, gamma = y, gamma.contiguous()
            z, mean, var, r, p, where = own.normalise(
                d, gamma, beta.contiguous(), form.slope, form.eps
            )
        else:
            mean = y.mean(_SPACE, keepdim=True)
            d = y.sub_(mean)  # in place: nothing else holds y
            var = (d * d).mean(_SPACE, keepdim=True)
            p, where = _pool(d, form)
            r = torch.rsqrt(var + form.eps)
            z = F.leaky_relu_(torch.addcmul(beta, p, gamma * r), form.slope)
        ctx.save_for_backward(d, gamma, z, r, p, where)
        ctx.form = form
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return z, mean, var

    @staticmethod
    def backward(ctx: Any, gz: Grad, *_: Grad) -> tuple[Grad, ...]:
        if gz is None:
            return None, None, None, None
        saved = ctx.saved_tensors
        return *_NormaliseAndPoolBackward.apply(gz, *saved, ctx.form, ctx.by_kernel), None


class _NormaliseAndPoolBackward(Function):
    """Batch norm's derivative, its first term at the maxima only.

    With d = y - mu, n elements a channel, a = gamma r, and ga = act'(z) gz:
        gbeta = sum ga
        ggamma = r sum ga p
        gy = unpool(a ga) - a (gbeta + r d ggamma) / n
    """

    @staticmethod
    def forward(
        ctx: Any, gz: Tensor, d: Tensor, gamma: Tensor, z: Tensor, r: Tensor, p: Tensor,
        where: Tensor | None, form: Form, by_kernel: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.form, ctx.by_kernel = form, by_kernel
        if by_kernel:
            gy, ga, ggamma, gbeta = own.normalise_backward(
                channels_last(gz), d, gamma, z, r, p, where, form.slope
            )
            ctx.save_for_backward(d, gamma, z, r, p, where, ga, ggamma, gbeta)
            return gy, ggamma, gbeta
        ga = aten.leaky_relu_backward(gz, z, form.slope, True)
        a = gamma * r
        gbeta = _sum(ga)
        ggamma = _sum(ga * p).mul_(r)
        a_n = a / -_count(d)
        gy = _unpool(ga * a, where, d.shape).addcmul_(d, a_n * r * ggamma).add_(a_n * gbeta)
        ctx.save_for_backward(d, gamma, z, r, p, where, ga, ggamma, gbeta)
        return gy, ggamma, gbeta

    @staticmethod
    @_last_derivative
    def backward(ctx: Any, hy: Tensor, hgamma: Tensor, hbeta: Tensor) -> tuple[Grad, ...]:
        if ctx.by_kernel:
            h = (channels_last(hy), hgamma.contiguous(), hbeta.contiguous())
            outputs = own.normalise_second(*h, *ctx.saved_tensors, ctx.form.slope)
            return *outputs[:2], outputs[2], None, None, None, None, None, None
        d, gamma, z, r, p, where, ga, ggamma, gbeta = ctx.saved_tensors
        a, r_n = gamma * r, r / _count(d)
        # hy enters gy's three terms by its values at the maxima and by two sums.
        u = _pick(hy, where)
        h0 = _sum(hy).div_(_count(d))
        h1 = _sum(hy * d).mul_(r_n)
        to_a = _sum(ga * u).sub_(gbeta * h0).sub_(ggamma * h1)
        to_ggamma = torch.addcmul(hgamma, a, h1, value=-1)
        to_gbeta = torch.addcmul(hbeta, a, h0, value=-1)
        to_p = to_ggamma * r
        to_ga = torch.addcmul(to_gbeta, p, to_p).addcmul_(u, a)
        to_gz = aten.leaky_relu_backward(to_ga, z, ctx.form.slope, True)
        # y enters by r p (ggamma) and by r d (h1), and r and mu bring in every element.
        c = a * ggamma
        slope = torch.addcmul(to_a * a, to_ggamma, ggamma).addcmul_(c, h1, value=-1).mul_(r * r_n)
        shift = torch.mul(to_ggamma, gbeta).addcmul_(c, h0, value=-1).mul_(r_n)
        to_y = _unpool(ga * to_p, where, d.shape)
        to_y.addcmul_(d, slope, value=-1).sub_(shift).addcmul_(hy, c * r_n, value=-1)
        return to_gz, to_y, to_a * r, None, None, None, None, None, None


class ConvolveAndPool(Function):
    """p = max-pool(conv(x, w) + b), linear in w and b; x has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, form: Form, groups: int) -> Any:
        if form.pool and pooled.fits(x, w, form.stride, groups):
            p, where = own.pooled_convolve(x, w.contiguous(), b, groups)
            y_shape = None
        else:
            y = F.conv2d(x, channels_last(w), b, form.stride, 1, 1, groups)
            p, where = _pool(y, form)
            y_shape = y.shape
        ctx.save_for_backward(x, where)
        ctx.args = w.shape, y_shape, form.stride, groups
        return p

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Grad, ...]:
        gw, gb = _ConvolveAndPoolBackward.apply(g, *ctx.saved_tensors, ctx.args)
        return None, gw, gb, None, None


class _ConvolveAndPoolBackward(Function):
    """gw = corr(x, unpool(g)),  gb = sum g."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, where: Tensor | None, args: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, where)
        ctx.args = args
        w_shape, y_shape, stride, groups = args
        if y_shape is None:
            return own.pooled_correlate(x, channels_last(g), where, groups)  # type: ignore[no-any-return]
        gy, w = _unpool(g, where, y_shape), x.new_empty(w_shape)
        _, gw = gradients(gy, x, w, stride, groups, by_x=False, by_w=True)
        return gw, _sum(g).flatten()

    @staticmethod
    @_last_derivative
    def backward(ctx: Any, hw: Tensor, hb: Tensor) -> tuple[Grad, ...]:
        x, where = ctx.saved_tensors
        _, y_shape, stride, groups = ctx.args
        if y_shape is None:
            to_g = own.pooled_convolve_at(x, hw.contiguous(), hb.contiguous(), where, groups)
            return to_g, None, None, None
        to_gy = F.conv2d(x, channels_last(hw), hb, stride, 1, 1, groups)
        return _pick(to_gy, where), None, None, None


class Affine(Function):
    """z = act(a d + b), a and b by channel."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, a: Tensor, b: Tensor, slope: float) -> Tensor:
        z = F.leaky_relu_(torch.addcmul(b, d, a), slope)
        ctx.save_for_backward(d, a, z)
        ctx.slope = slope
        return z

    @staticmethod
    def backward(ctx: Any, gz: Tensor) -> tuple[Grad, ...]:
        return *_AffineBackward.apply(gz, *ctx.saved_tensors, ctx.slope), None


class _AffineBackward(Function):
    """With g = act'(z) gz:  gd = a g,  ga = sum g d,  gb = sum g."""

    @staticmethod
    def forward(
        ctx: Any, gz: Tensor, d: Tensor, a: Tensor, z: Tensor, slope: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        g = aten.leaky_relu_backward(gz, z, slope, True)
        ctx.save_for_backward(d, a, z, g)
        ctx.slope = slope
        return g * a, _sum(g * d), _sum(g)

    @staticmethod
    @_last_derivative
    def backward(ctx: Any, hd: Tensor, ha: Tensor, hb: Tensor) -> tuple[Grad, ...]:
        d, a, z, g = ctx.saved_tensors
        to_g = torch.addcmul(hb, d, ha).addcmul_(hd, a)
        to_gz = aten.leaky_relu_backward(to_g, z, ctx.slope, True)
        return to_gz, g * ha, _sum(g * hd), None, None


def _pool(t: Tensor, form: Form) -> tuple[Tensor, Tensor | None]:
    """Return the maxima and where they are, or `t` itself."""
    return F.max_pool2d(t, 2, return_indices=True) if form.pool else (t, None)


def _unpool(pooled: Tensor, where: Tensor | None, shape: torch.Size) -> Tensor:
    """Return `pooled` at the maxima and 0 elsewhere; itself without a pool."""
    if where is None:
        return pooled
    like = torch.empty(
        shape, dtype=pooled.dtype, device=pooled.device, memory_format=torch.channels_last
    )
    return aten.max_pool2d_with_indices_backward(  # type: ignore[no-any-return]
        channels_last(pooled), like, (2, 2), (2, 2), (0, 0), (1, 1), False, where
    )


def _pick(t: Tensor, where: Tensor | None) -> Tensor:
    """Return the elements of `t` that the pool chose."""
    if where is None:
        return t
    last = where.permute(0, 2, 3, 1)
    picked = t.permute(0, 2, 3, 1).flatten(1, 2).gather(1, last.flatten(1, 2))
    return picked.view(last.shape).permute(0, 3, 1, 2)


def _sum(t: Tensor) -> Tensor:
    return t.sum(_SPACE, keepdim=True)


def _count(t: Tensor) -> int:
    return t.numel() // t.shape[1]
