"""The inner loop cut into segments of steps, so that one segment's graph is kept at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewstep.core.allocator import return_freed_memory
from fewstep.core.inner import InnerLoop, Point
from fewstep.core.modules import generators_of
from fewstep.core.tasks import TaskBatch


class Segment(NamedTuple):
    """Steps to take from a point, and after which of them the query loss counts."""

    start: Point
    stop: int
    counting: list[int]


def segments_backwards(
    loop: InnerLoop, tasks: TaskBatch, counting: tuple[int, ...], checkpoint_every: int | None
) -> Iterator[Segment]:
    """Yield the last segment of the inner loop, the one before, ..., the first.

    Where a segment starts is found without a graph. While one is worked on, the random state is
    that of an inner loop taken once; afterwards, too.

    Args:
        loop: What takes the steps.
        tasks: The tasks.
        counting: Steps whose query loss counts.
        checkpoint_every: Steps of a segment; None is one segment of all.
    """
    num_steps = loop.algorithm.num_steps
    starts = range(0, max(num_steps, 1), checkpoint_every or max(num_steps, 1))
    several = len(starts) > 1
    first = _Start(loop.start(len(tasks)), _RandomState.now(several, loop, tasks))
    after = None
    for start, stop in zip(
        _starts_backwards(loop, tasks, starts, counting, first),
        [num_steps, *reversed(starts[1:])],
        strict=True,
    ):
        start.random.restore()  # dropout does as it did
        if several and tasks.x_support.is_cpu:
            return_freed_memory()  # a fifth less at the peak
        yield Segment(start.point, stop, _between(counting, start.point.step, stop))
        after = after or _RandomState.now(several, loop, tasks)
    if after is not None:
        after.restore()


@dataclass(frozen=True)
class _Start:
    """Where a segment of steps starts, and the random state there."""

    point: Point
    random: _RandomState


def _starts_backwards(
    loop: InnerLoop,
    tasks: TaskBatch,
    steps: Sequence[int],
    counting: tuple[int, ...],
    first: _Start,
) -> Iterator[_Start]:
    """Yield the start of the last segment, of the one before, ..., of the first.

    Halving keeps log2 of them at a time; each is walked to again from the nearest one kept.

    Args:
        loop: What walks.
        tasks: The tasks.
        steps: Where segments start.
        counting: Steps whose query loss counts.
        first: The start at steps[0].
    """
    if len(steps) == 1:
        yield first
        return
    half = len(steps) // 2
    yield from _starts_backwards(
        loop, tasks, steps[half:], counting, _walk(loop, tasks, first, steps[half], counting)
    )
    yield from _starts_backwards(loop, tasks, steps[:half], counting, first)


def _walk(
    loop: InnerLoop, tasks: TaskBatch, start: _Start, step: int, counting: tuple[int, ...]
) -> _Start:
    """Return the start at a later step, without a graph."""
    start.random.restore()
    with torch.no_grad():
        for point in loop.trajectory(
            tasks,
            step,
            derivative_order=1,
            query_after=_between(counting, start.point.step, step),  # they change buffers
            start=start.point,
        ):
            reached = point.bare()
    return _Start(reached, _RandomState.now(True, loop, tasks))


def _between(counting: tuple[int, ...], start: int, stop: int) -> list[int]:
    """Return the counting steps of a segment: those after its start, and step 0."""
    return [k for k in counting if start < k <= stop or k == start == 0]


@dataclass(frozen=True)
class _RandomState:
    """The state of the generators that modules draw from, where steps are taken twice."""

    cpu: Tensor | None = None
    cuda: tuple[torch.device, Tensor] | None = None
    own: tuple[tuple[torch.Generator, Tensor], ...] = ()  # that the module keeps
    others: tuple[Any, Any] | None = None  # Python's and NumPy's

    @classmethod
    def now(cls, needed: bool, loop: InnerLoop, tasks: TaskBatch) -> _RandomState:
        if not needed:
            return cls()
        device = tasks.x_support.device
        algorithm = loop.algorithm
        kept = generators_of([algorithm.inner_start, algorithm.inner_step])
        return cls(
            torch.get_rng_state(),
            (device, torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
            tuple((g, g.get_state()) for g in [*loop.network.generators(), *kept]),
            (random.getstate(), np.random.get_state()),  # noqa: NPY002 (modules draw so, not we)
        )

    def restore(self) -> None:
        if self.cpu is not None:
            torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            device, state = self.cuda
            torch.cuda.set_rng_state(state, device)
        if self.others is not None:
            of_python, of_numpy = self.others
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002
        for generator, state in self.own:
            generator.set_state(state)
