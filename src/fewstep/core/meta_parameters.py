"""What training changes, besides the outer optimiser's own state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.adapted import AdaptedParameters
from fewstep.core.algorithm import Algorithm
from fewstep.core.errors import InputError
from fewstep.core.judge import SUPPORT_LOSS
from fewstep.core.modules import unit_buffers
from fewstep.core.norm import StepRows
from fewstep.core.tensors import Tensors

RATE, START, STEP = "inner_lr.", "inner_start.", "inner_step."


class MetaParameters:
    """The module's parameters and buffers, and what the algorithm adds to them.

    Parameters and buffers that differ by step are stacked here, (rows, *shape), and stand in for
    the module's own.

    Args:
        module: The module.
        algorithm: Says what has rows, what is adapted and which rates are learned.
        support_loss: A loss whose parameters are learned beside the module's, never adapted.

    Attributes:
        phi: The module's trained parameters, by their names, and those beside it.
        learned: Those of them that the outer loop changes: all but fixed starts.
        rates: The table of learned inner rates.
        start_table: What the inner start learns.
        step_table: What the inner step learns.
        of_parts: All three, as "inner_lr.*", "inner_start.*" and "inner_step.*".
        parameters: All that has a meta-gradient: what is learned of phi, and what parts learn.
        by_outer: Those of them that the outer optimiser updates.
        rows: Which of all these have a row for each step.
        adapted: Names of the parameters that the inner loop changes.
        harvested: Those whose gradients a cheap hypergradient is made of.
        hypergradients: -d meta-loss / d rate of the last update, where that updates the rates.

    Raises:
        InputError: nothing to train, or to adapt, a name is taken, or a buffer is expanded.
    """

    def __init__(
        self,
        module: nn.Module,
        algorithm: Algorithm,
        support_loss: nn.Module | None = None,
    ) -> None:
        self._module, self._support_loss = module, support_loss
        named = self._named()
        trained = {n: p for n, p in named.items() if p.requires_grad}
        kind = type(module).__name__
        if not trained:
            raise InputError(
                f"{kind} has no parameter that requires a gradient; nothing could be learned"
            )
        _check_names(module, (RATE, START, STEP, *([] if support_loss is None else [SUPPORT_LOSS])))
        parameter_rows = algorithm.norm_affine.rows(module, algorithm.num_steps)
        buffer_rows = algorithm.norm_statistics.rows(module, algorithm.num_steps)
        self.rows = StepRows(frozenset(parameter_rows), frozenset(buffer_rows))
        self.phi = {n: _with_rows(p, parameter_rows.get(n)) for n, p in trained.items()}
        _check_buffers_are_whole(module)
        self._stacked: Tensors = {
            n: _with_rows(b, rows)
            for n, b in module.named_buffers() if (rows := buffer_rows.get(n)) is not None
        }  # fmt: skip
        self.units = unit_buffers(module)
        # Others are looked up, as `module.double()` puts new ones in their place.
        self._places = {n: _place(module, n) for n, _ in module.named_buffers()}
        self._copied = [(n, p, p._version) for n, p in trained.items() if n in parameter_rows]
        self._flags = {n: (p, p.requires_grad) for n, p in named.items()}
        self._frozen: Tensors = {n: p for n, p in named.items() if not p.requires_grad}

        of_module = [n for n, _ in module.named_parameters() if n in trained]
        self.adapted = _adapted(module, algorithm, of_module)
        fixed = algorithm.adapted.fixed(self.adapted)
        self.learned = {n: p for n, p in self.phi.items() if n not in fixed}
        initial = {n: self.phi[n] for n in self.adapted}
        num_steps = algorithm.num_steps
        self.rates = _leaves("inner_rate", algorithm.inner_rate.table(initial, num_steps))
        self.step_table = _leaves("inner_step", algorithm.inner_step.table(initial, num_steps))
        whole = {n: self.phi.get(n, p) for n, p in module.named_parameters()}
        self.start_table = _leaves("inner_start", algorithm.inner_start.table(whole))
        tables = {RATE: self.rates, START: self.start_table, STEP: self.step_table}
        self.of_parts = {p + n: t for p, table in tables.items() for n, t in table.items()}
        self.parameters: Tensors = self.learned | self.of_parts

        update = algorithm.rate_update
        owned = () if update is None else {RATE + n for n in self.rates}
        self.by_outer = {n: t for n, t in self.parameters.items() if n not in owned}
        if not self.by_outer:
            raise InputError(
                f"{algorithm.adapted} leaves nothing to the outer optimiser; fix fewer starts"
            )
        self.harvested = () if update is None or update.exact else self.adapted
        self.hypergradients: Tensors = (
            {} if update is None else {n: torch.zeros_like(t) for n, t in self.rates.items()}
        )

    @property
    def buffers(self) -> Tensors:
        """The module's buffers, by their names."""
        return {
            n: self._stacked[n] if n in self._stacked else its_buffers[leaf]
            for n, (its_buffers, leaf) in self._places.items()
        }

    def check_unchanged(self) -> None:
        """Check that the module's parameters are those from the start, and trained as they were.

        Raises:
            InputError: one was frozen, unfrozen, replaced, added or removed, has a hook on its
                gradient, or was changed where there are copies of it for each step.
        """
        now = self._named()
        for name in self._flags | now:
            parameter, was = self._flags.get(name, (None, False))
            if parameter is None or now.get(name) is not parameter:
                change = "replaced" if name in now else "removed"
                raise InputError(
                    f"`{name}` was {change if parameter is not None else 'added'} after the "
                    "learner was made, which goes on with those it found; change values in place, "
                    "as load_state_dict does without assign=True, or make a new MetaLearner"
                )
            if parameter.requires_grad != was:
                raise InputError(
                    f"`{name}` was {'frozen' if was else 'unfrozen'} after the learner was made, "
                    "which chose then what to train; make a new MetaLearner"
                )
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise InputError(
                    f"`{name}` has a hook on its gradient, which would not be called; remove it, "
                    "and see .grad in learner.optimiser.register_step_pre_hook(...)"
                )
        for name, parameter, version in self._copied:
            if parameter._version != version:
                raise InputError(
                    f"`{name}` was changed after the learner was made, which has copies of it for "
                    "each step; load what the module is to start from before that, or a learner's "
                    "state with load_state_tensors"
                )

    def _named(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the module and of the loss beside it.

        Raises:
            InputError: one is of both.
        """
        named = dict(self._module.named_parameters())
        if self._support_loss is None:
            return named
        beside = {SUPPORT_LOSS + n: p for n, p in self._support_loss.named_parameters()}
        for name, parameter in beside.items():
            if shared := [n for n, p in named.items() if p is parameter]:
                raise InputError(
                    f"`{name}` is `{shared[0]}` of {type(self._module).__name__}, too, where each "
                    "task has its own; give the loss a copy"
                )
        return named | beside

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copy's attributes; what it copied has versions of its own."""
        vars(self).update(state)
        self._copied = [(n, p, p._version) for n, p, _ in self._copied]

    def check_buffers(self, found: Tensors) -> None:
        """Check that buffers came out of a call as they went in.

        Raises:
            InputError: one has another shape.
        """
        for name, buffer in self.buffers.items():
            if found[name].shape != buffer.shape:
                raise InputError(
                    f"buffer `{name}` of {type(self._module).__name__} went from shape "
                    f"{tuple(buffer.shape)} to {tuple(found[name].shape)} in a call, and could not "
                    "be kept; give it its full size, or keep it as a plain attribute"
                )

    def theta(self, tasks: int) -> Tensors:
        """Return the start of the inner loop, the same for every task: each (tasks, *shape)."""
        return _stack(self.phi | self._frozen, tasks)

    def buffers_of(self, tasks: int) -> Tensors:
        """Return the buffers at the start of the inner loop, each (tasks, *shape)."""
        return _stack(self.buffers, tasks)

    def tensors(self) -> Tensors:
        """Return everything, by name."""
        hypergradients = {f"inner_lr_hypergradient.{n}": h for n, h in self.hypergradients.items()}
        return {**self._frozen, **self.phi, **self.of_parts, **self.buffers, **hypergradients}

    def load(self, saved: Tensors) -> None:
        """Take over what `tensors` gave.

        Raises:
            InputError: it is another model's.
        """
        own = self.tensors()
        if differing := sorted(
            n for n in own.keys() | saved.keys()
            if n not in own or n not in saved or own[n].shape != saved[n].shape
        ):  # fmt: skip
            raise InputError(
                f"the saved state is another model's: `{differing[0]}` does not fit; "
                "build the model with the settings it was saved with"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])


