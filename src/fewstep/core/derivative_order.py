"""Slot: differentiate through the inner gradients, or take them as constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from fewstep.core.errors import InputError


@runtime_checkable
class DerivativeOrder(Protocol):
    """Slot of the derivative order."""

    def __call__(self, epoch: float) -> Literal[1, 2]:
        """Return 2, or 1 where no second-order graph is to be built."""
        ...


@dataclass(frozen=True)
class FixedOrder:
    """The same order throughout: 2 is MAML, 1 is first-order MAML.

    Raises:
        InputError: `order` is neither 1 nor 2.
    """

    order: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise InputError(f"FixedOrder({self.order}) must be 1 (FOMAML) or 2 (MAML)")

    def __call__(self, epoch: float) -> Literal[1, 2]:
        """Return the order."""
        return self.order


@dataclass(frozen=True)
class DerivativeAnnealing:
    """First order before epoch E, second order from E on (DA).

    Learned inner rates learn in both: d L_query / d alpha[k] needs no second derivative.

    Args:
        first_order_epochs: E.

    Raises:
        InputError: `first_order_epochs` is negative.

    Deviation: the authors' code compares with `>`, so that its 50 means 51 epochs, and ships with
        the part switched off.

    Reference: Antoniou, Edwards and Storkey, How to train your MAML, ICLR 2019, arXiv:1810.09502.
    """

    first_order_epochs: float = 50

    def __post_init__(self) -> None:
        if not self.first_order_epochs >= 0:
            raise InputError(f"first_order_epochs={self.first_order_epochs} must be 0 or more")

    def __call__(self, epoch: float) -> Literal[1, 2]:
        """Return 1 before `first_order_epochs`, else 2."""
        return 1 if epoch < self.first_order_epochs else 2
