"""Which functions stand in for PyTorch's, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.overrides import TorchFunctionMode

Function = TypeVar("Function", bound=Callable[..., Any])
_Functions = dict[Any, Callable[..., Any]]
_always: _Functions = {}
_all: _Functions = {}


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


class StandIns(TorchFunctionMode):
    """While active, PyTorch calls the stand-ins instead, the same to rounding.

    PyTorch's own are wrong (an embedding under `torch.vmap`, the second derivative of weight norm),
    have no batching rule (recurrent layers), no second derivative (cuDNN's), or are slow under
    `torch.vmap` and in their second derivative (convolution, batch norm, pool).

    Args:
        needed_only: Only those that every module needs.
    """

    def __init__(self, *, needed_only: bool = False) -> None:
        super().__init__()
        self._functions = _always if needed_only else _all

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the stand-in if there is one and it takes these arguments, else the function."""
        kwargs = kwargs or {}
        if func in self._functions:
            found = self._functions[func](*args, **kwargs)
            if found is not NotImplemented:
                return found
        return func(*args, **kwargs)
