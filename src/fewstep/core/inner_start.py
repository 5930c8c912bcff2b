"""Slot s: where a task's inner loop starts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.errors import InputError
from fewstep.core.modules import last_layer


@dataclass(frozen=True)
class SupportSets:
    """What a start may look at.

    Args:
        x: Inputs, (tasks, examples, ...).
        y: Targets, (tasks, examples, ...).
        is_training: Whether this is training, or a test.
    """

    x: Tensor
    y: Tensor
    is_training: bool
    _inputs_of: Callable[[str, dict[str, Tensor], bool], Tensor]
    _gradient: Callable[[dict[str, Tensor]], dict[str, Tensor]]

    def inputs_of(
        self, part: str, instead: Mapping[str, Tensor] | None = None, *, is_last: bool = False
    ) -> Tensor:
        """Return what a part of the module is given when that is called on x, (tasks, ...).

        Derivatives go through it. Normalisation is that of the support sets; buffers stay.

        Args:
            part: Its name in the module.
            instead: Parameters that take the place of phi's in the call, each (tasks, *shape).
            is_last: The part must be the one whose outputs the module returns.

        Raises:
            InputError: no part has this name, the module does not call it once with a tensor, or it
                is not the last.
        """
        return self._inputs_of(part, dict(instead or {}), is_last)

    def gradient(self, instead: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the support gradient by the adapted parameters, each (tasks, *shape), unclipped.

        A constant in the first order.

        Args:
            instead: Parameters that take the place of phi's, each (tasks, *shape).

        Raises:
            InputError: an adapted parameter does not take part in a support loss.
        """
        return self._gradient(dict(instead or {}))


class InnerStart(ABC):
    """Slot s. Pure: what it learns is its table.

    theta[0] = s(phi, support set; table)

    Derivatives go through it, in the first order, too, whose inner gradients alone are constants.
    A subclass that learns nothing leaves out `table`. It may be called twice for the same tasks,
    and without a graph, so that a network of its own has neither buffers nor dropout, and what it
    differentiates itself is by `torch.func`. What it gives for a frozen parameter counts, too.
    """

    def table(self, phi: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the initial values of what is learned, by names of its own.

        Args:
            phi: The module's parameters, each (*shape), or (rows, *shape) where normalisation has
                some for each step.
        """
        return {}

    @abstractmethod
    def __call__(
        self, phi: Mapping[str, Tensor], support: SupportSets, table: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the parameters that do not start as phi has them, in the shapes of phi.

        Args:
            phi: The module's parameters, each (tasks, *shape), or (tasks, rows, *shape): the same
                for every task.
            support: The support sets.
            table: What is learned.
        """


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

    c[n] = mean of the features f of class n;  w[n] = 2 (c[n] - m),  b[n] = |m|^2 - |c[n]|^2,

    so that w[n] . f + b[n] = |f - m|^2 - |f - c[n]|^2, of which |f - m|^2 is the same for all
    classes: their probabilities, and gradients of the cross-entropy, are those of any m. m, the
    mean of the c, keeps the numbers small. A class without support examples has its mean at 0.
    phi's own head is not used, and not learned.

    Args:
        head: Name of the linear layer, with a bias, that gives the scores; None takes the layer of
            the module's last parameter.

    Raises:
        InputError: when a learner is made: there is no such layer; when it is called: the targets
            are not one class for each example.

    Reference: Snell, Swersky and Zemel, Prototypical networks for few-shot learning, NeurIPS 2017,
        arXiv:1703.05175, section 2.4; then adapted: Triantafillou et al., Meta-Dataset, ICLR 2020,
        arXiv:1903.03096 (Proto-MAML).
    """

    head: str | None = None

    def table(self, phi: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return nothing, if there is such a layer."""
        weight, bias = self._names(phi)
        if not {weight, bias} <= phi.keys() or phi[weight].ndim != 2:
            raise InputError(
                f"PrototypeStart(head={self.head!r}) needs a linear layer with a bias, among "
                f"{', '.join(phi)}; name it, without '.weight', as PrototypeStart's head"
            )
        return {}

    def __call__(
        self, phi: Mapping[str, Tensor], support: SupportSets, table: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the head's weight and bias."""
        weight, bias = self._names(phi)
        head = weight.rpartition(".")[0]
        f, y = support.inputs_of(head, is_last=self.head is None), support.y
        if y.is_floating_point() or y.shape != f.shape[:2] or f.ndim != 3:
            raise InputError(
                f"PrototypeStart needs the number of a class for each support example, and targets "
                f"are {y.dtype}, {tuple(y.shape[1:])} a task, where {head!r} is given "
                f"{tuple(f.shape[1:])}; leave it out"
            )
        of_class = (y[..., None] == torch.arange(phi[weight].shape[1], device=y.device)).to(f)
        c = of_class.mT @ f / of_class.sum(1).clamp(min=1)[..., None]
        m = c.mean(1, keepdim=True)
        return {weight: 2 * (c - m), bias: ((m - c) * (m + c)).sum(-1)}

    def _names(self, phi: Mapping[str, Tensor]) -> tuple[str, str]:
        """Return the names of the head's weight and bias."""
        head = last_layer(phi) if self.head is None else self.head
        path = f"{head}." if head else ""
        return f"{path}weight", f"{path}bias"
