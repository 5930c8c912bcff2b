"""Slot alpha: the inner learning rate of every parameter and step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from fewstep.core.errors import InputError, check_name, check_some
from fewstep.core.modules import last_layer, layer_of


@runtime_checkable
class InnerRate(Protocol):
    """Slot alpha. Rates that are learned are values of a table, by name.

    A subclass leaves out what it does not need.
    """

    @property
    def is_learned(self) -> bool:
        """Tell whether the table holds anything."""
        return False

    @property
    def per_step(self) -> bool:
        """Tell whether the table has a row for each inner step, and so an end."""
        return False

    def table(self, adapted: Mapping[str, Tensor], num_steps: int) -> dict[str, Tensor]:
        """Return the initial values of what is learned; empty if nothing is."""
        return {}

    def __call__(self, table: Mapping[str, Tensor], name: str, step: int) -> Tensor | float:
        """Return alpha[step] of parameter `name`; broadcasts against (tasks, *shape)."""
        ...


def _check_rate(name: str, rate: object) -> None:
    # Learned ones may change their sign later.
    if not (isinstance(rate, Real) and 0 <= float(rate) < math.inf):
        raise InputError(f"{name}={rate!r} must be a finite number, 0 or more, such as 0.1")


@dataclass(frozen=True)
class ConstantRate(InnerRate):
    """One fixed inner learning rate for every parameter and step.

    theta[k+1] = theta[k] - alpha * grad L_support(theta[k]); alpha is `inner_lr`.

    Raises:
        InputError: `inner_lr` is negative or not finite.

    Reference: Finn, Abbeel and Levine, Model-Agnostic Meta-Learning, ICML 2017, arXiv:1703.03400.
    """

    inner_lr: float

    def __post_init__(self) -> None:
        _check_rate("inner_lr", self.inner_lr)

    def __call__(self, table: Mapping[str, Tensor], name: str, step: int) -> float:
        """Return alpha."""
        return self.inner_lr


@dataclass(frozen=True)
class StepRates(InnerRate):
    """Fixed inner learning rates, one for each step.

    theta[k+1] = theta[k] - alpha[k] * grad L_support(theta[k])

    Args:
        inner_lrs: alpha[0], alpha[1], ...; steps after the last take the last.

    Raises:
        InputError: they are no tuple, there is none, or one is negative or not finite.
    """

    inner_lrs: tuple[float, ...]

    def __post_init__(self) -> None:
        given: object = self.inner_lrs
        if not isinstance(given, tuple | list):
            raise InputError(f"inner_lrs={given!r} must be a tuple of rates, such as (0.1, 0.05)")
        check_some("inner_lrs", self.inner_lrs)
        for rate in self.inner_lrs:
            _check_rate("inner_lrs", rate)

    def __call__(self, table: Mapping[str, Tensor], name: str, step: int) -> float:
        """Return alpha[step]."""
        return self.inner_lrs[min(step, len(self.inner_lrs) - 1)]


@dataclass(frozen=True)
class LearnedRate(InnerRate):
    """One inner learning rate for every parameter and step, which is learned.

    theta[k+1] = theta[k] - alpha * grad L_support(theta[k])

    Alpha MAML's, when a hypergradient updates it; else the outer optimiser does.

    Args:
        inner_lr: alpha at the start.

    Raises:
        InputError: `inner_lr` is negative or not finite.
    """

    inner_lr: float
    is_learned = True

    def __post_init__(self) -> None:
        _check_rate("inner_lr", self.inner_lr)

    def table(self, adapted: Mapping[str, Tensor], num_steps: int) -> dict[str, Tensor]:
        """Return the one rate, named "all"."""
        like = next(iter(adapted.values()))
        return {"all": like.new_tensor(self.inner_lr, dtype=_precise(like))}

    def __call__(self, table: Mapping[str, Tensor], name: str, step: int) -> Tensor:
        """Return alpha."""
        return table["all"]


@dataclass(frozen=True)
class ElementRates(InnerRate):
    """A learned inner learning rate for each element of each parameter (Meta-SGD).

    theta[k+1] = theta[k] - alpha * grad L_support(theta[k]), alpha of the parameters' own shape.

    Args:
        inner_lr: Initial value of every rate.

    Raises:
        InputError: `inner_lr` is negative or not finite.

    Deviation: the paper draws the initial values at random within an interval.

    Reference: Li et al., Meta-SGD, 2017, arXiv:1707.09835.
    """

    inner_lr: float
    is_learned = True

    def __post_init__(self) -> None:
        _check_rate("inner_lr", self.inner_lr)

    def table(self, adapted: Mapping[str, Tensor], num_steps: int) -> dict[str, Tensor]:
        """Return a rate for each element."""
        return {
            n: torch.full_like(p.detach(), self.inner_lr, dtype=_precise(p))
            for n, p in adapted.items()
        }

    def __call__(self, table: Mapping[str, Tensor], name: str, step: int) -> Tensor:
        """Return alpha of a parameter."""
        return table[name]


@dataclass(frozen=True)
class LayerStepRates(InnerRate):
    """A learned inner learning rate for each layer and step (LSLR).

    theta[k+1] = theta[k] - alpha[layer, k] * grad L_support(theta[k])

    The outer optimiser learns alpha, whose sign is free. A table's entry is (num_steps,).

    Args:
        inner_lr: Initial value of every rate.
        per: "tensor" has a rate for each parameter tensor, as in the authors' code; "layer" one
            for each module that holds parameters of its own, as the paper says.
        head_lr: Initial value for the last layer, the module of the last parameter that is adapted;
            None takes `inner_lr`. From trained features the head may want a hundred times more.

    Raises:
        InputError: `inner_lr` or `head_lr` is negative or not finite.

    Deviation: the authors' code allocates a last row that no step uses, and most of its versions
        start at 0.1 whatever their settings ask for; here neither.

    Reference: Antoniou, Edwards and Storkey, How to train your MAML, ICLR 2019, arXiv:1810.09502.
    """

    inner_lr: float = 0.1
    per: Literal["tensor", "layer"] = "tensor"
    head_lr: float | None = None
    is_learned = True
    per_step = True

    def __post_init__(self) -> None:
        _check_rate("inner_lr", self.inner_lr)
        if self.head_lr is not None:
            _check_rate("head_lr", self.head_lr)
        check_name("per", self.per, ("tensor", "layer"))

    def table(self, adapted: Mapping[str, Tensor], num_steps: int) -> dict[str, Tensor]:
        """Return `num_steps` equal rates for each tensor or layer."""
        initial = dict.fromkeys(map(layer_of, adapted), self.inner_lr)
        if self.head_lr is not None:
            initial[last_layer(adapted)] = self.head_lr
        return {
            self._entry(name): torch.full(
                (num_steps,), initial[layer_of(name)], dtype=_precise(p), device=p.device
            )
            for name, p in adapted.items()
        }

    def __call__(self, table: Mapping[str, Tensor], name: str, step: int) -> Tensor:
        """Return alpha[layer, step]; after the last row, the last row."""
        rates = table[self._entry(name)]
        return rates[min(step, len(rates) - 1)]

    def _entry(self, name: str) -> str:
        return name if self.per == "tensor" else layer_of(name)


def _precise(parameter: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's rate: in bfloat16 small steps would not move it."""
    return torch.promote_types(parameter.dtype, torch.float32)
