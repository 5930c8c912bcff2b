"""What one meta-gradient saw."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """Losses and metric of every task; tensors on the device, so that reading them is a choice.

    Args:
        metric_name: "accuracy", "loss" or the name of the metric given to the learner.
        task_loss: Meta-loss of every task, (tasks,).
        task_metric: Metric on the query set at the last point that counts, (tasks,).
        support_loss: Support losses that the steps descended, (tasks, num_steps).
        query_loss: Query losses at the points that count, (tasks, points).
        gradient_norm: Euclidean norm of the meta-gradient, a scalar.
    """

    metric_name: str
    task_loss: Tensor
    task_metric: Tensor
    support_loss: Tensor
    query_loss: Tensor
    gradient_norm: Tensor

    @property
    def loss(self) -> Tensor:
        """The mean over the tasks of their terms of the meta-loss, a scalar."""
        return self.task_loss.mean()

    @property
    def metric(self) -> Tensor:
        """The metric, mean over the tasks, a scalar."""
        return self.task_metric.mean()

    @property
    def is_finite(self) -> Tensor:
        """Whether every loss and the meta-gradient are finite, a scalar."""
        of_losses = self.support_loss.isfinite().all() & self.query_loss.isfinite().all()
        return of_losses & self.gradient_norm.isfinite()

    def check_finite(self) -> None:
        """Raise at the first loss that is not finite, or if the meta-gradient is not.

        Raises:
            FloatingPointError: names the task of the batch and the inner step.
        """
        for name, losses in (("support", self.support_loss), ("query", self.query_loss)):
            if not losses.isfinite().all():
                task, step = (~losses.isfinite()).nonzero()[0].tolist()
                where = f"at step {step}" if name == "support" else "after the inner steps"
                raise FloatingPointError(
                    f"the {name} loss of task {task} {where} is {losses[task, step].item()}"
                )
        if not self.gradient_norm.isfinite():
            raise FloatingPointError(
                f"the norm of the meta-gradient is {self.gradient_norm.item()}, though every loss "
                "is finite"
            )
