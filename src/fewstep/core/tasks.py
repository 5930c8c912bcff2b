"""A batch of few-shot tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.core.errors import InputError

View = Callable[[Tensor], Tensor]


def as_they_are(x: Tensor) -> Tensor:
    """Return the same inputs: the view that changes nothing."""
    return x


@dataclass(frozen=True)
class TaskBatch:
    """Support and query sets of several tasks, stacked along a leading task dimension.

    A model adapts to a task on its support set and is judged on its query set.

    Args:
        x_support: Inputs to adapt on, (tasks, support examples, ...).
        y_support: Their targets, (tasks, support examples, ...).
        x_query: Inputs to judge by, (tasks, query examples, ...).
        y_query: Their targets, (tasks, query examples, ...).

    Raises:
        InputError: one of the four is no tensor; they do not share the number of tasks; inputs and
            targets of one set differ in their number of examples; there are no tasks or examples.
    """

    x_support: Tensor
    y_support: Tensor
    x_query: Tensor
    y_query: Tensor

    def __post_init__(self) -> None:
        for name, given in vars(self).items():
            if not isinstance(given, Tensor):
                raise InputError(
                    f"{name} is a {type(given).__name__}; pass one tensor for all tasks, "
                    "torch.as_tensor of an array; for several inputs see docs/own-model.md"
                )
        for name, x, y in (
            ("support", self.x_support, self.y_support),
            ("query", self.x_query, self.y_query),
        ):
            if x.ndim < 2 or y.ndim < 2 or x.shape[:2] != y.shape[:2]:
                raise InputError(
                    f"x_{name} {tuple(x.shape)} and y_{name} {tuple(y.shape)} must begin with the "
                    "same (tasks, examples); add a leading task dimension with x[None] if missing"
                )
            if 0 in x.shape[:2]:
                raise InputError(
                    f"x_{name} {tuple(x.shape)} holds {x.shape[0]} tasks of {x.shape[1]} examples; "
                    "give at least one of each"
                )
        if self.x_support.shape[0] != self.x_query.shape[0]:
            raise InputError(
                f"x_support holds {self.x_support.shape[0]} tasks and x_query "
                f"{self.x_query.shape[0]}; every task needs both sets"
            )

    def __len__(self) -> int:
        """Return the number of tasks."""
        return self.x_support.shape[0]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x_support, y_support, x_query and y_query."""
        return self.x_support, self.y_support, self.x_query, self.y_query

    def split(self, tasks: int) -> list[TaskBatch]:
        """Cut into batches of at most `tasks` tasks, in order."""
        if len(self) <= tasks:
            return [self]
        parts = [torch.split(t, tasks) for t in self.tensors()]
        return [TaskBatch(*chunk) for chunk in zip(*parts, strict=True)]

    def seen(self, view: View) -> TaskBatch:
        """Return the same tasks with their inputs changed, those of both sets alike."""
        x_support, y_support, x_query, y_query = self.tensors()
        return TaskBatch(view(x_support), y_support, view(x_query), y_query)

    def to(self, device: torch.device | str) -> TaskBatch:
        """Return the same tasks on `device`."""
        # On its way to the CPU nothing would wait for it.
        waits = torch.device(device).type == "cpu"
        return TaskBatch(*(t.to(device, non_blocking=not waits) for t in self.tensors()))

    def batch(self, start: int, count: int) -> TaskBatch:
        """Return `count` tasks from number `start` on, so that a batch serves as `Episodes`."""
        if not 0 <= start < start + count <= len(self):
            raise InputError(
                f"{count} tasks from {start} on were asked of a batch of {len(self)}; "
                f"ask for tasks 0 to {len(self) - 1}"
            )
        return TaskBatch(*(t[start : start + count] for t in self.tensors()))


class Episodes(Protocol):
    """A source of tasks, in which task i is always the same."""

    def batch(self, start: int, count: int) -> TaskBatch:
        """Return tasks start, ..., start + count - 1."""
        ...


def tasks_of(episodes: Episodes, start: int, count: int) -> TaskBatch:
    """Return tasks start, ..., start + count - 1 of a source.

    Raises:
        InputError: it gives something else, or another number of them.
    """
    batch: object = episodes.batch(start, count)
    if not isinstance(batch, TaskBatch) or len(batch) != count:
        given = f"{len(batch)} tasks" if isinstance(batch, TaskBatch) else type(batch).__name__
        raise InputError(
            f"episodes.batch(start={start}, count={count}) gave {given}; it must give a TaskBatch "
            f"of {count}"
        )
    return batch