def _check_names(module: nn.Module, prefixes: Iterable[str]) -> None:
    for prefix in prefixes:
        if any(name.startswith(prefix) for name, _ in module.named_parameters()):
            raise InputError(
                f"{type(module).__name__} has a part named '{prefix[:-1]}', the name of what is "
                "learned beside it; rename it"
            )


def _check_buffers_are_whole(module: nn.Module) -> None:
    for name, buffer in module.named_buffers():
        if any(
            size > 1 and step == 0 for size, step in zip(buffer.shape, buffer.stride(), strict=True)
        ):
            raise InputError(
                f"buffer `{name}` of {type(module).__name__} is expanded, so it cannot be written "
                "to; register its .clone()"
            )


def _adapted(module: nn.Module, algorithm: Algorithm, trained: Iterable[str]) -> tuple[str, ...]:
    """Return the names of what the inner loop changes: what was chosen and may be."""
    outer_only, trained = algorithm.norm_affine.outer_only(module), list(trained)
    first = {id(p): name for name, p in module.named_parameters()}
    of_all = module.named_parameters(remove_duplicate=False)  # with every name of tied weights
    others = {n: first[id(p)] for n, p in of_all if first[id(p)] in trained}
    chosen = algorithm.adapted.choose(trained, others)
    adapted = tuple(n for n in chosen if n not in outer_only)
    for pattern in algorithm.adapted.include:
        if set(AdaptedParameters((pattern,)).choose(trained, others)) <= set(outer_only):
            raise InputError(
                f"pattern {pattern!r} names what {algorithm.norm_affine} keeps for the outer "
                "loop alone; leave it out, or pass PerStepAffine(adapted=True)"
            )
    if not adapted:
        raise InputError(
            f"{type(module).__name__} has nothing to adapt but what {algorithm.norm_affine} keeps "
            "for the outer loop; pass PerStepAffine(adapted=True)"
        )
    return adapted


