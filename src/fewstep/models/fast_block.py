"""A convolutional block under batch norm, fast in its value and in both its derivatives.

    y = conv(x, s w)              s the sign of gamma, so that what follows rises in y
    p = max-pool(y)
    z = act(|gamma| r (p - mu) + beta)        mu, r = 1 / std of y, by channel

equals pool(act(batch norm(conv(x, w)))): the activation rises, batch norm is affine in each
channel, and a maximum commutes with both. Only the statistics read y at full resolution.

Where x is data, and so has no gradient, and has few channels, not even they do: mu = w . m and
var = w^T S w for the mean m and the covariance S of the 3x3 patches of x, the same in every inner
step.

A batch of tasks is one call: each task's channels are a group of a grouped convolution, stored
channels-last, (examples, height, width, tasks x channels). PyTorch's own rules would change the
layout between one derivative and the next, which costs more than the arithmetic around the
convolutions. The derivatives are written out in `block_functions`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import Function

from fewstep.core.once import once
from fewstep.models.block_functions import Affine, Convolve, ConvolveAndPool, NormaliseAndPool
from fewstep.models.form import Form, channels_last
from fewstep.models.kernels import moments as compiled_moments
from fewstep.models.plain import moments

_LARGEST_PATCH = 27  # 3 channels; a covariance of more costs as much as the convolution


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
    device = x.device.type
    rounds = torch.is_autocast_enabled(device) and weight.dtype == torch.float32
    product = torch.get_autocast_dtype(device) if rounds else weight.dtype
    with torch.autocast(device, enabled=False):
        if any(_functorch.is_batchedtensor(t) for t in (x, weight, gamma, beta)):
            return Block(*_Tasks.apply(x, weight, gamma, beta, form, product))
        if _are_data(x, weight):
            images = _data(x, None, 1, weight.dtype, form.stride)
        else:
            images = _images(x, None, 1, weight.dtype)
        return _block(images, weight, gamma, beta, form, product)


class _Images(NamedTuple):
    """Inputs, (examples, tasks x channels, height, width), channels-last.

    Where they are data, with the moments of each task's 3x3 patches: the mean,
    (tasks, channels x 9, 1), and the covariance, (tasks, channels x 9, channels x 9).
    """

    x: Tensor
    tasks: int
    moments: tuple[Tensor, Tensor] | None = None


def _images(x: Tensor, now: int | None, tasks: int, dtype: torch.dtype) -> _Images:
    return _Images(channels_last(_joined(x, now, 1, tasks).to(dtype)), tasks)


def _data(x: Tensor, now: int | None, tasks: int, dtype: torch.dtype, stride: int) -> _Images:
    """Return images with their moments in float64.

    var = w^T S w cancels, the more so with S as the mean square less the squared mean.
    """
    x, *_ = _images(x, now, tasks, dtype)
    by: Any = compiled_moments if compiled_moments.fits(x, stride, tasks) else moments
    m, second = by.of_patches(x, stride, tasks)
    return _Images(x, tasks, (m, second - m @ m.mT))


def _are_data(x: Tensor, weight: Tensor) -> bool:
    return not x.requires_grad and weight[0].numel() <= _LARGEST_PATCH


def _block(
    images: _Images, weight: Tensor, gamma: Tensor, beta: Tensor, form: Form, product: torch.dtype
) -> Block:
    if images.moments is None:
        normalised = partial(_by_outputs, product)
    else:
        normalised = partial(_by_patches, *images.moments)
    sign = torch.where(gamma.detach() < 0, -1.0, 1.0).to(gamma.dtype)
    wide = (1, -1, 1, 1)
    z, mean, var = normalised(
        images, weight, sign, (gamma * sign).view(wide), beta.view(wide), form
    )
    return Block(z, mean.flatten() * sign, var.flatten())


def _by_outputs(
    product: torch.dtype, images: _Images, weight: Tensor, sign: Tensor, gamma: Tensor,
    beta: Tensor, form: Form,
) -> Block:  # fmt: skip
    """Return the block with statistics of the convolution's output, its factors rounded."""
    factors = (t.to(product) for t in (images.x, weight, sign))
    y = Convolve.apply(*factors, form.stride, images.tasks).to(weight.dtype)
    return Block(*NormaliseAndPool.apply(channels_last(y), gamma.contiguous(), beta, form))


def _by_patches(
    m: Tensor, covariance: Tensor, images: _Images, weight: Tensor, sign: Tensor, gamma: Tensor,
    beta: Tensor, form: Form,
) -> Block:  # fmt: skip
    """Return the block with statistics of the convolution's input; nothing is rounded."""
    x, tasks, _ = images
    signed = weight * sign.view(-1, 1, 1, 1)
    w = signed.double().view(tasks, -1, 9 * weight.shape[1])
    mean = (w @ m).to(x.dtype).view(1, -1, 1, 1)
    var = ((w @ covariance) * w).sum(2).to(x.dtype).view(1, -1, 1, 1)
    d = ConvolveAndPool.apply(x, signed, -mean.flatten(), form, tasks)
    z = Affine.apply(d, gamma * torch.rsqrt(var + form.eps), beta, form.slope)
    return Block(z, mean.detach(), var.detach())


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
        beta: Tensor, form: Form, product: torch.dtype,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:  # fmt: skip
        tasks: int = info.batch_size
        now, *of_parameters = in_dims[:4]
        weight, gamma, beta = (
            _joined(t, at, 0, tasks)
            for t, at in zip((weight, gamma, beta), of_parameters, strict=True)
        )
        if _are_data(x, weight):
            images = once(_data, x, now, tasks, weight.dtype, form.stride)
        else:
            images = _images(x, now, tasks, weight.dtype)
        z, mean, var = _block(images, weight, gamma, beta, form, product)
        z = z.view(z.shape[0], tasks, -1, *z.shape[2:])
        return (z, mean.view(tasks, -1), var.view(tasks, -1)), (1, 0, 0)


def _joined(t: Tensor, now: int | None, at: int, tasks: int) -> Tensor:
    """Return a tensor of many tasks with their dimension, if it has one, joined to another."""
    if now is None:
        t = t.unsqueeze(at).expand(*t.shape[:at], tasks, *t.shape[at:])
    else:
        t = t.movedim(now, at)
    return t.flatten(at, at + 1)
