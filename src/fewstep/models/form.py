"""What a block computes, and how its images lie in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Form(NamedTuple):
    """What a block computes, besides its tensors.

    Args:
        stride: Of the convolution.
        pool: Whether a 2x2 pool follows.
        slope: Of the activation below 0.
        eps: Added to the variance.
        examples: How many of the first examples the moments are taken over; None means all, 0
            that they are given.
        needs_moments: Take them also where it is given what to normalise by.
    """

    stride: int
    pool: bool
    slope: float
    eps: float
    examples: int | None = None
    needs_moments: bool = True

    def counted(self, examples: int) -> int:
        """Return of how many of these examples the moments are."""
        return examples if self.examples is None else self.examples


def channels_last(t: Tensor) -> Tensor:
    """Return `t` with its channels next to each other in memory."""
    return t.contiguous(memory_format=torch.channels_last)
