"""The outer update of reinforcement learning: a step as long as the policies may change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fewstep.core.errors import InputError


class Seen(NamedTuple):
    """What a part of an objective gives.

    Args:
        loss: Its share of the loss, a scalar.
        divergence: Its share of how far the outputs are from those before the update, a scalar.
        outputs: What the divergence is of.
    """

    loss: Tensor
    divergence: Tensor
    outputs: Tensor


class Objective(Protocol):
    """Loss and divergence as functions of the parameters as they are at the call."""

    def __call__(self, *, differentiable: bool) -> Iterable[Seen]:
        """Return parts that add up to them; with graphs to be differentiated twice, if asked."""
        ...


@dataclass(frozen=True)
class Update:
    """What an update did.

    Args:
        loss_before: The loss before it.
        loss: The loss after it.
        divergence: How far the policies moved.
        shrinks: How often the step was shortened; None where no length would do and the parameters
            are as they were.
    """

    loss_before: float
    loss: float
    divergence: float
    shrinks: int | None


@dataclass(frozen=True)
class TrustRegion:
    """Go down a loss as far as a divergence allows (TRPO).

    direction = H^-1 g;  step = -sqrt(2 max_divergence / (direction . H direction)) direction

    with g the gradient of the loss and H the Hessian of the divergence, by conjugate gradients;
    then shorter, until the loss is lower and the divergence itself small enough. As the divergence
    has no slope where the outputs are the old ones, H = J^T M J, M being its Hessian by the outputs
    and J their derivatives by the parameters.

    Args:
        max_divergence: Bound of the divergence, in nats.
        iterations: Of conjugate gradients.
        damping: Added to the diagonal of H.
        shrink: Factor of the next length to be tried.
        lengths: How many are tried.

    Raises:
        InputError: an argument is out of its range.

    Deviation: products with H are exact; the MAML paper takes finite differences of gradients.

    Reference: Schulman et al., Trust region policy optimization, ICML 2015, arXiv:1502.05477.
    """

    max_divergence: float = 0.01
    iterations: int = 10
    damping: float = 1e-5
    shrink: float = 0.8
    lengths: int = 15

    def __post_init__(self) -> None:
        are_finite = 0 < self.max_divergence < math.inf and 0 <= self.damping < math.inf
        if not (are_finite and 0 < self.shrink < 1):
            raise InputError(
                f"{self} needs finite max_divergence > 0 and damping >= 0, and 0 < shrink < 1"
            )
        if min(self.iterations, self.lengths) < 1:
            raise InputError(f"{self} needs at least 1 iteration and 1 length")

    def step(self, parameters: list[Tensor], objective: Objective) -> Update:
        """Update the parameters in place.

        Raises:
            FloatingPointError: the loss or its gradient is not finite; nothing was changed.
        """
        with torch.enable_grad():
            parts = list(objective(differentiable=True))
            g = sum_of(_flat(_grad(part.loss, parameters)) for part in parts)
            hessian = hessian_product(parts, parameters, self.damping)
        loss = sum_of(part.loss.detach() for part in parts)
        if not (loss.isfinite() and g.isfinite().all()):
            raise FloatingPointError(f"the loss is {loss.item()}, its gradient {g.norm().item()}")
        direction, h_direction = conjugate_gradient(hessian, g, self.iterations)
        curvature = direction @ h_direction
        before = [p.detach().clone() for p in parameters]
        accepted = False
        try:
            if curvature > 0:
                step = torch.sqrt(2 * self.max_divergence / curvature) * direction
                for shrinks in range(self.lengths):
                    _move(parameters, before, -(self.shrink**shrinks) * step)
                    with torch.no_grad():
                        losses, divergences, _ = zip(*objective(differentiable=False), strict=True)
                    new_loss, moved = sum_of(losses), sum_of(divergences)
                    accepted = bool(new_loss < loss and moved <= self.max_divergence)
                    if accepted:
                        return Update(loss.item(), new_loss.item(), moved.item(), shrinks)
        finally:  # also where it is interrupted
            if not accepted:
                _move(parameters, before, torch.zeros_like(g))
        return Update(loss.item(), loss.item(), 0.0, None)


def hessian_product(
    parts: Sequence[Seen], parameters: list[Tensor], damping: float
) -> Callable[[Tensor], Tensor]:
    """Return the map from v to (J^T M J + damping) v, J and M as in `TrustRegion`, all flat.

    J v is the derivative of J^T u by u, which costs less than to differentiate the divergence by
    the parameters twice.
    """
    of_parts = [_curvature_product(part, parameters) for part in parts]
    return lambda v: sum_of(product(v) for product in of_parts) + damping * v


def _curvature_product(seen: Seen, parameters: list[Tensor]) -> Callable[[Tensor], Tensor]:
    outputs = seen.outputs
    (slope,) = _grad(seen.divergence, [outputs], create_graph=True)
    u = torch.zeros_like(outputs, requires_grad=True)
    jt_u = _flat(_grad(outputs, parameters, u, create_graph=True))

    def product(v: Tensor) -> Tensor:
        (j_v,) = _grad(jt_u @ v, [u])
        (m_j_v,) = _grad(slope, [outputs], j_v)
        return _flat(_grad(outputs, parameters, m_j_v))

    return product


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Solve A x = b for a positive definite A that is given by its products.

    Args:
        product: Maps v to A v.
        b: (n,).
        iterations: At most so many products.

    Returns:
        x, and A x.
    """
    x = torch.zeros_like(b)
    r, p = b.clone(), b.clone()
    rr = r @ r
    for _ in range(iterations):
        if rr < 1e-10:  # small enough
            break
        ap = product(p)
        alpha = rr / (p @ ap)
        x = x + alpha * p
        r = r - alpha * ap
        rr, previous = r @ r, rr
        p = r + rr / previous * p
    return x, b - r


def sum_of(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of one tensor or more."""
    return reduce(torch.add, terms)


def _grad(
    y: Tensor, x: list[Tensor], of: Tensor | None = None, *, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Return (dy/dx)^T of; the graph is kept."""
    return torch.autograd.grad(
        y, x, of, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _move(parameters: list[Tensor], before: list[Tensor], step: Tensor) -> None:
    with torch.no_grad():
        parts = step.split([p.numel() for p in parameters])
        for parameter, start, part in zip(parameters, before, parts, strict=True):
            parameter.copy_(start + part.view_as(start))
