"""What a block computes, and how its images lie in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Form(NamedTuple):
    """What a block computes, besides its tensors."""

    stride: int
    pool: bool
    slope: float
    eps: float


def channels_last(t: Tensor) -> Tensor:
    """Return `t` with its channels next to each other in memory."""
    return t.contiguous(memory_format=torch.channels_last)
