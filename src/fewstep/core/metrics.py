"""What one meta-gradient saw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.ranks import Ranks


@dataclass(frozen=True)
class Metrics:
    """Losses and metric of every task; tensors on the device, so that reading them is a choice.

    Args:
        metric_name: "accuracy", "loss" or the name of the metric given to the learner.
        task_loss: Meta-loss of every task, (tasks,).
        task_metric: Metric on the query set at the last point that counts, (tasks,).
        support_loss: Support losses that the steps descended, (tasks, num_steps).
        query_loss: Query losses at the points that count, (tasks, points).
    """

    metric_name: str
    task_loss: Tensor
    task_metric: Tensor
    support_loss: Tensor
    query_loss: Tensor

    @property
    def loss(self) -> Tensor:
        """The meta-loss, a scalar."""
        return self.task_loss.mean()

    @property
    def metric(self) -> Tensor:
        """The metric, mean over the tasks, a scalar."""
        return self.task_metric.mean()

    @classmethod
    def cat(cls, chunks: list[Metrics]) -> Metrics:
        """Join the metrics of several chunks of one batch."""
        columns = zip(*(c._tensors() for c in chunks), strict=True)
        return cls(chunks[0].metric_name, *(torch.cat(column) for column in columns))

    def join(self, ranks: Ranks, tasks: int) -> Metrics:
        """Join those of the processes that share a batch of so many tasks."""
        return Metrics(self.metric_name, *ranks.join(list(self._tensors()), tasks))

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.task_loss, self.task_metric, self.support_loss, self.query_loss

    def check_finite(self) -> None:
        """Raise at the first loss that is not finite.

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
