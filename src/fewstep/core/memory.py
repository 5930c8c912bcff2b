"""How much memory graphs take, and how to stay within a budget."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass
from typing import Self

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fewstep.core.algorithm import Algorithm
from fewstep.core.errors import InputError
from fewstep.core.learner import MetaLearner
from fewstep.core.ranks import ALONE
from fewstep.core.tasks import TaskBatch

_MARGIN = 1.5  # for what a backward pass needs beside the graph
_MIB = 2**20


class GraphMemory:
    """Counts what the autograd graphs made within it hold, at most, in bytes.

    Memory that several nodes share counts once. What they hold and the process would hold anyway,
    such as parameters and data, counts too.

    Attributes:
        now: Bytes held at this moment.
        peak: Bytes held at once, at most.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._held: Counter[int] = Counter()
        self._hooks = saved_tensors_hooks(lambda t: _Held(self, t), lambda held: held.tensor)

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        self._hooks.__exit__(*args)

    def _count(self, tensor: Tensor, by: int) -> None:
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        was = self._held[pointer] > 0
        self._held[pointer] += by
        is_held = self._held[pointer] > 0
        self.now += (is_held - was) * storage.nbytes()
        self.peak = max(self.peak, self.now)


class _Held:
    """A tensor for as long as a graph holds it."""

    def __init__(self, count: GraphMemory, tensor: Tensor) -> None:
        self.tensor, self._memory = tensor, count
        count._count(tensor, 1)

    def __del__(self) -> None:
        self._memory._count(self.tensor, -1)


@dataclass(frozen=True)
class Plan:
    """How to compute a meta-gradient within a budget.

    Args:
        chunk_size: Tasks at once.
        checkpoint_every: As in `MetaLearner`.
        mib: Memory that it takes, as measured, in MiB.
    """

    chunk_size: int
    checkpoint_every: int | None
    mib: float


def plan_memory(
    learner: MetaLearner, batch: TaskBatch, budget_mib: float, *, num_iterations: int = 1
) -> Plan:
    """Choose chunk size and checkpoints so that a meta-gradient fits into a budget, and set them.

    Measures the graph of two tasks, with all steps and with one at a time. Takes the largest chunk
    with all steps if at least 4 tasks (or all there are) fit, else with one step at a time: small
    chunks are slow, checkpoints take more time with more steps.

    Args:
        learner: Its `chunk_size` and `checkpoint_every` are set.
        batch: Tasks such as it will see.
        budget_mib: MiB for graphs and what the backward pass needs beside them, estimated as half
            as much again; parameters, data and the program itself come on top.
        num_iterations: Of the training, whose schedules change what a graph holds; the worst of
            its phases counts.

    Raises:
        InputError: one task with one step at a time needs more, or the budget is not finite.
    """
    if not math.isfinite(budget_mib):
        raise InputError(f"memory budget of {budget_mib:g} MiB must be finite; give a number")
    tasks = len(batch)
    some = batch.batch(0, min(2, tasks))  # of one task alone, more memory is shared
    iterations = _phases(learner.algorithm, num_iterations)
    for checkpoint_every in (None, 1):
        most = max(_graph_mib(learner, some, i, checkpoint_every) for i in iterations)
        each = _MARGIN * most / len(some)
        chunk_size = min(tasks, int(budget_mib / each))
        if chunk_size >= (min(4, tasks) if checkpoint_every is None else 1):
            learner.chunk_size, learner.checkpoint_every = chunk_size, checkpoint_every
            return Plan(chunk_size, checkpoint_every, each * chunk_size)
    raise InputError(
        f"memory budget of {budget_mib:g} MiB is below the {each:.3g} MiB that one task with one "
        "step at a time takes; give more, or use a smaller network or fewer examples"
    )


def _phases(algorithm: Algorithm, num_iterations: int) -> list[int]:
    """Return the first iterations with graphs of each kind."""
    first: dict[tuple[int, tuple[bool, ...]], int] = {}
    for iteration in range(max(1, num_iterations)):
        epoch = iteration / algorithm.iterations_per_epoch
        weights = algorithm.weights_at(epoch)
        kind = algorithm.order_at(epoch), tuple(weight != 0 for weight in weights)
        first.setdefault(kind, iteration)
    return list(first.values())


def _graph_mib(
    learner: MetaLearner, tasks: TaskBatch, iteration: int, checkpoint_every: int | None
) -> float:
    measured = copy.copy(learner)  # shares all but these
    measured.iteration, measured.checkpoint_every = iteration, checkpoint_every
    measured.chunk_size, measured.ranks = len(tasks), ALONE  # all of them at once, and here
    measured._replay = None  # which would make no graph
    with GraphMemory() as memory:
        measured.meta_gradient(tasks)
    return memory.peak / _MIB
