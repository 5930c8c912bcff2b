"""Functions that stand in for PyTorch's while a module is called for many tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.overrides import TorchFunctionMode

Function = TypeVar("Function", bound=Callable[..., Any])
_stand_ins: dict[Any, Callable[..., Any]] = {}


def stands_in_for(*functions: Any) -> Callable[[Function], Function]:
    """Let a function stand in for others, with their arguments; it may return NotImplemented."""

    def register(function: Function) -> Function:
        _stand_ins.update(dict.fromkeys(functions, function))
        return function

    return register


class Layers(TorchFunctionMode):
    """While active, functions with a stand-in go by it, the same to rounding.

    PyTorch's own have no batching rule (recurrent layers), no second derivative (cuDNN's), or are
    slow under `torch.vmap` and in their second derivative (convolution, batch norm, pool).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the stand-in if there is one and it knows how, else the function."""
        kwargs = kwargs or {}
        if func in _stand_ins:
            found = _stand_ins[func](*args, **kwargs)
            if found is not NotImplemented:
                return found
        return func(*args, **kwargs)
