"""The parameters that a learner was made with, and whether they are still those."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import nn

from fewstep.core.errors import InputError
from fewstep.core.judge import SUPPORT_LOSS


class KnownParameters:
    """The parameters of a module, and of a loss beside it, as they were found.

    Args:
        module: The module.
        support_loss: A loss whose parameters are learned beside the module's, as "support_loss.*".

    Attributes:
        trained: Those that require a gradient, by their names.
        frozen: The others.

    Raises:
        InputError: the module has none to train, or shares one with the loss.
    """

    def __init__(self, module: nn.Module, support_loss: nn.Module | None) -> None:
        self._module, self._support_loss = module, support_loss
        named = self._named()
        self.trained = {n: p for n, p in named.items() if p.requires_grad}
        self.frozen = {n: p for n, p in named.items() if not p.requires_grad}
        self._copied: list[tuple[str, nn.Parameter, int]] = []
        self._kinds: dict[str, tuple[torch.dtype, torch.device]] = {}
        if not self.trained:
            raise InputError(
                f"{type(module).__name__} has no parameter that requires a gradient; nothing could "
                "be learned"
            )

    def note_copied(self, names: Container[str]) -> None:
        """Note of which trained parameters there are copies, so that they must stay as they are."""
        self._copied = [(n, p, p._version) for n, p in self.trained.items() if n in names]

    def note_kinds(self) -> None:
        """Note types and devices, which what is learned beside the parameters shares."""
        self._kinds = {n: (p.dtype, p.device) for n, p in self.trained.items()}

    def check_unchanged(self) -> None:
        """Check that the module's parameters are those from the start, and trained as they were.

        Raises:
            InputError: one was frozen, unfrozen, replaced, added or removed, has a hook on its
                gradient, or was changed where there are copies of it for each step.
        """
        now, known = self._named(), self.trained | self.frozen
        for name in known | now:
            parameter = known.get(name)
            if parameter is None or now.get(name) is not parameter:
                change = "replaced" if name in now else "removed"
                raise InputError(
                    f"`{name}` was {change if parameter is not None else 'added'} after the "
                    "learner was made, which goes on with those it found; change values in place, "
                    "as load_state_dict does without assign=True, or make a new MetaLearner"
                )
            if parameter.requires_grad != (name in self.trained):
                raise InputError(
                    f"`{name}` was {'frozen' if name in self.trained else 'unfrozen'} after the "
                    "learner was made, which chose then what to train; make a new MetaLearner"
                )
            dtype, device = self._kinds.get(name, (parameter.dtype, parameter.device))
            if (dtype, device) != (parameter.dtype, parameter.device):
                raise InputError(
                    f"`{name}` was {dtype} on {device} when the learner was made, which keeps "
                    "rates or rows of that kind; move the module first, then make the learner"
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
