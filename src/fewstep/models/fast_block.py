"""A convolutional block under batch norm, with both its derivatives written out.

    y = conv(x, s w)              s the sign of gamma, so that what follows rises in y
    p = max-pool(y)
    z = act(|gamma| r (p - mu) + beta)        mu, r = 1 / std of y, by channel

equals pool(act(batch norm(conv(x, w)))): the activation rises, batch norm is affine in each
channel, and a maximum commutes with both. Only the statistics read y at full resolution.

A batch of tasks is one call: each task's channels are a group of a grouped convolution, stored
channels-last, (examples, height, width, tasks x channels). PyTorch's own rules would change the
layout between one derivative and the next, which costs more than the arithmetic around the
convolutions. Below, g is a gradient of the meta-loss or of a support loss, and h the gradient of
something further with respect to such a g.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import Function
from torch.nn import functional as F

aten = torch.ops.aten
Grad = Tensor | None
_SPACE = (0, 2, 3)


class Form(NamedTuple):
    """What a block computes, besides its tensors."""

    stride: int
    pool: bool
    slope: float
    eps: float


class Block(NamedTuple):
    """A block's output, and the statistics of what it normalised, by channel."""

    z: Tensor
    mean: Tensor
    var: Tensor


def available() -> bool:
    """Whether `block` works here: called plainly, or under one `torch.vmap` and nothing else."""
    top = _functorch.peek_interpreter_stack()
    return top is None or (top.level() == 1 and top.key() == _functorch.TransformType.Vmap)


def block(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, form: Form) -> Block:
    """Return pool(act(batch norm(conv(x)))) by the statistics of the batch, and these.

    Args:
        x: (examples, channels, height, width).
        weight: 3x3 filters, (filters, channels, 3, 3).
        gamma: Scale, (filters,).
        beta: Shift, (filters,).
        form: Stride, pooling 2x2 or none, slope below 0 and the eps of the variance.

    Raises:
        RuntimeError: a third derivative is asked for (when it is computed).
    """
    if any(_functorch.is_batchedtensor(t) for t in (x, weight, gamma, beta)):
        return Block(*_Tasks.apply(x, weight, gamma, beta, form))
    return _block(x, weight, gamma, beta, form, tasks=1)


def _block(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, form: Form, tasks: int) -> Block:
    sign = torch.where(gamma.detach() < 0, -1.0, 1.0).to(gamma.dtype)
    y = _Convolve.apply(_channels_last(x), weight, sign, form.stride, tasks)
    z, mean, var = _NormalisePool.apply(y, gamma * sign, beta, form)
    return Block(z, mean * sign, var)


class _Tasks(Function):
    """The entrance from `torch.vmap`: moves tasks into the channels."""

    @staticmethod
    def forward(*_: Any) -> None:
        raise AssertionError("only torch.vmap calls this")

    @staticmethod
    def setup_context(*_: Any) -> None:
        raise AssertionError("only torch.vmap calls this")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, gamma: Tensor,
        beta: Tensor, form: Form,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:  # fmt: skip
        tasks: int = info.batch_size
        into = (1, 0, 0, 0)
        x, weight, gamma, beta = (
            t.unsqueeze(at).expand(*t.shape[:at], tasks, *t.shape[at:]).flatten(at, at + 1)
            if now is None
            else t.movedim(now, at).flatten(at, at + 1)
            for t, now, at in zip((x, weight, gamma, beta), in_dims, into, strict=False)
        )
        z, mean, var = _block(x, weight, gamma, beta, form, tasks)
        z = z.view(z.shape[0], tasks, -1, *z.shape[2:])
        return (z, mean.view(tasks, -1), var.view(tasks, -1)), (1, 0, 0)


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


class _Convolve(Function):
    """y = conv(x, s w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, sign: Tensor, stride: int, groups: int) -> Tensor:
        signed = _channels_last(w * sign.view(-1, 1, 1, 1))
        ctx.save_for_backward(x, w, sign, signed)
        ctx.args = stride, groups
        return F.conv2d(x, signed, None, stride, 1, 1, groups)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Grad, ...]:
        needs_x, needs_w, *_ = ctx.needs_input_grad
        gx, gw = _ConvolveBackward.apply(
            _channels_last(g), *ctx.saved_tensors, ctx.args, needs_x, needs_w
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
        gx, gw = _transposed(g, x, signed, args, needs_x, needs_w)
        return gx, gw if gw is None else gw.mul_(sign.view(-1, 1, 1, 1))

    @staticmethod
    @_last_derivative
    def backward(ctx: Any, hx: Grad, hw: Grad) -> tuple[Grad, ...]:
        g, x, sign, signed = ctx.saved_tensors
        _, needs_x, needs_w, *_ = ctx.needs_input_grad
        stride, groups = ctx.args
        terms, to_x, to_w = [], None, None
        if hx is not None:
            hx = _channels_last(hx)
            terms.append(F.conv2d(hx, signed, None, stride, 1, 1, groups))
            if needs_w:
                _, to_w = _transposed(g, hx, signed, ctx.args, False, True)
                to_w.mul_(sign.view(-1, 1, 1, 1))
        if hw is not None:
            hw = _channels_last(hw * sign.view(-1, 1, 1, 1))
            terms.append(F.conv2d(x, hw, None, stride, 1, 1, groups))
            if needs_x:
                to_x, _ = _transposed(g, x, hw, ctx.args, True, False)
        to_g = terms[0].add_(terms[1]) if len(terms) == 2 else terms[0] if terms else None
        return to_g, to_x, to_w, None, None, None, None, None


class _NormalisePool(Function):
    """z = act(gamma r p + beta), p the pooled y - mu, and mu, r of y itself; gamma >= 0."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gamma: Tensor, beta: Tensor, form: Form
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean = y.mean(_SPACE)
        d = y.sub_(_wide(mean))  # in place: nothing else holds y
        var = (d * d).mean(_SPACE)
        p, where = F.max_pool2d(d, 2, return_indices=True) if form.pool else (d, None)
        r = torch.rsqrt(var + form.eps)
        z = F.leaky_relu_(torch.addcmul(_wide(beta), p, _wide(gamma * r)), form.slope)
        ctx.save_for_backward(d, gamma, z, r, p, where)
        ctx.form = form
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return z, mean, var

    @staticmethod
    def backward(ctx: Any, gz: Grad, *_: Grad) -> tuple[Grad, ...]:
        if gz is None:
            return None, None, None, None
        return *_NormalisePoolBackward.apply(gz, *ctx.saved_tensors, ctx.form), None


