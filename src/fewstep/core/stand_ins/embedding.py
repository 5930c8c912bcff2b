"""Embeddings whose padding no gradient reaches, for many tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.nn import functional as F

from fewstep.core.stand_ins.registry import stands_in_for


@stands_in_for(F.embedding, always=True)
def embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Look up rows of a table, the padding's as a constant.

    `torch.vmap` puts the tables of all tasks into one and takes `padding_idx` for a row of the
    first.
    """
    if padding_idx is None or not _functorch.is_batchedtensor(weight):
        return NotImplemented
    row = torch.arange(len(weight), device=weight.device)[:, None]
    is_padding = row == padding_idx % len(weight)
    return F.embedding(
        input, torch.where(is_padding, weight.detach(), weight), None, *args, **kwargs
    )
