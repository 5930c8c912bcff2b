"""Slot u: where an inner step leads, given the gradient and the rates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.errors import InputError, check_betas, check_share


class InnerStep(ABC):
    """Slot u. Pure: what it remembers of a task is its state, what it learns is its table.

    theta[k+1], state[k+1] = u(theta[k], g[k], alpha[k], state[k]; table)

    Steps may be taken again, and tasks by the chunk, so that an attribute in place of a state would
    mix them; tensors stay as they are, and new ones are returned. Derivatives go through all of it.
    A subclass that learns or remembers nothing leaves out `table` or `start`.
    """

    @property
    def per_step(self) -> bool:
        """Tell whether the table has a row for each inner step, and so an end."""
        return False

    def table(self, adapted: Mapping[str, Tensor], num_steps: int) -> dict[str, Tensor]:
        """Return the initial values of what is learned, by names of its own.

        Args:
            adapted: The adapted parameters, each (*shape).
            num_steps: K.
        """
        return {}

    def start(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state before the first step, by names of its own, each (tasks, ...).

        Args:
            theta: The adapted parameters at theta[0], each (tasks, *shape).
        """
        return {}

    @abstractmethod
    def __call__(
        self,
        theta: Mapping[str, Tensor],
        gradient: Mapping[str, Tensor],
        alpha: Mapping[str, Tensor | float],
        state: Mapping[str, Tensor],
        table: Mapping[str, Tensor],
        step: int,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the adapted parameters after the step, and the state.

        Args:
            theta: The adapted parameters, each (tasks, *shape).
            gradient: g[k], each task's support gradient after its clipping, in the same shapes.
            alpha: alpha[k], which broadcasts against them.
            state: What `start`, or the step before, returned.
            table: What is learned.
            step: k.
        """


@dataclass(frozen=True)
class GradientStep(InnerStep):
    """Gradient descent.

    theta[k+1] = theta[k] - alpha[k] * g[k]
    """

    def __call__(
        self,
        theta: Mapping[str, Tensor],
        gradient: Mapping[str, Tensor],
        alpha: Mapping[str, Tensor | float],
        state: Mapping[str, Tensor],
        table: Mapping[str, Tensor],
        step: int,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return theta[k+1], and no state."""
        return _moved(theta, gradient, alpha), {}


@dataclass(frozen=True)
class MomentumStep(InnerStep):
    """Gradient descent with momentum, from rest in each task.

    m[k] = momentum * m[k-1] + g[k];   theta[k+1] = theta[k] - alpha[k] * m[k]

    Args:
        momentum: Share of the last step that goes on.

    Raises:
        InputError: `momentum` is not within 0 and 1, 1 left out.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_share("momentum", self.momentum)

    def start(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return m before the first step: zeros."""
        return {n: torch.zeros_like(p) for n, p in theta.items()}

    def __call__(
        self,
        theta: Mapping[str, Tensor],
        gradient: Mapping[str, Tensor],
        alpha: Mapping[str, Tensor | float],
        state: Mapping[str, Tensor],
        table: Mapping[str, Tensor],
        step: int,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return theta[k+1], and m[k]."""
        m = {n: self.momentum * state[n] + g for n, g in gradient.items()}
        return _moved(theta, m, alpha), m


@dataclass(frozen=True)
class AdamStep(InnerStep):
    """Adam, its moments at zero in each task.

    m[k] = b1 m[k-1] + (1 - b1) g[k];   v[k] = b2 v[k-1] + (1 - b2) g[k]^2
    theta[k+1] = theta[k] - alpha[k] * m[k] / (1 - b1^(k+1)) / (sqrt(v[k] / (1 - b2^(k+1))) + eps)

    Reptile's authors adapt by it, with b1 = 0 and moments that go on from task to task.

    Args:
        betas: b1 and b2.
        eps: What keeps the step finite.

    Raises:
        InputError: a beta is not within 0 and 1, 1 left out, or `eps` is not positive.

    Deviation: where v is 0, the root's derivative, which is infinite, is taken as 0.

    Reference: Kingma and Ba, Adam, ICLR 2015, arXiv:1412.6980.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_betas(self.betas)
        if not self.eps > 0:
            raise InputError(f"AdamStep(eps={self.eps}) must be positive")

    def start(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return both moments before the first step: zeros."""
        zeros = {n: torch.zeros_like(p) for n, p in theta.items()}
        return {f"m.{n}": z for n, z in zeros.items()} | {f"v.{n}": z for n, z in zeros.items()}

    def __call__(
        self,
        theta: Mapping[str, Tensor],
        gradient: Mapping[str, Tensor],
        alpha: Mapping[str, Tensor | float],
        state: Mapping[str, Tensor],
        table: Mapping[str, Tensor],
        step: int,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return theta[k+1], and the moments."""
        b1, b2 = self.betas
        m = {n: b1 * state[f"m.{n}"] + (1 - b1) * g for n, g in gradient.items()}
        v = {n: b2 * state[f"v.{n}"] + (1 - b2) * g * g for n, g in gradient.items()}
        c1, c2 = 1 - b1 ** (step + 1), 1 - b2 ** (step + 1)
        direction = {n: m[n] / c1 / (_root(v[n] / c2) + self.eps) for n in theta}
        after = _moved(theta, direction, alpha)
        return after, {f"m.{n}": t for n, t in m.items()} | {f"v.{n}": t for n, t in v.items()}


def _moved(
    theta: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    alpha: Mapping[str, Tensor | float],
) -> dict[str, Tensor]:
    return {n: p - alpha[n] * direction[n] for n, p in theta.items()}


def _root(v: Tensor) -> Tensor:
    """Return the root, whose derivative is 0 where v is."""
    return torch.where(v > 0, torch.where(v > 0, v, 1).sqrt(), 0)
