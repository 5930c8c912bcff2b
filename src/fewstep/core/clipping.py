"""Slots of clipping: what happens to a gradient before a step follows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fewstep.core.errors import InputError


@runtime_checkable
class Clipping(Protocol):
    """Slots between a gradient and its step: each task's inner one, and the outer one."""

    def __call__(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the step follows.

        Args:
            gradients: Of each parameter, (tasks, *shape), each task to be clipped by itself; the
                meta-gradient comes as that of one task.
        """
        ...


@dataclass(frozen=True)
class NoClipping:
    """The gradient as it is."""

    def __call__(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients."""
        return dict(gradients)


@dataclass(frozen=True)
class ClipByValue:
    """Every element of the gradient brought within -limit and limit.

    Raises:
        InputError: `limit` is not a positive finite number.

    Reference: MAML++'s code clips its meta-gradient at 10 on mini-ImageNet.
    """

    limit: float = 10.0

    def __post_init__(self) -> None:
        _check_limit(self, self.limit)

    def __call__(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the clipped gradients."""
        return {name: g.clamp(-self.limit, self.limit) for name, g in gradients.items()}


@dataclass(frozen=True)
class ClipByNorm:
    """The gradient shortened to a norm of limit, if it is longer.

    g <- g min(1, limit / |g|), with |g| over all of a task's parameters

    In the inner loop the derivative goes through the norm, too.

    Raises:
        InputError: `limit` is not a positive finite number.
    """

    limit: float = 10.0

    def __post_init__(self) -> None:
        _check_limit(self, self.limit)

    def __call__(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the clipped gradients."""
        rows = [g.reshape(len(g), -1) for g in gradients.values() if g.numel()]
        largest = torch.stack([_largest(row) for row in rows]).amax(0)
        # A unit that is a constant keeps squares from overflowing, and every derivative as it is.
        unit = largest.clamp(min=self.limit)[:, None]
        squares = torch.stack([(row / unit).square().sum(1, keepdim=True) for row in rows]).sum(0)
        # Below 1 the norm is below the limit; no root is near 0, where it has no derivative.
        scale = self.limit / unit / squares.clamp(min=1).sqrt()
        return {
            name: (scale.view(-1, *[1] * (g.dim() - 1)) * g).to(g.dtype)
            for name, g in gradients.items()
        }


def _largest(row: Tensor) -> Tensor:
    """Return each task's greatest absolute value, in float32 or better."""
    precise = max(row.dtype, torch.float32, key=lambda dtype: dtype.itemsize)
    found: Tensor = torch.linalg.vector_norm(row.detach().to(precise), ord=math.inf, dim=1)
    return found


def _check_limit(part: object, limit: object) -> None:
    if not (isinstance(limit, Real) and 0 < float(limit) < math.inf):
        raise InputError(f"{part} must have a positive, finite limit, such as 10.0")
