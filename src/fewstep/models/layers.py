"""Layers of any convolutional module, for all tasks at once and fast in both derivatives.

They stand in for PyTorch's while a module is called for many tasks. Under `torch.vmap` PyTorch
moves the tasks between examples and channels from one layer to the next; here they stay beside the
channels, channels-last, as in `fast_block`, and so do the derivatives of `layer_functions`.
Arguments have PyTorch's names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.nn import functional as F

from fewstep.core.normalise import Moments, NormaliseBy
from fewstep.core.stand_ins.registry import stands_in_for
from fewstep.models.convolution import Space
from fewstep.models.form import channels_last
from fewstep.models.layer_functions import BatchNorm, Convolve, MaxPool, Pair
from fewstep.models.of_tasks import Entrance, joined, one_vmap_at_most


@stands_in_for(torch.conv2d)
def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int | Pair = 1,
    padding: int | Pair | str = 0, dilation: int | Pair = 1, groups: int = 1,
) -> Any:  # fmt: skip
    """Return conv(input, weight) + bias of a task."""
    if isinstance(padding, str) or not (
        _of_tasks(input, weight) and _functorch.is_batchedtensor(weight)
    ):
        return NotImplemented
    space = Space(_pair(stride), _pair(padding), _pair(dilation))
    y = _OfTasks.apply(_convolve, input, weight, space, groups)
    return y if bias is None else y + bias.view(-1, 1, 1)


def _convolve(tasks: int, x: Tensor, weight: Tensor, space: Space, groups: int) -> Any:
    return Convolve.apply(x, weight, space, tasks * groups)


@stands_in_for(F.max_pool2d, torch.max_pool2d)
def max_pool2d(
    input: Tensor, kernel_size: int | Pair, stride: int | Pair | None = None,
    padding: int | Pair = 0, dilation: int | Pair = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:  # fmt: skip
    """Return the maxima of windows."""
    if _pair(dilation) != (1, 1) or ceil_mode or return_indices or not _of_tasks(input):
        return NotImplemented
    kernel = _pair(kernel_size)
    window = kernel, _pair(stride) if stride else kernel, _pair(padding)
    return _OfTasks.apply(_pool, input, None, *window)


def _pool(tasks: int, y: Tensor, _: None, *window: Pair) -> Any:
    return MaxPool.apply(y, *window)


def _treats_each_channel_alone(layer: Callable[..., Tensor]) -> None:
    """Let a layer of PyTorch take tasks as so many more channels."""

    @stands_in_for(layer)
    def of_tasks(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _of_tasks(input):
            return NotImplemented
        return _OfTasks.apply(lambda tasks, x, _: layer(x, *args, **kwargs), input, None)


_treats_each_channel_alone(F.avg_pool2d)
_treats_each_channel_alone(F.adaptive_avg_pool2d)


@stands_in_for(F.group_norm)
def group_norm(input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Normalise groups of channels; PyTorch's own asks images for strides that `vmap` hides."""
    if not _of_tasks(input):
        return NotImplemented
    return F.group_norm(input.flatten(2), *args, **kwargs).unflatten(2, input.shape[2:])


@stands_in_for(Tensor.view)
def view(t: Tensor, *shape: Any, **kwargs: Any) -> Any:
    """Return another shape of a tensor that would have been contiguous but for these layers."""
    shape = shape or (kwargs.get("size"),)
    if "dtype" in kwargs or isinstance(shape[0], torch.dtype) or not _functorch.is_batchedtensor(t):
        return NotImplemented
    return t.reshape(*shape)


@stands_in_for(Tensor.view_as)
def view_as(t: Tensor, other: Tensor) -> Any:
    """Return the shape of another tensor, likewise."""
    return view(t, other.shape)


@stands_in_for(F.batch_norm)
def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Normalise a task's images by what `NormaliseBy` says."""
    like = running_mean if weight is None else weight
    if like is not None and input.dtype != like.dtype:  # rounded; PyTorch's own has no rule
        exact = F.batch_norm(
            input.to(like.dtype), running_mean, running_var, weight, bias, training, momentum, eps
        )
        return exact.to(input.dtype)
    by = NormaliseBy.innermost()
    if (
        not training
        or weight is None
        or bias is None
        or (running_mean is None or running_var is None)
        or not _of_tasks(input, weight, bias)
        or any(t.shape != input.shape[1:2] for t in (weight, bias, running_mean, running_var))
        or input.numel() == input.shape[1]  # one element, which PyTorch refuses
    ):
        return NotImplemented
    given = by.given(running_mean, running_var)
    z, *found = _Normalise.apply(
        input, weight, bias, *(given or (None, None)), by.first(len(input)), eps
    )
    if by.update is not None:
        if given is not None:
            var, mean = torch.var_mean(input.detach(), (0, 2, 3), correction=0)
            found = [mean, var]
        by.update(running_mean, running_var, Moments(*found), by.count(input), momentum)
    return z


def _of_tasks(x: Tensor, *parameters: Tensor) -> bool:
    """Whether these are images of many tasks, under one `torch.vmap`, of a type with kernels."""
    tensors = (x, *parameters)
    return (
        x.ndim == 4
        and x.is_floating_point()
        and all(t.dtype == x.dtype for t in tensors)
        and any(_functorch.is_batchedtensor(t) for t in tensors)
        and one_vmap_at_most()
    )


def _pair(value: int | Pair) -> Pair:
    if isinstance(value, int):
        return value, value
    return value[0], value[-1]


class _OfTasks(Entrance):
    """The entrance from `torch.vmap` of a layer with a weight or none."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], layer: Any, x: Tensor, weight: Tensor | None,
        *args: Any,
    ) -> tuple[Tensor, int]:  # fmt: skip
        tasks: int = info.batch_size
        x = channels_last(joined(x, in_dims[1], 1, tasks))
        y = layer(tasks, x, joined(weight, in_dims[2], 0, tasks), *args)
        return _apart(channels_last(y), tasks), 1


class _Normalise(Entrance):
    """The entrance from `torch.vmap` of batch norm."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], y: Tensor, gamma: Tensor, beta: Tensor,
        mean: Tensor | None, var: Tensor | None, examples: int | None, eps: float,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:  # fmt: skip
        tasks: int = info.batch_size
        y = channels_last(joined(y, in_dims[0], 1, tasks))
        of_channels = [
            None if t is None else joined(t, at, 0, tasks).view(1, -1, 1, 1)
            for t, at in zip((gamma, beta, mean, var), in_dims[1:5], strict=True)
        ]
        counted = 0 if mean is not None else len(y) if examples is None else examples
        z, mean, var = BatchNorm.apply(y, *of_channels, counted, eps)
        return (_apart(z, tasks), mean.view(tasks, -1), var.view(tasks, -1)), (1, 0, 0)


def _apart(t: Tensor, tasks: int) -> Tensor:
    """Return (examples, tasks, channels, height, width) of (examples, tasks x channels, ...)."""
    return t.view(t.shape[0], tasks, -1, *t.shape[2:])
