"""The pool, and what goes back through it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.models.form import Form, channels_last


def pool(t: Tensor, form: Form) -> tuple[Tensor, Tensor | None]:
    """Return the maxima and where they are, or `t` itself."""
    return F.max_pool2d(t, 2, return_indices=True) if form.pool else (t, None)


def unpool(pooled: Tensor, where: Tensor | None, shape: torch.Size) -> Tensor:
    """Return `pooled` at the maxima and 0 elsewhere; itself without a pool."""
    if where is None:
        return pooled
    like = torch.empty(
        shape, dtype=pooled.dtype, device=pooled.device, memory_format=torch.channels_last
    )
    return torch.ops.aten.max_pool2d_with_indices_backward(  # type: ignore[no-any-return]
        channels_last(pooled), like, (2, 2), (2, 2), (0, 0), (1, 1), False, where
    )


def pick(t: Tensor, where: Tensor | None) -> Tensor:
    """Return the elements of `t` that the pool chose."""
    if where is None:
        return t
    last = where.permute(0, 2, 3, 1)
    picked = t.permute(0, 2, 3, 1).flatten(1, 2).gather(1, last.flatten(1, 2))
    return picked.view(last.shape).permute(0, 3, 1, 2)
