"""The parts an algorithm is made of: one small class for each value of each slot."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import Tensor

from fewstep.core.errors import InputError


class InnerRate(Protocol):
    """Slot alpha: the inner learning rate of every parameter and step."""

    def __call__(self, name: str, step: int) -> Tensor | float:
        """Return alpha[step] of parameter `name`; broadcasts against (tasks, *shape)."""
        ...


@dataclass(frozen=True)
class ConstantRate:
    """One fixed inner learning rate for every parameter and step.

    theta[k+1] = theta[k] - alpha * grad L_support(theta[k]); alpha is `inner_lr`.

    Raises:
        InputError: `inner_lr` is not finite.

    Reference: Finn, Abbeel and Levine, Model-Agnostic Meta-Learning, ICML 2017, arXiv:1703.03400.
    """

    inner_lr: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.inner_lr):
            raise InputError(f"inner_lr={self.inner_lr} must be a finite number, such as 0.1")

    def __call__(self, name: str, step: int) -> float:
        """Return alpha."""
        return self.inner_lr


class QueryWeights(Protocol):
    """Slot v: how much the query loss at each point of the trajectory counts."""

    def __call__(self, num_steps: int) -> tuple[float, ...]:
        """Return v[0 .. num_steps]; v[k] weighs the query loss after k steps, 0 skips it."""
        ...


@dataclass(frozen=True)
class FinalStep:
    """Only the query loss after the last step counts: v = (0, ..., 0, 1)."""

    def __call__(self, num_steps: int) -> tuple[float, ...]:
        """Return v[0 .. num_steps]."""
        return (0.0,) * num_steps + (1.0,)


@dataclass(frozen=True)
class AdaptedParameters:
    """The parameters that the inner loop changes, by shell-style name patterns.

    The others are learned by the outer loop alone.

    Args:
        include: Patterns of names to adapt; `("head.*",)` adapts the head only (ANIL).
        exclude: Patterns of names to leave out of those.

    Raises:
        InputError: a pattern matches no parameter, or none is left (when they are chosen).
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def choose(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return those of `names` to adapt, in their order."""
        names = list(names)
        for pattern in (*self.include, *self.exclude):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise InputError(
                    f"pattern {pattern!r} matches no parameter; the names are {', '.join(names)}"
                )
        chosen = tuple(
            name
            for name in names
            if any(fnmatchcase(name, p) for p in self.include)
            and not any(fnmatchcase(name, p) for p in self.exclude)
        )
        if not chosen:
            raise InputError(f"{self} leaves no parameter to adapt; exclude fewer")
        return chosen


class OuterOptimiser(Protocol):
    """Slot of the outer update: phi <- phi - update(d meta-loss / d phi)."""

    def __call__(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Return the optimiser of the meta-parameters."""
        ...


class OuterSchedule(Protocol):
    """Slot of the outer rate's course over training."""

    def __call__(self, progress: float) -> float:
        """Return the factor on the outer rate; `progress` is the share of training done."""
        ...


@dataclass(frozen=True)
class Constant:
    """The outer rate stays what it is."""

    def __call__(self, progress: float) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class CosineAnnealing:
    """The outer rate falls along half a cosine (CA).

    factor = final + (1 - final) * (1 + cos(pi * progress)) / 2

    Args:
        final: Factor at the end of training.

    Raises:
        InputError: `final` is not within 0 and 1.

    Deviation: falls at every iteration; MAML++'s code keeps the rate constant within an epoch.

    Reference: Loshchilov and Hutter, SGDR, ICLR 2017, arXiv:1608.03983.
    """

    final: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.final <= 1:
            raise InputError(f"CosineAnnealing(final={self.final}) must be between 0 and 1")

    def __call__(self, progress: float) -> float:
        """Return the factor on the outer rate."""
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


def _check_outer_lr(outer_lr: float) -> None:
    if not (math.isfinite(outer_lr) and outer_lr > 0):
        raise InputError(f"outer_lr={outer_lr} must be a positive number, such as 0.001")


@dataclass(frozen=True)
class Adam:
    """Adam with PyTorch's defaults but the rate.

    Raises:
        InputError: `outer_lr` is not a positive finite number.
    """

    outer_lr: float = 1e-3

    def __post_init__(self) -> None:
        _check_outer_lr(self.outer_lr)

    def __call__(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return torch.optim.Adam(parameters, lr=self.outer_lr)


@dataclass(frozen=True)
class SGD:
    """Gradient descent: phi <- phi - beta * gradient; beta is `outer_lr`.

    Raises:
        InputError: `outer_lr` is not a positive finite number.
    """

    outer_lr: float

    def __post_init__(self) -> None:
        _check_outer_lr(self.outer_lr)

    def __call__(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return torch.optim.SGD(parameters, lr=self.outer_lr)
