"""The metric of classification."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.errors import InputError


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the share of targets whose class has the largest output; negative ones do not count.

    Args:
        outputs: (examples, classes), (examples, classes, ...) as `F.cross_entropy` takes them, or
            (examples, ..., classes).
        targets: Numbers of classes, (examples, ...); below 0, as -100, where there is none.

    Raises:
        InputError: the shapes are others, or fit in both ways, or there is one class.

    >>> accuracy(torch.eye(2), torch.tensor([0, 0])).item()
    0.5
    """
    dims = {1, outputs.ndim - 1} & set(range(1, outputs.ndim))
    ways = [d for d in dims if _without(outputs.shape, d) == targets.shape]
    if len(ways) != 1 or outputs.shape[(dim := ways.pop())] < 2:
        raise InputError(
            f"outputs {tuple(outputs.shape)} do not give each of the targets "
            f"{tuple(targets.shape)} classes along one dimension, as accuracy needs; pass "
            "metric=..."
        )
    is_right, counts = outputs.argmax(dim) == targets, targets >= 0
    return is_right.to(outputs.dtype).sum() / counts.to(outputs.dtype).sum()


def _without(shape: torch.Size, dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])
