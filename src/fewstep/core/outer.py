"""Slots of the outer update: the optimiser, and its rate's course."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.core.errors import InputError


class OuterOptimiser(Protocol):
    """Slot of the outer update: phi <- phi - update(d meta-loss / d phi)."""

    @property
    def owns_rate(self) -> bool:
        """Tell whether it changes its rate itself, so that no schedule may."""
        ...

    def __call__(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Return the optimiser of the meta-parameters."""
        ...


class OuterSchedule(Protocol):
    """Slot of the outer rate's course over training."""

    def __call__(self, epoch: float) -> float:
        """Return the factor on the outer rate."""
        ...


@dataclass(frozen=True)
class Constant:
    """The outer rate stays what it is."""

    def __call__(self, epoch: float) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class CosineAnnealing:
    """The outer rate falls along half a cosine (CA).

    factor = final + (1 - final) * (1 + cos(pi * epoch / num_epochs)) / 2

    Args:
        num_epochs: Epochs until the factor is `final`, where it stays.
        final: Factor at the end.

    Raises:
        InputError: `num_epochs` is not positive, or `final` is not within 0 and 1.

    Deviation: falls at every iteration; MAML++'s code keeps the rate constant within an epoch.

    Reference: Loshchilov and Hutter, SGDR, ICLR 2017, arXiv:1608.03983.
    """

    num_epochs: float
    final: float = 0.0

    def __post_init__(self) -> None:
        if not self.num_epochs > 0:
            raise InputError(f"CosineAnnealing(num_epochs={self.num_epochs}) must be positive")
        if not 0 <= self.final <= 1:
            raise InputError(f"CosineAnnealing(final={self.final}) must be between 0 and 1")

    def __call__(self, epoch: float) -> float:
        """Return the factor on the outer rate."""
        share = min(epoch / self.num_epochs, 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * share)) / 2


def check_outer_lr(outer_lr: float) -> None:
    """Raise InputError unless the rate is positive and finite."""
    if not (math.isfinite(outer_lr) and outer_lr > 0):
        raise InputError(f"outer_lr={outer_lr} must be a positive number, such as 0.001")


@dataclass(frozen=True)
class Adam:
    """Adam with PyTorch's defaults but the rate.

    Raises:
        InputError: `outer_lr` is not a positive finite number.
    """

    outer_lr: float = 1e-3
    owns_rate = False

    def __post_init__(self) -> None:
        check_outer_lr(self.outer_lr)

    def __call__(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return torch.optim.Adam(parameters, lr=self.outer_lr)


@dataclass(frozen=True)
class SGD:
    """Gradient descent, with Nesterov's momentum and decay of weights if asked.

    v <- momentum * v + g
    phi <- phi - outer_lr * (g + momentum * v),  g = gradient + weight_decay * phi

    Args:
        outer_lr: The rate, beta.
        momentum: How much of the former direction stays.
        weight_decay: Of all that it updates, learned inner rates and normalisation too.

    Raises:
        InputError: `outer_lr` is not a positive finite number, `momentum` is not in [0, 1), or
            `weight_decay` is negative or not finite.
    """

    outer_lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    owns_rate = False

    def __post_init__(self) -> None:
        check_outer_lr(self.outer_lr)
        if not 0 <= self.momentum < 1:
            raise InputError(f"SGD(momentum={self.momentum}) must be 0 or more, and below 1")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"SGD(weight_decay={self.weight_decay}) must be 0 or more")

    def __call__(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return torch.optim.SGD(
            parameters,
            lr=self.outer_lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.momentum > 0,
        )
