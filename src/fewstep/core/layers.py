"""Functions that stand in for PyTorch's while a module is called for many tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.overrides import TorchFunctionMode

Function = TypeVar("Function", bound=Callable[..., Any])
_StandIns = dict[Any, Callable[..., Any]]
_always: _StandIns = {}
_all: _StandIns = {}


def stands_in_for(*functions: Any, always: bool = False) -> Callable[[Function], Function]:
    """Let a function stand in for others, with their arguments; it may return NotImplemented.

    Args:
        functions: The others.
        always: For every module; else for those with layers that need, or gain by, one.
    """

    def register(function: Function) -> Function:
        for stand_ins in (_all, _always) if always else (_all,):
            stand_ins.update(dict.fromkeys(functions, function))
        return function

    return register


class Layers(TorchFunctionMode):
    """While active, functions with a stand-in go by it, the same to rounding.

    PyTorch's own are wrong (an embedding under `torch.vmap`, the second derivative of weight norm),
    have no batching rule (recurrent layers), no second derivative (cuDNN's), or are slow under
    `torch.vmap` and in their second derivative (convolution, batch norm, pool).

    Args:
        fewest: Only by those that every module needs.
    """

    def __init__(self, *, fewest: bool = False) -> None:
        super().__init__()
        self._stand_ins = _always if fewest else _all

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the stand-in if there is one and it knows how, else the function."""
        kwargs = kwargs or {}
        if func in self._stand_ins:
            found = self._stand_ins[func](*args, **kwargs)
            if found is not NotImplemented:
                return found
        return func(*args, **kwargs)
