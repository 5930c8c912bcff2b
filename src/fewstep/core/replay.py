"""Operations recorded once and replayed."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from fewstep.core.errors import InputError

_MOST = 16  # recordings to keep; schedules go on, and do not come back
_SAME = (
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
)  # another name, below autograd
_READS = (Tensor.numpy, Tensor.tolist, Tensor.__array__)
_DECIDES = (
    "the module, its loss or its metric decides by a tensor's value, which a recording cannot; "
    "pass replay=False"
)
_LINES = 500  # lines of a compiled function; compiling takes memory with its length


class Replay:
    """Records the tensor operations of a function, derivatives and all, and replays them.

    A replay does what the function did, to the bit, without the Python, the `vmap` and the autograd
    in between; tensors that the function closes over are read anew each time, where they are. What
    the function decides in Python is decided once for each key and shape. On a GPU a recording is
    one CUDA graph.

    Args:
        compiled: Hand each recording to `torch.compile`, which fuses small operations: the same to
            rounding, which is checked when it has compiled.
    """

    def __init__(self, *, compiled: bool = False) -> None:
        self._compiled = compiled
        self._recordings: dict[Hashable, _Kept] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the recordings behind: a copy makes its own."""
        return {"_compiled": self._compiled, "_recordings": {}}

    def __call__(
        self,
        function: Callable[..., Any],
        *tensors: Tensor,
        key: Hashable,
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
                recorded; or torch.compile or a CUDA graph fails.
        """
        key = (key, *((t.shape, t.dtype, t.device, t.stride()) for t in tensors))
        kept = self._recordings.get(key)
        if kept is not None and kept.is_valid():
            return kept.run(tensors)
        if len(self._recordings) == _MOST:
            del self._recordings[next(iter(self._recordings))]
        recorder = _Recorder(tensors, may_draw and not self._compiled)
        with recorder, _NothingRead(recorder):
            outputs = function(*tensors)
        recording = recorder.end(outputs)
        outputs = tree_map(Tensor.detach, outputs)
        run: _Recording | _Compiled = recording
        if self._compiled:
            run = compiled = _Compiled(recording)
            outputs = compiled.check(tensors, outputs)
        graph = _CudaGraph(run, tensors) if tensors[0].is_cuda else run
        self._recordings[key] = _Kept(graph, recorder.outside)
        return outputs


class _Kept(NamedTuple):
    """A recording, and where the tensors were that it reads from outside."""

    run: _Recording | _Compiled | _CudaGraph
    outside: list[tuple[Tensor, int]]

    def is_valid(self) -> bool:
        """Whether they still are there, and not moved as by `module.double()`."""
        return all(t.data_ptr() == address for t, address in self.outside)


class _Recording(NamedTuple):
    """Operations as compiled functions, that read and write a list v and read a list c."""

    lines: list[str]
    parts: list[Callable[[list[Any], list[Any]], None]]
    slots: int  # of v, where the arguments are first
    constants: list[Any]  # c
    outputs: list[tuple[str, int]]
    form: TreeSpec

    def __call__(self, tensors: tuple[Tensor, ...]) -> Any:
        v, c = [*tensors, *[None] * (self.slots - len(tensors))], self.constants
        with torch.no_grad():  # the recorded derivatives need no graph
            for part in self.parts:
                part(v, c)
        outputs = [(v if of == "v" else c)[i] for of, i in self.outputs]
        return tree_unflatten(outputs, self.form)


class _Compiled:
    """A recording under `torch.compile`, compared with what was recorded."""

    def __init__(self, recording: _Recording) -> None:
        self._constants, self._form = recording.constants, recording.form
        lines = [
            f"v = [*tensors, *[None] * ({recording.slots} - len(tensors))]",
            *recording.lines,
            f"return [{', '.join(f'{of}[{i}]' for of, i in recording.outputs)}]",
        ]
        self._run = torch.compile(
            _define("tensors, c", lines),
            fullgraph=True,
            dynamic=False,
            options={
                "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,  # our key is the guard
                "cpp_wrapper": True,  # no Python between the kernels
            },
        )

    def check(self, tensors: tuple[Tensor, ...], outputs: Any) -> Any:
        """Return the outputs, which must be those given, to rounding."""
        try:
            found = self(tensors)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"torch.compile fails on the operations of this meta-gradient ({reason:.160}); "
                "leave out compile=True"
            ) from error
        for a, b in zip(*(tree_flatten(each)[0] for each in (found, outputs)), strict=True):
            if b.is_floating_point():
                tolerance = torch.finfo(b.dtype).eps ** 0.5
                if not (a - b).norm() <= tolerance * b.norm():
                    raise InputError(
                        "torch.compile gives other numbers than the operations it compiled; leave "
                        "out compile=True"
                    )
        return found

    def __call__(self, tensors: tuple[Tensor, ...]) -> Any:
        with torch.no_grad():
            return tree_unflatten(self._run(tensors, self._constants), self._form)


class _CudaGraph:
    """A recording that the host launches as one: a CUDA graph.

    Its tensors stay where they are from one launch to the next, so arguments are copied in and
    outputs out.

    Raises:
        InputError: CUDA cannot capture what was recorded.
    """

    def __init__(self, recording: _Recording | _Compiled, tensors: tuple[Tensor, ...]) -> None:
        self._arguments = tuple(t.clone() for t in tensors)
        self._graph = torch.cuda.CUDAGraph()
        device = tensors[0].device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.random.fork_rng([device]), torch.cuda.device(device):
                with torch.cuda.stream(side):
                    recording(self._arguments)  # libraries choose and allocate before a capture
                torch.cuda.current_stream(device).wait_stream(side)
                with torch.cuda.graph(self._graph):
                    self._outputs = recording(self._arguments)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"the operations of this meta-gradient cannot be a CUDA graph ({reason:.160}); "
                "pass replay=False"
            ) from error

    def __call__(self, tensors: tuple[Tensor, ...]) -> Any:
        for own, given in zip(self._arguments, tensors, strict=True):
            own.copy_(given)
        self._graph.replay()
        return tree_map(Tensor.clone, self._outputs)


class _Recorder(TorchDispatchMode):
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

    def end(self, outputs: Any) -> _Recording:
        """Return what was recorded."""
        leaves, form = tree_flatten(outputs)
        places = [self._place(leaf) for leaf in leaves]
        for slot, line in self._last_used.items():
            if line < len(self._lines):  # else an output
                self._lines[line] += f"; v[{slot}] = None"
        parts = [
            _define("v, c", self._lines[i : i + _LINES]) for i in range(0, len(self._lines), _LINES)
        ]
        slots = len(self._last_used)
        return _Recording(self._lines, parts, slots, self._constants, places, form)


def _takes_numbers(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether this is indexing by numbers, which has one shape whatever they are."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1])


class _NothingRead(TorchFunctionMode):
    """Refuses what takes values out of recorded tensors past the dispatcher."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function unless it does."""
        if func in _READS and self._recorder.has_made(args[0]):
            raise InputError(_DECIDES)
        return func(*args, **(kwargs or {}))


def _define(parameters: str, lines: Iterable[str]) -> Callable[..., Any]:
    """Return a function with this body."""
    scope: dict[str, Any] = {}
    exec("\n    ".join([f"def function({parameters}):", *lines]), scope)  # lines of our own
    function: Callable[..., Any] = scope["function"]
    return function
