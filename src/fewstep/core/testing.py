"""Testing: adaptation to many tasks, and what their query sets give after every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fewstep.core.inner import InnerLoop
from fewstep.core.network import Result
from fewstep.core.norm import Use
from fewstep.core.once import one_batch
from fewstep.core.replay import Replay
from fewstep.core.tasks import Episodes, TaskBatch

Read = Callable[[list[Result]], Tensor]


def test(
    loop: InnerLoop,
    episodes: Episodes,
    numbers: slice,
    num_steps: int,
    *,
    use: Use,
    read: Read,
    chunk_size: int,
    replay: Replay | None,
) -> Tensor:
    """Adapt to the tasks of these numbers, by the chunk, without a graph from step to step.

    Args:
        loop: What adapts.
        episodes: Gives task i.
        numbers: Which tasks.
        num_steps: Inner steps.
        use: What batch normalisation normalises by.
        read: Makes (tasks, ...) of the query results after 0, 1, ... steps.
        chunk_size: Tasks that go through the module at once.
        replay: Recordings of the same; None computes it anew.

    Returns:
        What `read` makes, of all the tasks.
    """

    @one_batch()
    def adapt(*tensors: Tensor) -> Tensor:
        points = loop.trajectory(
            TaskBatch(*tensors), num_steps, derivative_order=1, query_after=range(num_steps + 1)
        )
        return read([p.query for p in points if p.query is not None])

    key = (read, num_steps, use, *map(id, loop.meta.buffers.values()))
    call = adapt if replay is None else partial(replay, adapt, key=key)
    found = []
    with torch.no_grad(), loop.network.mode(is_training=False, use=use):
        for start in range(numbers.start, numbers.stop, chunk_size):
            chunk = episodes.batch(start, min(chunk_size, numbers.stop - start))
            found.append(call(*chunk.tensors()))
    return torch.cat(found)


def losses_and_metrics(queries: list[Result]) -> Tensor:
    """Return them all, (tasks, 2, steps + 1)."""
    return torch.stack([torch.stack([q.loss, q.metric], dim=1) for q in queries], dim=2)


def outputs_of(queries: list[Result]) -> Tensor:
    """Return the outputs, (tasks, steps + 1, examples, ...)."""
    return torch.stack([query.outputs for query in queries], dim=1)
