"""What a module's outputs for one task are judged by: losses and metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fewstep.core.accuracy import accuracy
from fewstep.core.algorithm import Algorithm
from fewstep.core.derivative_order import FixedOrder
from fewstep.core.errors import InputError
from fewstep.core.modules import check_module, under_two_names
from fewstep.core.scores import Scores
from fewstep.core.tensors import below

Loss = Callable[[Tensor, Tensor], Tensor]
SUPPORT_LOSS = "support_loss."


class Judge:
    """The losses of support and query sets, and the metric.

    Args:
        loss: (outputs, targets) of one task to a scalar.
        metric: The same, reported and never differentiated; None takes the accuracy where targets
            are integers and the loss elsewhere.
        support_loss: What the inner loop descends; None takes the loss. A module with parameters
            that require a gradient is learned, as "support_loss.*".

    Attributes:
        learned_loss: The support loss, if it is learned.

    Raises:
        InputError: one is no function, or a learned one has buffers or a part under two names;
            when it is called: it returns no real scalar.
    """

    def __init__(self, loss: Loss, metric: Loss | None, support_loss: Loss | None) -> None:
        self.loss, self.metric = loss, metric
        self.support_loss = loss if support_loss is None else support_loss
        for what in ("loss", "metric", "support_loss"):
            function = getattr(self, what)
            is_left_out = function is None and what != "loss"
            if isinstance(function, type) or not (is_left_out or callable(function)):
                name = getattr(function, "__name__", function)
                raise InputError(
                    f"{what}={name} must be a function of outputs and targets, such as "
                    "torch.nn.functional.mse_loss or an instance of torch.nn.MSELoss"
                )
        self.learned_loss: nn.Module | None = None
        if isinstance(support_loss, nn.Module) and _is_trained(support_loss):
            _check_learned(support_loss)
            self.learned_loss = support_loss

    def check_learnable(self, algorithm: Algorithm) -> None:
        """Check that the algorithm has what a learned support loss is learned through.

        Raises:
            InputError: it takes no step, or none of the second order.
        """
        is_first_order = algorithm.derivative_order == FixedOrder(1)
        if self.learned_loss is not None and (is_first_order or algorithm.num_steps == 0):
            raise InputError(
                f"{type(self.learned_loss).__name__} has parameters, which are learned through the "
                "second derivative of inner steps; take a step and derivative_order=FixedOrder(2), "
                "or freeze them by .requires_grad_(False)"
            )

    def functions(self) -> list[Loss]:
        """Return its losses and its metric."""
        return [f for f in (self.loss, self.metric, self.support_loss) if f is not None]

    def modules(self) -> list[nn.Module]:
        """Return those of its functions that are modules."""
        return [f for f in self.functions() if isinstance(f, nn.Module)]

    def buffers(self) -> list[Tensor]:
        """Return what its functions read besides parameters."""
        return list(chain.from_iterable(module.buffers() for module in self.modules()))

    def support(
        self, outputs: Tensor, y: Tensor, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the loss that the inner loop descends, twice: nobody reads a metric there.

        Args:
            outputs: Of one task.
            y: Its targets.
            tensors: What is learned of the loss, among others.
        """
        if self.learned_loss is None:
            found: object = self.support_loss(outputs, y)
        else:
            own = below(tensors, SUPPORT_LOSS)
            found = functional_call(self.learned_loss, own, (outputs, y))
        loss = _scalar("loss" if self.support_loss is self.loss else "support loss", found)
        return loss, loss.detach()

    def query(
        self, outputs: Tensor, y: Tensor, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return loss and metric, as they are reported.

        Args:
            outputs: Of one task.
            y: Its targets.
            tensors: Not read: the query loss cannot be learned.
        """
        loss = _scalar("loss", self.loss(outputs, y))
        return loss, self._measure(outputs.detach(), y)

    def loss_and_metric(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and metric, each (tasks, steps), of outputs (tasks, steps, examples, ...)."""
        pairs = [
            [(self.loss(o, targets), self._measure(o, targets)) for o in of_task]
            for of_task, targets in zip(outputs, y, strict=True)
        ]
        stacked = torch.stack([torch.stack([torch.stack(p) for p in row]) for row in pairs])
        return stacked[..., 0], stacked[..., 1]

    def scores(
        self,
        loss: Tensor,
        metric: Tensor,
        targets: Tensor,
        statistics: str,
        after: tuple[int, ...],
    ) -> Scores:
        """Return scores of tasks with such targets.

        Raises:
            InputError: no target of a task counts, so that it has no accuracy.
        """
        undefined = metric[:, -1].isnan()
        if self._metric_for(targets) is accuracy and undefined.any():
            raise InputError(
                f"the query set of task {int(undefined.nonzero()[0])} has no target that counts, "
                "and so no accuracy; leave the task out"
            )
        return Scores(self.metric_name(targets), metric.cpu(), loss.cpu(), statistics, after)

    def metric_name(self, targets: Tensor) -> str:
        """Name the metric that is reported for such targets."""
        metric = self._metric_for(targets)
        return "loss" if metric is self.loss else getattr(metric, "__name__", "metric")

    def _metric_for(self, targets: Tensor) -> Loss:
        return self.metric or (self.loss if targets.is_floating_point() else accuracy)

    def _measure(self, outputs: Tensor, y: Tensor) -> Tensor:
        return _scalar("metric", self._metric_for(y)(outputs, y)).to(outputs.dtype.to_real())


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _check_learned(loss: nn.Module) -> None:
    check_module(loss)
    kind = type(loss).__name__
    if name := next((n for n, _ in loss.named_buffers()), None):
        raise InputError(
            f"`{name}` of {kind} is a buffer, which a loss that is learned may not have; keep "
            "constants as plain attributes, and normalise by nn.LayerNorm"
        )
    if again := under_two_names(loss):
        raise InputError(
            f"a {type(again[0]).__name__} of {kind} has two names, which a part of a loss that is "
            "learned may not have; register it once"
        )


def _scalar(what: str, found: object) -> Tensor:
    if isinstance(found, Tensor) and found.ndim == 0 and not found.is_complex():
        return found
    kind = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    raise InputError(
        f"the {what} returned {kind} for one task; it must return a real scalar tensor, for "
        "instance the mean over the examples"
    )
