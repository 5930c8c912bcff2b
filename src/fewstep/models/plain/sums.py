"""What the derivatives sum over: all but the channels."""

from __future__ import annotations

from torch import Tensor

SPACE = (0, 2, 3)


def sum_of_channel(t: Tensor) -> Tensor:
    """Return the sum of each channel, (1, channels, 1, 1)."""
    return t.sum(SPACE, keepdim=True)


def count_of_channel(t: Tensor) -> int:
    """Return how many numbers a channel has, 1 if it has none."""
    return max(t.numel() // t.shape[1], 1)
