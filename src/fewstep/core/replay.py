"""Operations recorded once and replayed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fewstep.core.errors import InputError
from fewstep.core.recorder import NothingRead, Recorder, Recording, define

_CAPTURING = threading.Lock()  # CUDA captures one graph at a time in a process
_MOST = 16  # recordings to keep; schedules go on, and do not come back


class Replay:
    """Records the tensor operations of a function, derivatives and all, and replays them.

    A replay does what the function did, to the bit, without the Python, the `vmap` and the autograd
    in between; tensors that the function closes over are read anew each time, where they are. What
    the function decides in Python is decided once for each key and shape. On a GPU a recording is
    one CUDA graph.

    Args:
        compiled: Hand each recording to `torch.compile`, which fuses small operations: the same to
            rounding, which is checked when it has compiled.
        from_second: Record at the second call of a key; a recording takes a second or two, which
            what is called once does not win back.
    """

    def __init__(self, *, compiled: bool = False, from_second: bool = False) -> None:
        self._compiled = compiled
        self._from_second = from_second
        self._recordings: dict[Hashable, _Kept] = {}
        self._called: set[Hashable] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the recordings behind: a copy makes its own."""
        return self.__dict__ | {"_recordings": {}, "_called": set()}

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
        if tensors[0].is_cuda:
            tensors = _dense(tensors)
        forms = ((t.shape, t.dtype, t.device, t.stride()) for t in tensors)
        key = (key, *forms, *_first_places(tensors))
        kept = self._recordings.get(key)
        if kept is not None and kept.is_valid():
            return kept.run(tensors)
        if self._from_second and key not in self._called:
            self._called.add(key)
            return function(*tensors)
        if len(self._recordings) == _MOST:
            del self._recordings[next(iter(self._recordings))]
        recorder = Recorder(tensors, may_draw and not self._compiled)
        with recorder, NothingRead(recorder):
            outputs = function(*tensors)
        recording = recorder.end(outputs)
        outputs = tree_map(Tensor.detach, outputs)
        run: Recording | _Compiled = recording
        if self._compiled:
            run = compiled = _Compiled(recording)
            outputs = compiled.check(tensors, outputs)
        graph = _CudaGraph(run, tensors) if tensors[0].is_cuda else run
        self._recordings[key] = _Kept.of(graph, recorder.outside)
        return outputs


class Same:
    """An object as part of a key, which keeps it, so that no later one gets its address."""

    def __init__(self, of: object) -> None:
        self._of = of

    def __hash__(self) -> int:
        return id(self._of)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other._of is self._of


def _first_places(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Say which arguments are one tensor, as a recording takes them for one."""
    places = {id(t): i for i, t in reversed(list(enumerate(tensors)))}
    return tuple(places[id(t)] for t in tensors)


def _dense(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return them without gaps, as a graph's own copies of them are; one twice stays one."""
    layouts = (torch.contiguous_format, torch.channels_last)
    made = {
        id(t): t if any(t.is_contiguous(memory_format=f) for f in layouts) else t.contiguous()
        for t in tensors
    }
    return tuple(made[id(t)] for t in tensors)


class _Kept(NamedTuple):
    """A recording, and where the tensors were that it reads from outside.

    Those on the CPU that a CUDA graph reads are numbers of it, as they were when it was captured.
    """

    run: Recording | _Compiled | _CudaGraph
    outside: list[tuple[Tensor, int]]
    numbers: list[tuple[Tensor, int]]

    @classmethod
    def of(cls, run: Recording | _Compiled | _CudaGraph, outside: list[tuple[Tensor, int]]) -> Self:
        """Note what is outside as it is now."""
        is_graph = isinstance(run, _CudaGraph)
        numbers = [(t, t._version) for t, _ in outside if is_graph and not t.is_cuda]
        return cls(run, outside, numbers)

    def is_valid(self) -> bool:
        """Whether outside tensors are where they were, and numbers among them as they were."""
        are_there = all(t.data_ptr() == address for t, address in self.outside)
        return are_there and all(t._version == version for t, version in self.numbers)


class _Compiled:
    """A recording under `torch.compile`, compared with what was recorded."""

    def __init__(self, recording: Recording) -> None:
        self._constants, self._form = recording.constants, recording.form
        lines = [
            f"v = [*tensors, *[None] * ({recording.slots} - len(tensors))]",
            *recording.lines,
            f"return [{', '.join(f'{of}[{i}]' for of, i in recording.outputs)}]",
        ]
        self._run = torch.compile(
            define("tensors, c", lines),
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
        pairs = [
            (a, b)
            for a, b in zip(*(tree_flatten(each)[0] for each in (found, outputs)), strict=True)
            if b.is_floating_point()
        ]
        gradients = [t for t in tree_flatten(outputs[0])[0] if t.isfinite().all()]  # come first
        largest = max((float(t.norm()) for t in gradients), default=0.0)
        for a, b in pairs:
            if not b.isfinite().all():
                continue  # whoever asked for it says so
            eps = torch.finfo(b.dtype).eps
            # a bias before batch norm has a gradient of rounding errors alone
            if not (a - b).norm() <= eps**0.5 * b.norm() + eps * largest:
                raise InputError(
                    "torch.compile gives other numbers than the operations it compiled; leave out "
                    "compile=True"
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

    def __init__(self, recording: Recording | _Compiled, tensors: tuple[Tensor, ...]) -> None:
        self._arguments = tuple(t.clone() for t in tensors)
        self._graph = torch.cuda.CUDAGraph()
        device = tensors[0].device
        side, own = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        side.wait_stream(own)
        try:
            with _CAPTURING, torch.random.fork_rng([device]), torch.cuda.device(device):
                with torch.cuda.stream(side):
                    recording(self._arguments)  # libraries choose and allocate before a capture
                own.wait_stream(side)
                # PyTorch's own stream for captures is of one GPU; other threads go on meanwhile.
                with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                    self._outputs = recording(self._arguments)
        except RuntimeError as error:
            torch.cuda.set_stream(own)  # a capture that fails stays on its own
            # what ends the capture fails, too, and says nothing of why
            reason = str(error.__context__ or error).splitlines()[0]
            raise InputError(
                f"the operations of this meta-gradient cannot be a CUDA graph ({reason:.160}); "
                "pass replay=False, in a new process"
            ) from error

    def __call__(self, tensors: tuple[Tensor, ...]) -> Any:
        for own, given in zip(self._arguments, tensors, strict=True):
            own.copy_(given)
        self._graph.replay()
        return tree_map(Tensor.clone, self._outputs)
