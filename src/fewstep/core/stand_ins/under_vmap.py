"""What a module asks of a tensor that `torch.vmap` would answer wrongly in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._C import _functorch

from fewstep.core.errors import InputError
from fewstep.core.stand_ins.registry import stands_in_for


@stands_in_for(Tensor.requires_grad.__get__, always=True)  # type: ignore[attr-defined]
def requires_grad(t: Tensor) -> bool:
    """Return whether derivatives go through t, as without `torch.vmap`, which says no."""
    while _functorch.is_batchedtensor(t):
        t = _functorch.get_unwrapped(t)
    return t.requires_grad


@stands_in_for(Tensor.register_hook, always=True)
def register_hook(t: Tensor, hook: Callable[..., Any]) -> Any:
    """Refuse a hook that `torch.vmap` would not call.

    Raises:
        InputError: t is of several tasks at once.
    """
    if not _functorch.is_batchedtensor(t):
        return NotImplemented
    raise InputError(
        "the module registers a hook on a tensor, which torch.vmap does not call; leave it out, or "
        "pass vectorize=False"
    )
