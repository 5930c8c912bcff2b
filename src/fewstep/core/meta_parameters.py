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
from fewstep.core.known_parameters import KnownParameters
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
        known: The parameters that there were at the start.
        phi: The module's trained parameters, by their names, and those beside it.
        learned: Those of them that the outer loop changes: all but fixed starts.
        rates: The table of learned inner rates.
        start_table: What the inner start learns.
        step_table: What the inner step learns.
        of_parts: All three, as "inner_lr.*", "inner_start.*" and "inner_step.*".
        parameters: All that has a meta-gradient: what is learned of phi, and what parts learn.
        by_outer: Those of them that the outer optimiser updates.
        rows: Which of all these have a row for each step.
        units: Buffers that are vectors of length one, as spectral norm's.
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
        self._module = module
        self.known = KnownParameters(module, support_loss)
        trained = self.known.trained
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
        self.known.note_copied(parameter_rows)

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
        if self.of_parts or parameter_rows or buffer_rows:
            self.known.note_kinds()

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
        return _stack(self.phi | self.known.frozen, tasks)

    def buffers_of(self, tasks: int) -> Tensors:
        """Return the buffers at the start of the inner loop, each (tasks, *shape)."""
        return _stack(self.buffers, tasks)

    def tensors(self) -> Tensors:
        """Return everything, by name."""
        hypergradients = {f"inner_lr_hypergradient.{n}": h for n, h in self.hypergradients.items()}
        return {**self.known.frozen, **self.phi, **self.of_parts, **self.buffers, **hypergradients}

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
        if buffer.layout != torch.strided:
            raise InputError(
                f"buffer `{name}` of {type(module).__name__} is sparse, and cannot be stacked for "
                "the tasks; register it dense, or make it sparse in forward"
            )
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
