"""Tensor operations written down as lines of Python, which do them again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from fewstep.core.errors import InputError

_SAME = (
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
)  # another name, below autograd
# What takes values out of a tensor past the dispatcher: numbers, as the old constructors do
# (torch.Tensor([t])), copies of its memory, text.
_READS = {
    Tensor.__index__, Tensor.__int__, Tensor.__float__, Tensor.__complex__, Tensor.__bool__,
    Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__deepcopy__,
    Tensor.__reduce_ex__, Tensor.storage, Tensor.untyped_storage, Tensor.__repr__,
    Tensor.__format__,
}  # fmt: skip
_MAKES = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}  # also of lists
_DECIDES = (
    "the module, its loss or its metric decides by a tensor's value, which a recording cannot; "
    "pass replay=False"
)
_READS_LISTS = (
    "the module, its loss or its metric makes a tensor of a list of others, whose values a "
    "recording would keep; take torch.stack(list), or pass replay=False"
)
_LINES = 500  # lines of a compiled function; compiling takes memory with its length


class Recording(NamedTuple):
    """Operations as compiled functions, that read and write a list v and read a list c."""

    lines: list[str]
    parts: list[Callable[[list[Any], list[Any]], None]]
    slots: int  # of v, where the arguments are first
    constants: list[Any]  # c
    outputs: list[tuple[str, int]]
    form: TreeSpec

    def __call__(self, tensors: tuple[Tensor, ...]) -> Any:
        """Do the operations with these arguments."""
        v, c = [*tensors, *[None] * (self.slots - len(tensors))], self.constants
        with torch.no_grad():  # the recorded derivatives need no graph
            for part in self.parts:
                part(v, c)
        outputs = [(v if of == "v" else c)[i] for of, i in self.outputs]
        return tree_unflatten(outputs, self.form)


class Recorder(TorchDispatchMode):
    """Writes down the operations below autograd and `vmap`, each as a line of Python."""

    def __init__(self, tensors: tuple[Tensor, ...], may_draw: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._may_draw = may_draw
        self._lines: list[str] = []
        self._last_used: dict[int, int] = {}  # line of each slot
        self._constants: list[Any] = []
        self.outside: list[tuple[Tensor, int]] = []  # what it closes over, and where that is
        self._functions: dict[Any, str] = {}
        self._places = WeakTensorKeyDictionary()  # ("v" or "c", index) of a tensor
        for t in tensors:
            self._new_slot(t)

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
                f"{func} draws random numbers, which a recording can neither repeat in every "
                "segment nor compile; leave out checkpoint_every and compile, or replay=True"
            )
        kwargs = kwargs or {}
        if torch.Tag.dynamic_output_shape in func.tags and not _takes_numbers(func, args):
            raise InputError(
                f"{func} makes a shape of a tensor's values, which a recording cannot; pass "
                "replay=False"
            )
        if func is torch.ops.aten.lift_fresh.default and args[0] not in self._places:
            # torch.tensor(...) gives a new one each time, which may be changed in place.
            args = (args[0].clone(),)
            func = torch.ops.aten.clone.default
        outputs = func(*args, **kwargs)
        if func in _SAME:
            self._places[outputs] = self._place(args[0])
            return outputs
        if func not in self._functions:
            self._functions[func] = self._constant(func)
        given = [self._text(a) for a in args] + [f"{k}={self._text(a)}" for k, a in kwargs.items()]
        call = f"{self._functions[func]}({', '.join(given)})"
        several = isinstance(outputs, tuple | list)
        targets = [self._target(output) for output in (outputs if several else [outputs])]
        if any(targets):
            call = f"{', '.join(t or '_' for t in targets)}{',' * several} = {call}"
        self._lines.append(call)
        return outputs

    def has_made(self, t: Tensor) -> bool:
        """Whether a tensor is an argument or comes of one."""
        return t in self._places and self._places[t][0] == "v"

    def _target(self, output: Any) -> str:
        """Return what to assign an output to: nothing if it was written in place or is None."""
        if output is None or (isinstance(output, Tensor) and output in self._places):
            return ""
        if not isinstance(output, Tensor):
            raise InputError(_DECIDES)
        return self._new_slot(output)

    def _new_slot(self, t: Tensor) -> str:
        slot = len(self._last_used)
        self._last_used[slot] = len(self._lines)
        self._places[t] = ("v", slot)
        return f"v[{slot}]"

    def _constant(self, value: Any) -> str:
        self._constants.append(value)
        return f"c[{len(self._constants) - 1}]"

    def _place(self, t: Tensor) -> tuple[str, int]:
        """Return where a tensor is."""
        if t not in self._places:  # the function closes over it
            self._constant(t.detach())
            self.outside.append((t, t.data_ptr()))
            self._places[t] = ("c", len(self._constants) - 1)
        place: tuple[str, int] = self._places[t]
        of, i = place
        if of == "v":
            self._last_used[i] = len(self._lines)
        return place

    def _text(self, value: Any) -> str:
        """Return an argument as source text."""
        match value:
            case Tensor():
                of, i = self._place(value)
                return f"{of}[{i}]"
            case list() | tuple():
                return f"[{', '.join(self._text(each) for each in value)}]"
            case float() if not math.isfinite(value):
                return self._constant(value)
            case bool() | int() | float() | str() | None:
                return repr(value)
        return self._constant(value)

    def end(self, outputs: Any) -> Recording:
        """Return what was recorded."""
        leaves, form = tree_flatten(outputs)
        places = [self._place(leaf) for leaf in leaves]
        for slot, line in self._last_used.items():
            if line < len(self._lines):  # else an output
                self._lines[line] += f"; v[{slot}] = None"
        parts = [
            define("v, c", self._lines[i : i + _LINES]) for i in range(0, len(self._lines), _LINES)
        ]
        slots = len(self._last_used)
        return Recording(self._lines, parts, slots, self._constants, places, form)


def is_recording() -> bool:
    """Whether operations are written down now."""
    return any(isinstance(mode, Recorder) for mode in _get_current_dispatch_mode_stack())


def _takes_numbers(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether this is indexing by numbers, which has one shape whatever they are."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1])


class NothingRead(TorchFunctionMode):
    """Refuses what takes values out of recorded tensors past the dispatcher."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function unless it does."""
        kwargs = kwargs or {}
        if func in _READS and self._recorder.has_made(args[0]):
            raise InputError(_DECIDES)
        if func in _MAKES and any(self._recorder.has_made(t) for t in _in_lists(args, kwargs)):
            raise InputError(_READS_LISTS)
        return func(*args, **kwargs)


def _in_lists(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors in lists that a function is given."""
    lists = [given for given in (*args, *kwargs.values()) if not isinstance(given, Tensor)]
    return [t for t in tree_leaves(lists) if isinstance(t, Tensor)]


def define(parameters: str, lines: Iterable[str]) -> Callable[..., Any]:
    """Return a function with this body."""
    scope: dict[str, Any] = {}
    exec("\n    ".join([f"def function({parameters}):", *lines]), scope)  # lines of our own
    function: Callable[..., Any] = scope["function"]
    return function
