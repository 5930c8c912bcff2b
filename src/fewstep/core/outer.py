"""Slots of the outer update: the optimiser, and its rate's course."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fewstep.core.errors import InputError, check_betas, check_share


@runtime_checkable
class OuterOptimiser(Protocol):
    """Slot of the outer update: phi <- phi - update(d meta-loss / d phi)."""

    @property
    def owns_rate(self) -> bool:
        """Tell whether it changes its rate itself, so that no schedule may."""
        ...

    def __call__(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Return the optimiser of the meta-parameters."""
        ...


@runtime_checkable
class OuterSchedule(Protocol):
    """Slot of the outer rate's course over training."""

    def __call__(self, epoch: float) -> float:
        """Return the factor on the outer rate."""
        ...


@dataclass(frozen=True)
class ConstantSchedule:
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


def check_for_adam(parameters: list[Tensor]) -> None:
    """Check that Adam's steps are finite.

    Raises:
        InputError: a parameter is float16.
    """
    if any(parameter.dtype == torch.float16 for parameter in parameters):
        raise InputError(
            "Adam's 1e-8 is 0 in float16, where its first step makes parameters nan; keep "
            "float32, and pass precision='bfloat16', or take SGD"
        )


def check_outer_lr(outer_lr: object) -> None:
    """Raise InputError unless the rate is positive and finite."""
    if not (isinstance(outer_lr, Real) and 0 < float(outer_lr) < math.inf):
        raise InputError(f"outer_lr={outer_lr!r} must be a positive number, such as 0.001")


def _check_weight_decay(part: object, weight_decay: float) -> None:
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise InputError(f"{type(part).__name__}(weight_decay={weight_decay}) must be 0 or more")


@dataclass(frozen=True)
class Adam:
    """Adam, with decay of weights apart from the gradient if asked (AdamW).

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    phi <- (1 - outer_lr * weight_decay) phi
           - outer_lr * m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + 1e-8)

    Args:
        outer_lr: The rate, beta.
        betas: b1 and b2.
        weight_decay: Of all that it updates, learned inner rates and normalisation too.

    Raises:
        InputError: `outer_lr` is not a positive finite number, `betas` are not two in [0, 1), or
            `weight_decay` is negative or not finite; when it is called: a parameter is float16.

    Reference: Kingma and Ba, Adam, ICLR 2015, arXiv:1412.6980; Loshchilov and Hutter, Decoupled
        weight decay regularization, ICLR 2019, arXiv:1711.05101.
    """

    outer_lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    owns_rate = False

    def __post_init__(self) -> None:
        check_outer_lr(self.outer_lr)
        check_betas(self.betas)
        _check_weight_decay(self, self.weight_decay)

    def __call__(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Return the optimiser."""
        check_for_adam(parameters)
        return torch.optim.Adam(
            parameters,
            lr=self.outer_lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            decoupled_weight_decay=True,
        )


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
        check_share("momentum", self.momentum)
        _check_weight_decay(self, self.weight_decay)

    def __call__(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return torch.optim.SGD(
            parameters,
            lr=self.outer_lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.momentum > 0,
        )
