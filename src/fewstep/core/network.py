"""Any `nn.Module`, called for many tasks at once with parameters of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from fewstep.core.calls import Attributes, no_recomputing, nothing_left_behind, nothing_written
from fewstep.core.errors import InputError, check_name
from fewstep.core.explained import explained
from fewstep.core.first_calls import FirstCalls
from fewstep.core.judge import SUPPORT_LOSS, Judge
from fewstep.core.modules import (
    DIFFERENTIABLE_TWICE,
    check_module,
    generators_of,
    has_backward_hooks,
    set_mode,
    under_two_names,
)
from fewstep.core.norm import Use
from fewstep.core.normalise import NormaliseBy, Statistics, follow
from fewstep.core.once import once
from fewstep.core.precision import Precision, forward_pass, fp32_products
from fewstep.core.recorder import is_recording
from fewstep.core.stand_ins.registry import StandIns
from fewstep.core.tasks import TaskBatch
from fewstep.core.tensors import Tensors
from fewstep.core.watch import watching

_LOCK = threading.Lock()
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
Found = TypeVar("Found")
_Judgement = Callable[[Tensor, Tensor, Tensors], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Result:
    """What a call for a batch of tasks gives.

    Args:
        loss: (tasks,).
        metric: (tasks,); of support sets the loss.
        outputs: (tasks, examples, ...).
        buffers: After the call, each (tasks, *shape).
    """

    loss: Tensor
    metric: Tensor
    outputs: Tensor
    buffers: Tensors


class TaskNetwork:
    """A module and what judges it as a function of stacked parameters: one set for each task.

    The module is called through `torch.func.functional_call` and is not changed. One call serves
    all tasks through `torch.vmap`, or, with `vectorize=False`, a loop that needs no batching rule
    and serves as the reference.

    Args:
        module: Maps a batch of inputs to a batch of outputs.
        judge: Losses and metric.
        vectorize: Use `torch.vmap`; else loop over the tasks.
        precision: Precision of matrix products and convolutions.

    Raises:
        InputError: the module is a wrapper, or has lazy parameters; when it is called: a part
            cannot be vectorised, it changes a parameter, or it returns no tensor.
    """

    def __init__(
        self,
        module: nn.Module,
        judge: Judge,
        *,
        vectorize: bool,
        precision: Precision,
    ) -> None:
        check_module(module)
        self.module = module
        self.judge = judge
        self._called = [m for m in (module, judge.learned_loss) if m is not None]
        self.vectorize = vectorize
        self.precision = precision
        has_filters = any(p.ndim == 4 for called in self._called for p in called.parameters())
        is_recurrent = any(isinstance(m, nn.RNNBase | nn.RNNCellBase) for m in self.parts())
        gains = has_filters or is_recurrent or precision == "bfloat16"
        self._stand_ins = partial(StandIns, needed_only=not gains)
        self._under_two_names = under_two_names(module)
        self._use: Use = "batch"
        self.is_training = True
        self.first_calls = FirstCalls(module, judge)

    def parts(self) -> list[nn.Module]:
        """Return all parts of the module, and of a loss that is learned."""
        return [part for called in self._called for part in called.modules()]

    def generators(self) -> list[torch.Generator]:
        """Return the generators that parts of the module, losses and metric keep."""
        of_judge = (part for module in self.judge.modules() for part in module.modules())
        return generators_of([*self.parts(), *of_judge, *self.judge.functions()])

    def support(self, parameters: Tensors, buffers: Tensors, batch: TaskBatch) -> Result:
        """Call on the support sets.

        Args:
            parameters: By name, each (tasks, *shape).
            buffers: By name, each (tasks, *shape).
            batch: The tasks.
        """
        with self._normalise():
            x, y = batch.x_support, batch.y_support
            return self._call(parameters, buffers, x, y, self.judge.support)

    def query(
        self, parameters: Tensors, buffers: Tensors, batch: TaskBatch, *, is_last: bool
    ) -> Result:
        """Call on the query sets; the support sets lend their statistics where asked.

        Buffers change in training alone, and not where the support sets would be seen once more:
        scores on the way leave nothing to the steps after them.

        Args:
            parameters: By name, each (tasks, *shape).
            buffers: By name, each (tasks, *shape).
            batch: The tasks.
            is_last: No inner step follows, which would see the support sets under these parameters.
        """
        judge, y = self.judge.query, batch.y_query
        if self._use != "support":
            with self._normalise():
                result = self._call(parameters, buffers, batch.x_query, y, judge)
            return result if self.is_training else replace(result, buffers=buffers)
        x = once(_both, batch.x_support, batch.x_query)
        shots = batch.x_support.shape[1]
        update = follow if self.is_training and is_last else None
        with NormaliseBy(Statistics(examples=shots, of=x.shape[1], update=update)):
            result = self._call(parameters, buffers, x, y, judge, without=shots)
        return result if update else replace(result, buffers=buffers)

    def _normalise(self) -> AbstractContextManager[object]:
        if self._use == "running":
            update = follow if self.is_training else None
            return NormaliseBy(Statistics(running=True, update=update))
        return nullcontext()

    def _call(
        self,
        parameters: Tensors,
        buffers: Tensors,
        x: Tensor,
        y: Tensor,
        judge: _Judgement,
        *,
        without: int = 0,
    ) -> Result:
        """Call the module for every task; leave out the first outputs, `without` of them."""
        one_task = partial(self._one_task, judge, without=without)
        return Result(*self._for_tasks(one_task, parameters, buffers, x, y))

    def inputs_of(
        self, part: str, parameters: Tensors, buffers: Tensors, x: Tensor, *, is_last: bool
    ) -> Tensor:
        """Return what a part is given when the module is called, (tasks, examples, ...).

        Buffers stay as they are.

        Args:
            part: Its name in the module.
            parameters: By name, each (tasks, *shape).
            buffers: By name, each (tasks, *shape).
            x: Inputs, (tasks, ...).
            is_last: The part must be the one whose outputs the module returns.

        Raises:
            InputError: no part has this name, the module does not call it once with a tensor, or it
                is not the last.
        """
        parts = dict(self.module.named_modules(remove_duplicate=False))
        check_name("part", part, parts)
        with watching(self.module, parts[part]) as watch, self._normalise():

            def one_task(parameters: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
                watch.begin()
                self._forward(parameters | {name: b.clone() for name, b in buffers.items()}, x)
                return _unrounded(watch.given(part, is_last=is_last))

            return self._for_tasks(one_task, parameters, buffers, x)

    def outputs(self, parameters: Tensors, x: Tensor) -> Tensor:
        """Return what a module without buffers gives, (tasks, ...).

        Args:
            parameters: By name, each (tasks, *shape).
            x: Inputs, (tasks, ...).
        """
        return self._for_tasks(self._forward, parameters, x)

    def _for_tasks(
        self, one_task: Callable[..., Found], parameters: Tensors, *others: Any
    ) -> Found:
        """Return what a function of one task gives, of all of them, stacked.

        Args:
            one_task: Calls the module.
            parameters: By name, each (tasks, *shape).
            others: What else it takes: tensors, (tasks, ...), or dicts of them.
        """
        device = next(iter(parameters.values())).device
        own = (p for called in self._called for p in called.parameters())
        inputs = [t for t in others if isinstance(t, Tensor)]
        generators = self.generators if self.vectorize or is_recording() else None
        with (
            self.first_calls.undone_if_refused(own, inputs, self.is_training),
            nothing_written(type(self.module).__name__, parameters, inputs),
            self._stand_ins(generators=generators),
            forward_pass(self.precision, device),
        ):
            if self.vectorize:
                with nothing_left_behind(self.parts()):
                    found: Found = torch.vmap(one_task, randomness="different")(parameters, *others)
            else:
                tasks = len(next(iter(parameters.values())))
                each = [
                    one_task(*(tree_map(itemgetter(j), given) for given in (parameters, *others)))
                    for j in range(tasks)
                ]
                found = tree_map(lambda *of_tasks: torch.stack(of_tasks), *each)
        return found

    def _one_task(
        self,
        judge: _Judgement,
        parameters: Tensors,
        buffers: Tensors,
        x: Tensor,
        y: Tensor,
        *,
        without: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensors]:
        # Modules change their buffers in place, or assign new ones, which come back in `tensors`.
        tensors = parameters | {name: b.clone() for name, b in buffers.items()}
        outputs = self._forward(tensors, x)
        if without:
            outputs = outputs[without:]
        loss, metric = judge(outputs, y, tensors)
        return loss, metric, outputs.detach(), {n: tensors[n].detach() for n in buffers}

    def _forward(self, tensors: Tensors, x: Tensor) -> Tensor:
        """Return the module's outputs of one task, its parameters and buffers in `tensors`."""
        if self.judge.learned_loss is not None:
            tensors = {n: t for n, t in tensors.items() if not n.startswith(SUPPORT_LOSS)}
        own = [Attributes.of(part) for part in self._under_two_names]
        try:
            with no_recomputing(type(self.module).__name__):
                outputs: object = functional_call(self.module, tensors, (x,))
        finally:  # which else takes the second name's tensors for the module's own
            for attributes in own:
                attributes.restore_tensors()
        if not isinstance(outputs, Tensor):
            raise InputError(
                f"{type(self.module).__name__} returned a {type(outputs).__name__}; it must return "
                "a tensor, so wrap it in a module that does"
            )
        return _unrounded(outputs)  # losses are not rounded so far

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other threads from the module, whose parameters are exchanged in a call."""
        with _LOCK:
            locks = [_LOCKS.setdefault(called, threading.RLock()) for called in self._called]
        with ExitStack() as stack:
            for lock in sorted(locks, key=id):  # in one order, or two threads might wait for ever
                stack.enter_context(lock)
            yield

    @contextmanager
    def mode(self, *, is_training: bool, use: Use) -> Iterator[None]:
        """Set the module's mode and what batch normalisation normalises by, for a while.

        In evaluation dropout is off, and running statistics stay as they are. An autocast around it
        does not reach in, where it would round derivatives too: `precision` says what is rounded.

        Raises:
            InputError: `torch.inference_mode` is on, in which the inner loop cannot differentiate,
                or a part has a backward hook, which `torch.vmap` would pass by.
        """
        if torch.is_inference_mode_enabled():
            raise InputError(
                "adapting takes gradients, which torch.inference_mode() forbids; leave it out, as "
                "evaluate, predict and adapt keep no graph themselves"
            )
        before = [(part, part.training) for part in self.parts()]
        if self.vectorize and has_backward_hooks(part for part, _ in before):
            raise InputError(
                f"a part of {type(self.module).__name__} has a backward hook, which torch.vmap "
                "does not call; remove it, or pass vectorize=False"
            )
        for called in self._called:
            set_mode(called, is_training=is_training)
        self.is_training, self._use = is_training, use
        device = next(self.module.parameters()).device
        try:
            with (
                DIFFERENTIABLE_TWICE,
                fp32_products(self.precision),
                torch.autocast(device.type, enabled=False),
                explained(type(self.module).__name__, vectorize=self.vectorize),
            ):
                yield
        finally:
            for module, mode in before:
                if module.training != mode:
                    module.training = mode


def _unrounded(t: Tensor) -> Tensor:
    """Return a tensor of half precision as float32, any other as it is."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _both(x_support: Tensor, x_query: Tensor) -> Tensor:
    if x_support.shape[2:] != x_query.shape[2:]:
        raise InputError(
            f"statistics='support' calls on both sets at once, and examples are "
            f"{tuple(x_support.shape[2:])} of support sets, {tuple(x_query.shape[2:])} of query "
            "sets; choose 'batch' or 'running'"
        )
    return torch.cat([x_support, x_query], dim=1)