def _leaves(slot: str, table: Mapping[str, Tensor]) -> Tensors:
    """Return copies to be learned of what a part starts from.

    Raises:
        InputError: it is no dict of tensors that can be learned.
    """
    given: object = table
    if not isinstance(given, Mapping) or not all(
        isinstance(n, str) and isinstance(t, Tensor) and t.is_floating_point()
        for n, t in given.items()
    ):
        raise InputError(
            f"the table of {slot} must be a dict of floating-point tensors by name, what is "
            "learned; a number becomes one by torch.tensor(0.1), nothing is {}"
        )
    return {name: t.detach().clone().requires_grad_() for name, t in table.items()}


def _place(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Return the registry that holds a buffer, and its name there."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path)._buffers, leaf


def _with_rows(tensor: Tensor, rows: int | None) -> Tensor:
    """Return the tensor itself, or a leaf of so many copies of it."""
    if rows is None:
        return tensor
    copies = tensor.detach().expand(rows, *tensor.shape).clone()
    return copies.requires_grad_(tensor.requires_grad)


def _stack(tensors: Tensors, tasks: int) -> Tensors:
    """Give every task the same tensors, without a copy: (*shape) to (tasks, *shape)."""
    return {name: t.expand(tasks, *t.shape) for name, t in tensors.items()}
