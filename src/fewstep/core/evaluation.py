"""Evaluation: adaptation to many tasks, and what their query sets give on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fewstep.core.errors import InputError
from fewstep.core.inner import InnerLoop
from fewstep.core.network import Result
from fewstep.core.norm import Use
from fewstep.core.once import one_batch
from fewstep.core.replay import Replay
from fewstep.core.tasks import Episodes, TaskBatch, tasks_of

Reduce = Callable[[list[Result]], Tensor]


def adapt_and_query(
    loop: InnerLoop,
    episodes: Episodes,
    numbers: slice,
    query_after: Sequence[int],
    *,
    use: Use,
    reduce: Reduce,
    chunk_size: int,
    replay: Replay | None,
) -> tuple[Tensor, Tensor]:
    """Adapt to the tasks of these numbers, by the chunk, without a graph from step to step.

    Args:
        loop: What adapts.
        episodes: Gives task i.
        numbers: Which tasks.
        query_after: After how many inner steps to call on the query sets; the last ends it.
        use: What batch normalisation normalises by.
        reduce: Makes (tasks, ...) of what the query sets gave.
        chunk_size: Tasks that go through the module at once.
        replay: Recordings of the same; None computes it anew.

    Returns:
        What `reduce` makes, of all the tasks, and targets of some.
    """

    @one_batch()
    def adapt(*tensors: Tensor) -> Tensor:
        points = loop.trajectory(
            TaskBatch(*tensors), query_after[-1], derivative_order=1, query_after=query_after
        )
        return reduce([p.query for p in points if p.query is not None])

    found = []
    with torch.no_grad(), loop.mode(is_training=False, use=use):
        key = (reduce, tuple(query_after), use, *loop.outside())
        call = adapt if replay is None else partial(replay, adapt, key=key)
        for start in range(numbers.start, numbers.stop, chunk_size):
            chunk = tasks_of(episodes, start, min(chunk_size, numbers.stop - start))
            found.append(call(*chunk.tensors()))
    if len({t.shape[1:] for t in found}) > 1:
        raise InputError(
            "the query sets of the tasks are of several sizes, whose outputs one tensor cannot "
            "hold; call predict for those of one size at a time"
        )
    return torch.cat(found), chunk.y_query


def losses_and_metrics(queries: list[Result]) -> Tensor:
    """Return them all, (tasks, 2, calls)."""
    return torch.stack([torch.stack([q.loss, q.metric], dim=1) for q in queries], dim=2)


def outputs_of(queries: list[Result]) -> Tensor:
    """Return the outputs, (tasks, calls, examples, ...)."""
    return torch.stack([query.outputs for query in queries], dim=1)
