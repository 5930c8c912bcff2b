"""The inner loop: adaptation of a batch of tasks, step by step."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from types import MappingProxyType

import torch
from torch import Tensor

from fewstep.core.algorithm import Algorithm
from fewstep.core.errors import InputError, check_fits
from fewstep.core.inner_start import SupportSets
from fewstep.core.meta_parameters import MetaParameters
from fewstep.core.network import Result, TaskNetwork
from fewstep.core.norm import Use
from fewstep.core.replay import Same
from fewstep.core.tasks import TaskBatch
from fewstep.core.tensors import Tensors

_OF_TASKS = (
    ", tasks first; a rate or a factor for each task needs a dimension of 1 for each of the "
    "parameter's"
)


@dataclass(frozen=True)
class Point:
    """One point of the trajectory of a batch of tasks.

    Args:
        step: k, how many inner steps led here.
        theta: Parameters after them, each (tasks, *shape).
        buffers: Buffers after them, each (tasks, *shape).
        support_loss: The support loss that the last of them descended, (tasks,); none at the start.
        gradient: What that step followed, its gradient clipped, each (tasks, *shape); empty at the
            start.
        query: What the query sets gave here, where they were asked for.
        state: What the inner step remembers, each (tasks, ...).
        given: The parameters that the start made, frozen ones, too.
    """

    step: int
    theta: Tensors
    buffers: Tensors
    support_loss: Tensor | None
    gradient: Tensors
    query: Result | None
    state: Tensors
    given: frozenset[str] = frozenset()

    @property
    def carried(self) -> Tensors:
        """All that a derivative goes through from here on."""
        state = {f".{n}": t for n, t in self.state.items() if t.is_floating_point()}
        return self.theta | state  # no parameter's name begins with a dot

    def bare(self) -> Point:
        """Return the same point without what led to it and what was asked of it."""
        return replace(self, support_loss=None, gradient={}, query=None)

    def leaves(self, trained: Container[str]) -> Point:
        """Return the same point, which knows nothing of how it came about."""
        return replace(
            self,
            theta={
                n: t.detach().requires_grad_(n in trained or n in self.given)
                for n, t in self.theta.items()
            },
            state={
                n: t.detach().requires_grad_(t.is_floating_point()) for n, t in self.state.items()
            },
        )


@dataclass(frozen=True)
class InnerLoop:
    """A module, what training changes of it, and the parts that say how it adapts."""

    network: TaskNetwork
    meta: MetaParameters
    algorithm: Algorithm

    @contextmanager
    def mode(self, *, is_training: bool, use: Use) -> Iterator[None]:
        """Set the module's mode, as `TaskNetwork.mode` does, if it is still the one we know.

        Raises:
            InputError: its parameters are others.
        """
        with self.network.alone():
            self.meta.known.check_unchanged()
            with self.network.mode(is_training=is_training, use=use):
                yield

    def outside(self) -> list[Same]:
        """Return what a recording closes over.

        Parts of the module and their hooks; buffers of the module, the loss and the metric.
        """
        buffers = chain(self.meta.buffers.values(), self.network.judge.buffers())
        parts = self.network.parts()
        hooks = ((*p._forward_pre_hooks.values(), *p._forward_hooks.values()) for p in parts)
        return [Same(each) for each in chain(parts, *hooks, buffers)]

    def start(self, tasks: int) -> Point:
        """Return phi and its buffers, the same for every task: where a trajectory begins."""
        return Point(0, self.meta.theta(tasks), self.meta.buffers_of(tasks), None, {}, None, {})

    def trajectory(
        self,
        batch: TaskBatch,
        num_steps: int,
        *,
        derivative_order: int,
        query_after: Container[int] = (),
        start: Point | None = None,
    ) -> Iterator[Point]:
        """Yield theta[0], or a later point to begin with, to theta[num_steps] of a batch of tasks.

        theta[0] = s(phi, support set)
        theta[k+1] = u(theta[k], grad L_support(theta[k]), alpha[k])

        Args:
            batch: The tasks.
            num_steps: The step to stop at.
            derivative_order: 2 keeps the graph of the inner gradients; 1 keeps none. Under
                `torch.no_grad` with order 1, nothing outlives a step.
            query_after: After how many steps to call on the query sets.
            start: Where to begin: with phi, as `start` gives it, or with a later point.

        Raises:
            InputError: an adapted parameter does not take part in any support loss, or a part gave
                what has another shape.
        """
        point = self.start(len(batch)) if start is None else start.bare()
        if point.step == 0:
            point = self._started(point, batch, derivative_order)
        for step in range(point.step, num_steps + 1):
            if step in query_after:
                point = self._queried(point, batch)
            yield point
            if step < num_steps:
                point = self._stepped(point, batch, derivative_order)

    def _started(self, point: Point, batch: TaskBatch, order: int) -> Point:
        """Return theta[0] = s(phi, support set), and the state of the first step."""
        found = self._initial(point.theta, point.buffers, batch, order)
        theta = point.theta | found
        here = {n: theta[n] for n in self.meta.adapted}
        state = _checked(self.algorithm.inner_step.start(here))
        return replace(point, theta=theta, state=state, given=frozenset(found))

    def _queried(self, point: Point, batch: TaskBatch) -> Point:
        """Return the same point with what the query sets give there."""
        rows, step = self.meta.rows, point.step
        query = self.network.query(
            rows.pick_parameters(point.theta, step, is_query=True),
            rows.pick_buffers(point.buffers, step),
            batch,
            is_last=step == self.algorithm.num_steps,
        )
        buffers = rows.put_buffers(point.buffers, step, query.buffers)
        return replace(point, query=query, buffers=buffers)

    def _stepped(self, point: Point, batch: TaskBatch, order: int) -> Point:
        """Return theta[k+1] = u(theta[k], grad L_support(theta[k]), alpha[k])."""
        theta, step = point.theta, point.step
        support, gradient = self._gradient(theta, point.buffers, batch, step, order)
        here = {n: theta[n] for n in self.meta.adapted}
        gradient = self.algorithm.inner_clipping(gradient)
        check_fits("inner_clipping gave", gradient, here, _OF_TASKS)
        after, state = self._step(here, gradient, point.state, step)
        buffers = self.meta.rows.put_buffers(point.buffers, step, support.buffers)
        loss = support.loss.detach()
        return Point(step + 1, theta | after, buffers, loss, gradient, None, state, point.given)

    def _gradient(
        self, theta: Tensors, buffers: Tensors, batch: TaskBatch, step: int, order: int
    ) -> tuple[Result, Tensors]:
        """Return what the support sets give, and the gradient by what is adapted."""
        with torch.enable_grad():
            # Order 1 differentiates at a copy that knows nothing of how theta[k] came about.
            at = (_apart if order == 2 else _leaves)(theta, self.meta.adapted)
            support = self.network.support(
                self.meta.rows.pick_parameters(at, step, is_query=False),
                self.meta.rows.pick_buffers(buffers, step),
                batch,
            )
            loss = support.loss.sum()
            self.network.first_calls.check_support_loss(loss, order, theta.values())
            here = {n: at[n] for n in self.meta.adapted}
            return support, _differentiated(support.loss, here, order)

    def _initial(self, phi: Tensors, buffers: Tensors, batch: TaskBatch, order: int) -> Tensors:
        """Return the parameters whose start is another than phi.

        Raises:
            InputError: the part gives something else, or changes what it was given.
        """
        part, meta, x, y = self.algorithm.inner_start, self.meta, batch.x_support, batch.y_support

        def inputs_of(name: str, instead: Tensors, is_last: bool) -> Tensor:
            at = meta.rows.pick_parameters(phi | instead, 0, is_query=False)
            here = meta.rows.pick_buffers(buffers, 0)
            return self.network.inputs_of(name, at, here, x, is_last=is_last)

        def gradient(instead: Tensors) -> Tensors:
            return self._gradient(phi | instead, buffers, batch, 0, order)[1]

        support = SupportSets(x, y, self.network.is_training, inputs_of, gradient)
        of_module = {n: phi[n] for n, _ in self.network.module.named_parameters()}
        with _unchanged("inner_start", part, of_module, {"x": x, "y": y}, meta.start_table):
            found = part(dict(of_module), support, MappingProxyType(meta.start_table))
        check_fits("inner_start gave", found, of_module, may_lack=True)
        return {n: t.type_as(phi[n]) for n, t in found.items()}

    def _step(
        self, theta: Tensors, gradient: Tensors, state: Tensors, step: int
    ) -> tuple[Tensors, Tensors]:
        """Return the adapted parameters after a step, and the state.

        Raises:
            InputError: the part gives something else, or changes what it was given.
        """
        part, meta = self.algorithm.inner_step, self.meta
        rates, table = MappingProxyType(meta.rates), MappingProxyType(meta.step_table)
        alpha = {n: self.algorithm.inner_rate(rates, n, step) for n in theta}
        with _unchanged("inner_step", part, theta, gradient, state, meta.step_table):
            found: object = part(dict(theta), gradient, alpha, dict(state), table, step)
        if not isinstance(found, tuple) or len(found) != 2:
            raise InputError(
                f"inner_step, {type(part).__name__}, returned a {type(found).__name__}; it must "
                "return two dicts, the parameters after the step and its state, which may be empty"
            )
        after, state = found
        check_fits("inner_step, by its rates, gave", after, theta, _OF_TASKS)
        return {n: t.type_as(theta[n]) for n, t in after.items()}, _checked(state)


@contextmanager
def _unchanged(slot: str, part: object, *given: Tensors) -> Iterator[None]:
    """Check that a part leaves the tensors that it is given as they are."""
    tensors = [t for each in given for t in each.values() if not t.is_inference()]
    versions = [t._version for t in tensors]
    yield
    if versions != [t._version for t in tensors]:
        raise InputError(
            f"{slot}, {type(part).__name__}, changed a tensor that it was given, which others go "
            "on from, too; make new ones, p - alpha * g in place of p -= alpha * g"
        )


def _checked(state: object) -> Tensors:
    """Return what a step remembers, if it is something to be remembered."""
    if isinstance(state, dict) and all(
        isinstance(t, Tensor) and not t.is_complex() for t in state.values()
    ):
        return state
    raise InputError(
        "the state of inner_step must be a dict of real tensors, by name; a number becomes one by "
        "torch.tensor(...), nothing is {}"
    )


def _apart(theta: Tensors, adapted: tuple[str, ...]) -> Tensors:
    """Return views of the parameters, so that none is in the graph of another made from it."""
    at = {n: theta[n].view_as(theta[n]) for n in adapted}
    # By what a part has detached the loss is differentiated all the same.
    return theta | {n: t if t.requires_grad else t.requires_grad_() for n, t in at.items()}


def _leaves(theta: Tensors, adapted: tuple[str, ...]) -> Tensors:
    detached = {name: p.detach() for name, p in theta.items()}
    for name in adapted:
        detached[name].requires_grad_()
    return detached


def _differentiated(of_tasks: Tensor, at: Tensors, derivative_order: int) -> Tensors:
    """Return the gradient of each task's loss, (tasks,), by its own parameters."""
    found: tuple[Tensor | None, ...] = (None,) * len(at)
    if of_tasks.requires_grad:  # else autograd would complain before _all_used can
        # Tasks share no parameters, so the gradient of the sum is every task's own.
        found = torch.autograd.grad(
            of_tasks.sum(),
            list(at.values()),
            create_graph=derivative_order == 2,
            allow_unused=True,
        )
    return dict(zip(at, _all_used(tuple(at), found), strict=True))


def _all_used(names: tuple[str, ...], gradients: tuple[Tensor | None, ...]) -> list[Tensor]:
    unused = [f"`{n}`" for n, g in zip(names, gradients, strict=True) if g is None]
    if unused:
        raise InputError(
            f"{', '.join(unused)} received no gradient from the support loss; leave out with "
            "adapted=AdaptedParameters(exclude=(...))"
        )
    return [g for g in gradients if g is not None]
