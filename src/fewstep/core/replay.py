"""Operations recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from operator import getitem
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from fewstep.core.errors import InputError

_MOST = 16  # recordings to keep; schedules go on, and do not come back
_VIEWS_OF_ALL = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class Replay:
    """Records the tensor operations of a function, derivatives and all, and replays them.

    A replay does what the function did, to the bit, without the Python, the `vmap` and the autograd
    in between; tensors that the function closes over are read anew each time. What the function
    decides in Python is decided once for each key and shape.
    """

    def __init__(self) -> None:
        self._recordings: dict[Hashable, tuple[GraphModule, TreeSpec]] = {}

    def __call__(
        self,
        function: Callable[..., Any],
        tensors: tuple[Tensor, ...],
        key: Hashable,
        *,
        may_draw: bool = True,
    ) -> Any:
        """Return function(*tensors).

        Args:
            function: Of tensors to nested dicts and tuples of tensors.
            tensors: Its arguments.
            key: What else its operations depend on.
            may_draw: Whether it may draw random numbers; not where it sets a random state itself.

        Raises:
            InputError: it reads a value out of a tensor, or draws what it may not, and so cannot be
                recorded.
        """
        key = (key, *((t.shape, t.dtype, t.device, t.stride()) for t in tensors))
        if key in self._recordings:
            operations, form = self._recordings[key]
            with torch.no_grad():  # the recorded derivatives need no graph
                return tree_unflatten(operations(*tensors), form)
        if len(self._recordings) == _MOST:
            del self._recordings[next(iter(self._recordings))]
        recorder = _Recorder(tensors, may_draw)
        with recorder:
            outputs = function(*tensors)
        self._recordings[key] = recorder.end(outputs)
        return tree_map(Tensor.detach, outputs)


class _Recorder(TorchDispatchMode):
    """Writes down the operations below autograd and `vmap`, as a graph."""

    def __init__(self, tensors: tuple[Tensor, ...], may_draw: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._may_draw = may_draw
        self._graph = Graph()
        self._root = nn.Module()
        self._nodes = WeakTensorKeyDictionary()
        for i, t in enumerate(tensors):
            self._nodes[t] = self._graph.placeholder(f"tensor_{i}")

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the operation and write it down."""
        if torch.Tag.nondeterministic_seeded in func.tags and not self._may_draw:
            raise InputError(
                f"{func} draws random numbers, which a recording cannot repeat in every segment; "
                "leave out checkpoint_every or replay=True"
            )
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        if func in _VIEWS_OF_ALL:
            self._nodes[outputs] = self._node(args[0])
            return outputs
        node = self._graph.call_function(func, *tree_map(self._node, (args, kwargs)))
        if isinstance(outputs, Tensor):
            self._nodes[outputs] = node
            return outputs
        for i, output in enumerate(outputs if isinstance(outputs, tuple | list) else [outputs]):
            if isinstance(output, Tensor):
                self._nodes[output] = self._graph.call_function(getitem, (node, i))
            elif output is not None:
                raise InputError(
                    "the module, its loss or its metric decides by a tensor's value, which a "
                    "recording cannot; pass replay=False"
                )
        return outputs

    def _node(self, value: Any) -> Any:
        """Return the node of a tensor, and anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        if value not in self._nodes:  # the function closes over it
            name = f"closed_over_{len(self._root._buffers)}"
            self._root.register_buffer(name, value.detach())
            self._nodes[value] = self._graph.get_attr(name)
        return self._nodes[value]

    def end(self, outputs: Any) -> tuple[GraphModule, TreeSpec]:
        """Return what was recorded, and how to put its outputs together."""
        leaves, form = tree_flatten(outputs)
        self._graph.output(tuple(self._node(leaf) for leaf in leaves))
        return GraphModule(self._root, self._graph), form
