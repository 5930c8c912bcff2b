"""Slot s: where a task's inner loop starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fewstep.core.errors import InputError


@dataclass(frozen=True)
class SupportSets:
    """What a start may look at.

    Args:
        x: Inputs, (tasks, examples, ...).
        y: Targets, (tasks, examples, ...).
        inputs_of: What a part of the module, by its name, is given when the module is called on x
            with phi, (tasks, examples, ...). Derivatives go through it.
    """

    x: Tensor
    y: Tensor
    inputs_of: Callable[[str], Tensor]


@runtime_checkable
class InnerStart(Protocol):
    """Slot s. Pure: what it learns is its table.

    theta[0] = s(phi, support set; table)

    Derivatives go through it, in the first order, too, whose inner gradients alone are constants.
    A subclass that learns nothing leaves out `table`.
    """

    def table(self, phi: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the initial values of what is learned, by names of its own.

        Args:
            phi: The parameters that are trained, each (*shape).
        """
        return {}

    def __call__(
        self, phi: Mapping[str, Tensor], support: SupportSets, table: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the parameters that do not start as phi has them, each (tasks, *shape).

        Args:
            phi: The module's parameters, each (tasks, *shape): the same for every task.
            support: The support sets.
            table: What is learned.
        """
        ...


@dataclass(frozen=True)
class SharedStart(InnerStart):
    """Every task starts at phi: theta[0] = phi."""

    def __call__(
        self, phi: Mapping[str, Tensor], support: SupportSets, table: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return nothing."""
        return {}


@dataclass(frozen=True)
class PrototypeStart(InnerStart):
    """A linear head starts at the classes' mean features, so that it tells them apart by distance.

    c[n] = mean of the features f of class n;  w[n] = 2 c[n],  b[n] = -|c[n]|^2,

    so that w[n] . f + b[n] = |f|^2 - |f - c[n]|^2, of which |f|^2 is the same for all classes. A
    class without support examples has its mean at 0. phi's own head is not used, and not learned.

    Args:
        head: Name of the linear layer, with a bias, that gives the scores; None takes the layer of
            the module's last parameter.

    Raises:
        InputError: when it is called: there is no such layer, or the targets are not one class for
            each example.

    Reference: Snell, Swersky and Zemel, Prototypical networks for few-shot learning, NeurIPS 2017,
        arXiv:1703.05175, section 2.4; then adapted: Triantafillou et al., Meta-Dataset, ICLR 2020,
        arXiv:1903.03096 (Proto-MAML).
    """

    head: str | None = None

    def __call__(
        self, phi: Mapping[str, Tensor], support: SupportSets, table: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the head's weight and bias."""
        head = [*phi][-1].rpartition(".")[0] if self.head is None else self.head
        weight, bias = (f"{head}.{name}".lstrip(".") for name in ("weight", "bias"))
        if not {weight, bias} <= phi.keys() or phi[weight].ndim != 3:
            raise InputError(
                f"PrototypeStart(head={self.head!r}) needs a linear layer with a bias, and "
                f"{head!r} is none; the parameters are {', '.join(phi)}"
            )
        f, y = support.inputs_of(head), support.y
        if y.is_floating_point() or y.shape != f.shape[:2]:
            raise InputError(
                f"PrototypeStart needs the number of a class for each support example, and targets "
                f"are {y.dtype}, {tuple(y.shape[1:])} a task, where {head!r} is given "
                f"{tuple(f.shape[1:])}; leave it out"
            )
        of_class = (y[..., None] == torch.arange(phi[weight].shape[1], device=y.device)).to(f)
        c = of_class.mT @ f / of_class.sum(1).clamp(min=1)[..., None]
        return {weight: 2 * c, bias: -(c * c).sum(-1)}
