"""The gradient of the meta-loss: the one pass that every algorithm's training is made of."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import get_total_norm

from fewstep.core.errors import InputError
from fewstep.core.inner import InnerLoop, Point
from fewstep.core.meta_parameters import RATE
from fewstep.core.metrics import Metrics
from fewstep.core.network import Result
from fewstep.core.once import one_batch
from fewstep.core.ranks import Ranks
from fewstep.core.replay import Replay
from fewstep.core.segments import segments_backwards
from fewstep.core.tasks import TaskBatch
from fewstep.core.tensors import Tensors


def meta_gradient(
    loop: InnerLoop,
    batch: TaskBatch,
    epoch: float,
    *,
    chunk_size: int,
    checkpoint_every: int | None,
    ranks: Ranks,
    replay: Replay | None,
) -> tuple[Tensors, Metrics, Tensors]:
    """Return the gradient of the meta-loss by name, what it saw, and the tasks' mean buffers.

    meta-loss = mean (or sum) over tasks of sum_k v[k] * L_query(theta[k])

    Args:
        loop: What to differentiate.
        batch: The tasks.
        epoch: What schedules read.
        chunk_size: Tasks whose graph is kept at once.
        checkpoint_every: Inner steps whose graph is kept at once; None is all of them.
        ranks: The processes that share the batch.
        replay: Recordings of the same; None computes it anew.
    """
    algorithm = loop.algorithm
    v = algorithm.weights_at(epoch)
    counting = tuple(k for k, weight in enumerate(v) if weight != 0)
    like = next(iter(loop.meta.parameters.values()))
    precise = torch.promote_types(like.dtype, torch.float32)
    weights = torch.stack([like.new_full((), v[k], dtype=precise) for k in counting])
    share = {"mean": len(batch), "sum": 1}[algorithm.task_reduction]
    order = algorithm.order_at(epoch)
    if order == 1 and len(counting) < 2:
        checkpoint_every = None  # a step has no graph in order 1, a query set has
    differentiate = partial(
        _differentiate, loop, counting, share=share, order=order, checkpoint_every=checkpoint_every
    )
    with (
        loop.mode(is_training=True, use=algorithm.norm_statistics.use),
        torch.enable_grad(),
    ):
        if replay is not None:
            key = (counting, share, order, checkpoint_every, *loop.outside())
            differentiate = partial(
                replay, differentiate, key=key, may_draw=checkpoint_every is None
            )
        own: list[Tensor] = []  # this process's sum: one copy, of however many chunks
        of_tasks = []
        for chunk in ranks.share(batch).split(chunk_size):
            gradients, each = differentiate(weights, *chunk.tensors())
            own = list(map(torch.add, own, gradients.values())) or list(gradients.values())
            of_tasks.append(each)
    total = dict(zip(gradients, ranks.all_reduce(own), strict=True))
    (by_task, metric, support, query), buffers = _join(
        of_tasks, loop.meta.buffers, len(batch), ranks
    )
    buffers |= _of_length_one({name: buffers[name] for name in loop.meta.units}, loop.meta.buffers)
    name, norm = loop.network.judge.metric_name(batch.y_query), get_total_norm(total.values())
    return total, Metrics(name, by_task, metric, support, query, norm), buffers


class _OfTasks(NamedTuple):
    """What each task of a chunk gives: losses and metric of `Metrics`, and its buffers."""

    metrics: tuple[Tensor, Tensor, Tensor, Tensor]
    buffers: Tensors


@one_batch()
def _differentiate(
    loop: InnerLoop,
    counting: tuple[int, ...],
    weights: Tensor,
    *tensors: Tensor,
    share: int,
    order: int,
    checkpoint_every: int | None,
) -> tuple[Tensors, _OfTasks]:
    """Differentiate a chunk of tasks, one segment of steps after the other, from the last.

    For a segment from step k to step k',
    lambda[k] = d (sum_{k < i <= k'} v[i] L_query(theta[i]) + lambda[k'] . theta[k']) / d theta[k]
    with lambda[K] = 0, and v[0]'s term in the first segment; what an inner step remembers is part
    of theta here. lambda[0], summed over the tasks, is the gradient by phi. One segment of all the
    steps is plain backpropagation; of several, one has a graph at a time.
    """
    tasks = TaskBatch(*tensors)
    v = dict(zip(counting, weights, strict=True))
    meta, num_steps = loop.meta, loop.algorithm.num_steps
    seen = _Seen()
    adjoint: Tensors = {}
    of_parts = {n: torch.zeros_like(t) for n, t in meta.of_parts.items()}
    q = {n: torch.zeros_like(meta.phi[n]) for n in meta.harvested}
    is_learning = False
    for start, stop, here in segments_backwards(loop, tasks, counting, checkpoint_every):
        leaves = start.leaves(meta.phi)
        for point in loop.trajectory(
            tasks, stop, derivative_order=order, query_after=here, start=leaves
        ):
            seen.note(point, meta.harvested)
        if stop == num_steps:
            buffers = point.buffers

        terms, reached = [v[k] * seen.queries[k].loss.sum() / share for k in here], point.carried
        terms += [(each * reached[name]).sum() for name, each in adjoint.items()]
        if terms:  # else nothing counts from here on
            ends = {n: point.theta[n] for n in meta.harvested if stop == num_steps}
            total = torch.stack(terms).sum()
            loop.network.first_calls.check_meta_loss(total, (order, counting, start.step))
            is_learning = is_learning or total.requires_grad
            adjoint, by_parts, by_end = _grad(
                total,
                {n: t for n, t in leaves.carried.items() if t.requires_grad},
                meta.of_parts,
                ends,
            )
            of_parts = {n: t + by_parts[n] for n, t in of_parts.items()}
            q |= by_end

    if not is_learning:
        raise InputError(
            "nothing that is learned takes part in the meta-loss; unfreeze a parameter that does"
        )
    if seen.descent:  # q in place of every lambda
        by_rate = -torch.stack([(q[n] * s).sum() for n, s in seen.descent.items()]).sum()
        of_parts[RATE + "all"] = by_rate
    gradients = {n: adjoint[n].sum(0) for n in meta.learned}
    return gradients | of_parts, _OfTasks(seen.metrics(v), buffers)


class _Seen:
    """What the tasks of a chunk gave on the way."""

    def __init__(self) -> None:
        self.queries: dict[int, Result] = {}
        self.descent: Tensors = {}  # sum_k s[k], the support gradients, where they are harvested
        self._support_losses: dict[int, Tensor] = {}

    def note(self, point: Point, harvested: tuple[str, ...]) -> None:
        """Note a point of the trajectory."""
        if point.query is not None:
            self.queries[point.step] = point.query
        if point.support_loss is not None:
            self._support_losses[point.step] = point.support_loss
            for name in harvested:
                self.descent[name] = self.descent.get(name, 0) + point.gradient[name].detach()

    def metrics(self, v: dict[int, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `Metrics` holds of tasks."""
        query = {k: self.queries[k].loss.detach() for k in v}
        meta_loss = torch.stack([v[k] * loss for k, loss in query.items()]).sum(0)
        support = [loss for _, loss in sorted(self._support_losses.items())]
        return (
            meta_loss,
            self.queries[max(v)].metric,
            torch.stack(support, dim=1) if support else meta_loss.new_empty(len(meta_loss), 0),
            torch.stack(list(query.values()), dim=1),
        )


def _grad(loss: Tensor, *groups: Tensors) -> list[Tensors]:
    """Return d loss / d t for every tensor of every group; its graph is freed."""
    inputs = [t for group in groups for t in group.values()]
    found = iter(
        torch.autograd.grad(loss, inputs, allow_unused=True)
        if loss.requires_grad
        else [None] * len(inputs)
    )
    return [
        {n: torch.zeros_like(t) if (g := next(found)) is None else g for n, t in group.items()}
        for group in groups
    ]


def _join(
    chunks: list[_OfTasks], start: Tensors, tasks: int, ranks: Ranks
) -> tuple[list[Tensor], Tensors]:
    """Put together what the tasks of all processes gave, from the buffers at the start."""
    columns = [_cat(column) for column in zip(*(c.metrics for c in chunks), strict=True)]
    return ranks.gather(columns, tasks), _mean_over_tasks(
        [c.buffers for c in chunks], start, tasks, ranks
    )


def _of_length_one(means: Tensors, start: Tensors) -> Tensors:
    """Return means of unit vectors as such, those that no task changes as they are to the bit."""
    return {n: torch.where(m == start[n], m, F.normalize(m, dim=0)) for n, m in means.items()}


def _cat(tensors: tuple[Tensor, ...]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _mean_over_tasks(parts: list[Tensors], start: Tensors, tasks: int, ranks: Ranks) -> Tensors:
    """Return the buffers' mean over all tasks; counts are those of any task.

    Means of what changed, so that what no task changes stays as it is to the bit.
    """
    own = {name: _cat(tuple(p[name] for p in parts)) for name in parts[0]}
    averaged = [name for name, b in own.items() if b.is_floating_point() or b.is_complex()]
    changes = [torch.where(own[n] == start[n], 0, own[n] - start[n]) for n in averaged]
    sums = ranks.all_reduce([change.sum(0) for change in changes])
    means = {n: start[n] + total / tasks for n, total in zip(averaged, sums, strict=True)}
    return {name: means[name] if name in means else b[0] for name, b in own.items()}
