"""A convolutional block under batch norm, fast in its value and in both its derivatives.

    y = conv(x, s w)              s the sign of gamma, so that what follows rises in y
    p = max-pool(y)
    z = act(|gamma| r (p - mu) + beta)        mu, r = 1 / std of y, by channel

equals pool(act(batch norm(conv(x, w)))): the activation rises, batch norm is affine in each
channel, and a maximum commutes with both. Only the statistics read y at full resolution.

Where x is data, and so has no gradient, and has few channels, not even they do: mu = w . m and
var = w^T S w for the mean m and the covariance S of the 3x3 patches of x.

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
from torch.nn import functional as F

from fewstep.models.block_functions import (
    Affine,
    Convolve,
    ConvolveAndPool,
    Form,
    NormaliseAndPool,
    channels_last,
)

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
    x = x.to(weight.dtype)
    with torch.autocast(device, enabled=False):
        if any(_functorch.is_batchedtensor(t) for t in (x, weight, gamma, beta)):
            return Block(*_Tasks.apply(x, weight, gamma, beta, form, product))
        return _block(x, weight, gamma, beta, form, product, tasks=1)


def _block(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, form: Form, product: torch.dtype,
    tasks: int,
) -> Block:  # fmt: skip
    is_data = not x.requires_grad and weight[0].numel() <= _LARGEST_PATCH
    normalised = _by_patches if is_data else partial(_by_outputs, product)
    sign = torch.where(gamma.detach() < 0, -1.0, 1.0).to(gamma.dtype)
    wide = (1, -1, 1, 1)
    z, mean, var = normalised(
        channels_last(x), weight, sign, (gamma * sign).view(wide), beta.view(wide), form, tasks
    )
    return Block(z, mean.flatten() * sign, var.flatten())


def _by_outputs(
    product: torch.dtype, x: Tensor, weight: Tensor, sign: Tensor, gamma: Tensor, beta: Tensor,
    form: Form, tasks: int,
) -> Block:  # fmt: skip
    """Return the block with statistics of the convolution's output, its factors rounded."""
    factors = (t.to(product) for t in (x, weight, sign))
    y = Convolve.apply(*factors, form.stride, tasks).to(x.dtype)
    return Block(*NormaliseAndPool.apply(y, gamma, beta, form))


def _by_patches(
    x: Tensor, weight: Tensor, sign: Tensor, gamma: Tensor, beta: Tensor, form: Form, tasks: int
) -> Block:
    """Return the block with statistics of the convolution's input.

    Nothing is rounded, and in float64: var = w^T S w cancels, the more so with S as the mean square
    less the squared mean.
    """
    signed = weight * sign.view(-1, 1, 1, 1)
    patches = _patches(x.double(), form.stride, tasks)
    m = patches.mean(2, keepdim=True)
    covariance = patches @ patches.mT / patches.shape[2] - m @ m.mT
    w = signed.double().view(tasks, -1, len(m[0]))
    mean = (w @ m).to(x.dtype).view(1, -1, 1, 1)
    var = ((w @ covariance) * w).sum(2).to(x.dtype).view(1, -1, 1, 1)
    d = ConvolveAndPool.apply(x, signed, -mean.flatten(), form, tasks)
    z = Affine.apply(d, gamma * torch.rsqrt(var + form.eps), beta, form.slope)
    return Block(z, mean.detach(), var.detach())


def _patches(x: Tensor, stride: int, tasks: int) -> Tensor:
    """Return the 3x3 patches of each task's images, (tasks, channels x 9, how many)."""
    windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, stride).unfold(3, 3, stride)
    n, channels, height, width, _, _ = windows.shape
    windows = windows.reshape(n, tasks, channels // tasks, height, width, 3, 3)
    return windows.permute(1, 2, 5, 6, 0, 3, 4).reshape(tasks, channels // tasks * 9, -1)


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
        into = (1, 0, 0, 0)
        x, weight, gamma, beta = (
            t.unsqueeze(at).expand(*t.shape[:at], tasks, *t.shape[at:]).flatten(at, at + 1)
            if now is None
            else t.movedim(now, at).flatten(at, at + 1)
            for t, now, at in zip((x, weight, gamma, beta), in_dims, into, strict=False)
        )
        z, mean, var = _block(x, weight, gamma, beta, form, product, tasks)
        z = z.view(z.shape[0], tasks, -1, *z.shape[2:])
        return (z, mean.view(tasks, -1), var.view(tasks, -1)), (1, 0, 0)
