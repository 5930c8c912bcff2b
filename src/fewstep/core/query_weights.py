"""Slot v: how much the query loss at each point of the trajectory counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fewstep.core.errors import InputError


@runtime_checkable
class QueryWeights(Protocol):
    """Slot v."""

    def __call__(self, num_steps: int, epoch: float) -> tuple[float, ...]:
        """Return v[0 .. num_steps]; v[k] weighs the query loss after k steps, 0 skips it."""
        ...


@dataclass(frozen=True)
class FinalStep:
    """Only the query loss after the last step counts: v = (0, ..., 0, 1)."""

    def __call__(self, num_steps: int, epoch: float) -> tuple[float, ...]:
        """Return v[0 .. num_steps]."""
        return (0.0,) * num_steps + (1.0,)


@dataclass(frozen=True)
class MultiStepLoss:
    """The query loss after every step counts, at first alike, later the last alone (MSL).

    In epoch e, with N steps and E = `num_epochs`, while e < E:

        v[k] = max(1/N - e / (N E), floor / N)                              0 < k < N
        v[N] = min(1/N + e (N - 1) / (N E), 1 - (N - 1) floor / N)

    and v[N] alone from epoch E on. The weights are never negative and sum to 1.

    Args:
        num_epochs: E, epochs until the last loss stands alone.
        floor: Least weight of an early step, times N, before epoch E.

    Raises:
        InputError: `num_epochs` is below 1, or `floor` is not within 0 and 1.

    Deviation: none from the authors' code; the paper gives no formula, and counts the loss before
        the first step, too.

    Reference: Antoniou, Edwards and Storkey, How to train your MAML, ICLR 2019, arXiv:1810.09502.

    >>> MultiStepLoss(num_epochs=10)(5, epoch=0)
    (0.0, 0.2, 0.2, 0.2, 0.2, 0.2)
    """

    num_epochs: int = 10
    floor: float = 0.03

    def __post_init__(self) -> None:
        if self.num_epochs < 1:
            raise InputError(f"MultiStepLoss(num_epochs={self.num_epochs}) must be at least 1")
        if not 0 <= self.floor <= 1:
            raise InputError(f"MultiStepLoss(floor={self.floor}) must be between 0 and 1")

    def __call__(self, num_steps: int, epoch: float) -> tuple[float, ...]:
        """Return v[0 .. num_steps]."""
        e, n = math.floor(epoch), num_steps
        if e >= self.num_epochs or n < 2:
            return FinalStep()(num_steps, epoch)
        early = max(1 / n - e / (n * self.num_epochs), self.floor / n)
        last = min(1 / n + e * (n - 1) / (n * self.num_epochs), 1 - (n - 1) * self.floor / n)
        return (0.0, *[early] * (n - 1), last)
