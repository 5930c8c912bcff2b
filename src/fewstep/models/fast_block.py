"""A convolutional block under batch norm, fast in its value and in both its derivatives.

    y = conv(x, s w)              s the sign of gamma, so that what follows rises in y
    p = max-pool(y)
    z = act(|gamma| r (p - mu) + beta)        mu, r = 1 / std of y, by channel

equals pool(act(batch norm(conv(x, w)))): the activation rises, batch norm is affine in each
channel, and a maximum commutes with both. Only the statistics read y at full resolution. They are
of all examples, of the first (a support set's), or given (running ones).

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

from fewstep.core.normalise import Moments
from fewstep.core.once import once
from fewstep.models.block_functions import Affine, Convolve, ConvolveAndPool, NormaliseAndPool
from fewstep.models.form import Form, channels_last
from fewstep.models.kernels import moments as compiled_moments
from fewstep.models.of_tasks import Entrance, joined
from fewstep.models.plain import moments

_LARGEST_PATCH = 27  # 3 channels; a covariance of more costs as much as the convolution


class Block(NamedTuple):
    """A block's output, and the moments of what it normalised, where they were taken."""

    z: Tensor
    moments: Moments


def block(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, form: Form,
    given: Moments | None = None,
) -> Block:  # fmt: skip
    """Return pool(act(batch norm(conv(x)))).

    Args:
        x: (examples, channels, height, width).
        weight: 3x3 filters, (filters, channels, 3, 3).
        gamma: Scale, (filters,).
        beta: Shift, (filters,).
        form: What else there is to say.
        given: What to normalise by, (filters,) each, without a gradient; None takes the moments.

    Raises:
        RuntimeError: a third derivative is asked for (when it is computed).
    """
    device = x.device.type
    rounds = torch.is_autocast_enabled(device) and weight.dtype == torch.float32
    product = torch.get_autocast_dtype(device) if rounds else weight.dtype
    with torch.autocast(device, enabled=False):
        inputs = (x, weight, gamma, beta, *(given or (None, None)))
        if any(t is not None and _functorch.is_batchedtensor(t) for t in inputs):
            z, *moments = _Tasks.apply(*inputs, form, product)
            return Block(z, Moments(*moments))
        if _are_data(x, weight):
            images = _data(x, None, 1, weight.dtype, form)
        else:
            images = _images(x, None, 1, weight.dtype)
        return _block(images, weight, gamma, beta, given, form, product)


class _Images(NamedTuple):
    """Inputs, (examples, tasks x channels, height, width), channels-last.

    Where they are data, with the moments of each task's 3x3 patches: the mean,
    (tasks, channels x 9, 1), and the covariance, (tasks, channels x 9, channels x 9).
    """

    x: Tensor
    tasks: int
    moments: tuple[Tensor, Tensor] | None = None


def _images(x: Tensor, now: int | None, tasks: int, dtype: torch.dtype) -> _Images:
    return _Images(channels_last(joined(x, now, 1, tasks).to(dtype)), tasks)


def _data(x: Tensor, now: int | None, tasks: int, dtype: torch.dtype, form: Form) -> _Images:
    """Return images with their moments in float64.

    var = w^T S w cancels, the more so with S as the mean square less the squared mean.
    """
    x, *_ = _images(x, now, tasks, dtype)
    first = x[: form.examples]
    by: Any = compiled_moments if compiled_moments.fits(first, form.stride, tasks) else moments
    m, second = by.of_patches(first, form.stride, tasks)
    return _Images(x, tasks, (m, second - m @ m.mT))


def _are_data(x: Tensor, weight: Tensor) -> bool:
    return not x.requires_grad and weight[0].numel() <= _LARGEST_PATCH


def _block(
    images: _Images, weight: Tensor, gamma: Tensor, beta: Tensor, given: Moments | None,
    form: Form, product: torch.dtype,
) -> Block:  # fmt: skip
    if images.moments is None:
        normalised = partial(_by_outputs, product)
    else:
        normalised = partial(_by_patches, *images.moments)
    sign = torch.where(gamma.detach() < 0, -1.0, 1.0).to(gamma.dtype)
    wide = (1, -1, 1, 1)
    if given is not None:
        given = Moments((given.mean * sign).view(wide), given.var.view(wide))
    z, (mean, var) = normalised(
        images, weight, sign, (gamma * sign).view(wide), beta.view(wide), given, form
    )
    return Block(z, Moments(mean.flatten() * sign, var.flatten()))


def _by_outputs(
    product: torch.dtype, images: _Images, weight: Tensor, sign: Tensor, gamma: Tensor,
    beta: Tensor, given: Moments | None, form: Form,
) -> Block:  # fmt: skip
    """Return the block with moments of the convolution's output, its factors rounded."""
    factors = (t.to(product) for t in (images.x, weight, sign))
    y = channels_last(Convolve.apply(*factors, form.stride, images.tasks).to(weight.dtype))
    found = given
    if given is not None and form.needs_moments:
        var, mean = torch.var_mean(y.detach(), (0, 2, 3), correction=0)
        found = Moments(mean, var)
    z, *by = NormaliseAndPool.apply(y, gamma.contiguous(), beta, *(given or (None, None)), form)
    return Block(z, found or Moments(*by))


def _by_patches(
    m: Tensor, covariance: Tensor, images: _Images, weight: Tensor, sign: Tensor, gamma: Tensor,
    beta: Tensor, given: Moments | None, form: Form,
) -> Block:  # fmt: skip
    """Return the block with moments of the convolution's input; nothing is rounded."""
    x, tasks, _ = images
    signed = weight * sign.view(-1, 1, 1, 1)
    w = signed.double().view(tasks, -1, 9 * weight.shape[1])
    of_m, of_covariance = w @ m, ((w @ covariance) * w).sum(2)
    found = Moments(*(t.to(x.dtype).view(1, -1, 1, 1) for t in (of_m, of_covariance)))
    mean, var = given or found
    d = ConvolveAndPool.apply(x, signed, -mean.flatten(), form, tasks)
    z = Affine.apply(d, gamma * torch.rsqrt(var + form.eps), beta, form.slope)
    return Block(z, Moments(*(t.detach() for t in found)))


class _Tasks(Entrance):
    """The entrance from `torch.vmap`: moves tasks into the channels."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, gamma: Tensor,
        beta: Tensor, mean: Tensor | None, var: Tensor | None, form: Form, product: torch.dtype,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:  # fmt: skip
        tasks: int = info.batch_size
        now, *of_channels = in_dims[:6]
        weight, gamma, beta, mean, var = (
            joined(t, at, 0, tasks)
            for t, at in zip((weight, gamma, beta, mean, var), of_channels, strict=True)
        )
        if _are_data(x, weight):
            images = once(_data, x, now, tasks, weight.dtype, form)
        else:
            images = _images(x, now, tasks, weight.dtype)
        given = None if mean is None or var is None else Moments(mean, var)
        z, (mean, var) = _block(images, weight, gamma, beta, given, form, product)
        z = z.view(z.shape[0], tasks, -1, *z.shape[2:])
        return (z, mean.view(tasks, -1), var.view(tasks, -1)), (1, 0, 0)
