"""Which functions stand in for PyTorch's, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from fewstep.core.errors import InputError

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
        keeps: Whether the module keeps a generator that is drawn from; None takes any. Under
            `torch.vmap` one that is made and seeded in each call would not draw the same for each
            task.
    """

    def __init__(
        self,
        *,
        needed_only: bool = False,
        keeps: Callable[[torch.Generator], bool] | None = None,
    ) -> None:
        super().__init__()
        self._functions = _always if needed_only else _all
        self._keeps = keeps

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the stand-in if there is one and it takes these arguments, else the function.

        Raises:
            InputError: it draws from a generator that the module does not keep.
        """
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None and self._keeps is not None and not self._keeps(generator):
            raise InputError(
                "the module draws from a generator that it does not keep, whose numbers torch.vmap "
                "makes others for each task; draw once and register a buffer, keep the generator "
                "as an attribute, or pass vectorize=False"
            )
        if func in self._functions:
            found = self._functions[func](*args, **kwargs)
            if found is not NotImplemented:
                return found
        return func(*args, **kwargs)
