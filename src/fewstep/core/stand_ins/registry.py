"""Which functions stand in for PyTorch's, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
        generators: Those that may be drawn from, besides PyTorch's own as it is seeded now; None
            for any. Of a seed that each call sets, each task and each call should have the same
            numbers, but `torch.vmap` draws for all tasks at once, and a recording goes on.
    """

    def __init__(
        self,
        *,
        needed_only: bool = False,
        generators: Callable[[], Iterable[torch.Generator]] | None = None,
    ) -> None:
        super().__init__()
        self._functions = _always if needed_only else _all
        self._generators, self._seed = generators, torch.initial_seed()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the stand-in if there is one and it takes these arguments, else the function.

        Raises:
            InputError: it draws from a seed of the module's own.
        """
        kwargs = kwargs or {}
        if self._generators is not None and not self._may_draw_from(kwargs.get("generator")):
            raise InputError(
                "the module, or a loss, draws from a seed or a generator of the call's own, whose "
                "numbers would be others for each task; draw in __init__ and register a buffer, "
                "keep the generator as an attribute, or pass vectorize=False, replay=False"
            )
        if func in self._functions:
            found = self._functions[func](*args, **kwargs)
            if found is not NotImplemented:
                return found
        return func(*args, **kwargs)

    def _may_draw_from(self, generator: torch.Generator | None) -> bool:
        if generator is None or generator is torch.default_generator:
            return torch.initial_seed() == self._seed
        return self._generators is None or any(g is generator for g in self._generators())
