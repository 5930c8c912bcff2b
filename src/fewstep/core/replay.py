"""Operations recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fewstep.core.errors import InputError

_MOST = 16  # recordings to keep; schedules go on, and do not come back


class Replay:
    """Records the tensor operations of a function, derivatives and all, and replays them.

    A replay does what the function did, to the bit, without the Python, the `vmap` and the autograd
    in between; tensors that the function closes over are read anew each time. What the function
    decides in Python is decided once for each key and shape.
    """

    def __init__(self) -> None:
        self._recordings: dict[Hashable, GraphModule] = {}

    def __call__(
        self, function: Callable[..., Any], tensors: tuple[Tensor, ...], key: Hashable
    ) -> Any:
        """Return function(*tensors).

        Args:
            function: Of tensors to nested dicts and tuples of tensors.
            tensors: Its arguments.
            key: What else its operations depend on.

        Raises:
            InputError: it reads a value out of a tensor, and so cannot be recorded.
        """
        key = (key, *((t.shape, t.dtype, t.device, t.stride()) for t in tensors))
        if key not in self._recordings:
            if len(self._recordings) == _MOST:
                del self._recordings[next(iter(self._recordings))]
            self._recordings[key] = _record(function, tensors)
        with torch.no_grad():  # the recorded derivatives need no graph
            return self._recordings[key](*tensors)


def _record(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> GraphModule:
    devices = [t.device for t in tensors if t.is_cuda]
    try:
        with torch.random.fork_rng(devices[:1]):  # recording computes, and draws random numbers
            return make_fx(function)(*tensors)
    except RuntimeError as error:
        if "tracing tensor" not in str(error):
            raise
        raise InputError(
            "the module, its loss or its metric decides by a tensor's value, which a recording "
            "cannot; pass replay=False"
        ) from error