class _NormalisePoolBackward(Function):
    """Batch norm's derivative, its first term at the maxima only.

    With d = y - mu, n elements a channel, a = gamma r, and ga = act'(z) gz:
        gbeta = sum ga
        ggamma = sum ga r p
        gy = unpool(a ga) - a (gbeta + r d ggamma) / n
    """

    @staticmethod
    def forward(
        ctx: Any, gz: Tensor, d: Tensor, gamma: Tensor, z: Tensor, r: Tensor, p: Tensor,
        where: Tensor | None, form: Form,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ga = aten.leaky_relu_backward(gz, z, form.slope, True)
        a = gamma * r
        gbeta = ga.sum(_SPACE)
        ggamma = (ga * p).sum(_SPACE) * r
        n = _count(d)
        gy = _unpool(ga * _wide(a), where, d, -a * r * ggamma / n, -a * gbeta / n)
        ctx.save_for_backward(d, gamma, z, r, p, where, ga, ggamma, gbeta)
        ctx.form = form
        return gy, ggamma, gbeta

    @staticmethod
    @_last_derivative
    def backward(ctx: Any, hy: Tensor, hgamma: Tensor, hbeta: Tensor) -> tuple[Grad, ...]:
        d, gamma, z, r, p, where, ga, ggamma, gbeta = ctx.saved_tensors
        n, a = _count(d), gamma * r
        # hy enters gy's three terms by its values at the maxima and by two sums.
        u = _pick(hy, where)
        h0 = hy.sum(_SPACE)
        h1 = (hy * d).sum(_SPACE) * r
        to_a = (ga * u).sum(_SPACE) - (gbeta * h0 + ggamma * h1) / n
        to_ggamma = hgamma - a * h1 / n
        to_gbeta = hbeta - a * h0 / n
        to_ga = torch.addcmul(_wide(to_gbeta), p, _wide(to_ggamma * r))
        to_ga.addcmul_(u, _wide(a))
        to_gz = aten.leaky_relu_backward(to_ga, z, ctx.form.slope, True)
        # y enters by r p (ggamma) and by r d (h1), and r and mu bring in every element.
        c = a * ggamma / n
        slope = -(r * r / n) * (to_a * a + to_ggamma * ggamma - c * h1)
        shift = -(r / n) * (to_ggamma * gbeta - c * h0)
        to_y = _unpool(ga * _wide(to_ggamma * r), where, d, slope, shift)
        to_y.addcmul_(hy, _wide(-r * c))
        return to_gz, to_y, to_a * r, None, None, None, None, None


def _unpool(
    pooled: Tensor, where: Tensor | None, d: Tensor, slope: Tensor, shift: Tensor
) -> Tensor:
    """Return unpool(pooled) + slope d + shift; `pooled` may be overwritten."""
    if where is not None:
        pooled = aten.max_pool2d_with_indices_backward(
            _channels_last(pooled), d, (2, 2), (2, 2), (0, 0), (1, 1), False, where
        )
    return pooled.addcmul_(d, _wide(slope)).add_(_wide(shift))


def _pick(t: Tensor, where: Tensor | None) -> Tensor:
    """Return the elements of `t` that the pool chose."""
    if where is None:
        return t
    last = where.permute(0, 2, 3, 1)
    picked = t.permute(0, 2, 3, 1).flatten(1, 2).gather(1, last.flatten(1, 2))
    return picked.view(last.shape).permute(0, 3, 1, 2)


def _transposed(
    g: Tensor, x: Tensor, w: Tensor, args: tuple[int, int], needs_x: bool, needs_w: bool
) -> tuple[Any, Any]:
    """Return conv^T(g, w) in the shape of x, and corr(x, g) in the shape of w, where needed."""
    stride, groups = args
    gx, gw, _ = aten.convolution_backward(
        g, x, w, None, (stride, stride), (1, 1), (1, 1), False, (0, 0), groups,
        (needs_x, needs_w, False),
    )  # fmt: skip
    return gx, gw


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _wide(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1)


def _count(t: Tensor) -> int:
    return t.numel() // t.shape[1]
