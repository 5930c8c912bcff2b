"""Iterations on a GPU that is imagined: shapes and devices, no numbers.

`python -m tests.core.imagined_gpu MODEL ...`, with what imagined_gpu.cpp compiles to in LD_PRELOAD,
as it has to be there before PyTorch looks for a GPU.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewstep import MetaLearner, TaskBatch, maml_plus_plus
from fewstep.core.recorder import Recorder
from tests.core.reference import MODELS, two_blocks

CHECKPOINTS = " in checkpoints"  # after a model's name
CASES = {
    "batch norm": MODELS["batch norm"],
    "Conv4": replace(MODELS["Conv4"], build=two_blocks),
    "LSTM": replace(MODELS["LSTM"], shape=(2, 3)),
    "transformer": MODELS["transformer"],
}
STEPS = {"LSTM": 1, "transformer": 1}  # each takes seconds; else 2, where steps are told apart
STATE = torch.empty(16, dtype=torch.uint8)  # of random numbers


class OnGpu(TorchDispatchMode):
    """Fails at an operation that a CUDA graph cannot hold: one with a tensor on the CPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, out)):
            assert not isinstance(t, Tensor) or t.is_cuda, f"{func} in a CUDA graph: {t}"
        return out


class Graph:
    """A CUDA graph that counts how often it is captured and launched."""

    captures = launches = 0

    @classmethod
    @contextmanager
    def capture(cls, graph: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert stream is torch.cuda.Stream.return_value, "a stream of the tensors' GPU"
        assert capture_error_mode == "thread_local", "other threads may use the GPU"
        cls.captures += 1
        with OnGpu():
            yield

    def replay(self) -> None:
        Graph.launches += 1


def imagined() -> list[AbstractContextManager[Any]]:
    """Return what stands in for PyTorch's functions that need a real GPU."""
    record = Recorder.__torch_dispatch__

    def past_fake_tensors(
        self: Recorder, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # which only fake tensors ask for
            return func(*args)
        return record(self, func, types, args, kwargs)

    return [
        mock.patch.object(Tensor, "data_ptr", lambda t: id(t)),
        mock.patch.object(Recorder, "__torch_dispatch__", past_fake_tensors),
        mock.patch.object(torch.random, "fork_rng", return_value=nullcontext()),
        mock.patch.multiple(
            torch.cuda,
            CUDAGraph=Graph,
            graph=Graph.capture,
            Stream=mock.MagicMock(),
            current_stream=mock.MagicMock(),
            stream=lambda s: nullcontext(),
            device=lambda d: nullcontext(),
            get_rng_state=lambda device: STATE,
            set_rng_state=lambda state, device: None,
        ),
    ]


def train(name: str) -> None:
    """Do three iterations and a test; fake tensors of two devices do not mix, nor can be read."""
    case, every = CASES[name.removesuffix(CHECKPOINTS)], 1 if CHECKPOINTS in name else None
    algorithm = maml_plus_plus(STEPS.get(name, 2), 0.1, iterations_per_epoch=1)
    given = case.batch()
    with FakeTensorMode():
        with torch.device("cuda"):
            module = case.build()
            batch = TaskBatch(*(torch.empty(t.shape, dtype=t.dtype) for t in given.tensors()))
        learner = MetaLearner(module, algorithm, case.loss, replay=True, checkpoint_every=every)
        for learner.iteration in (0, 1, 99):  # of the first order twice, of the second
            metrics = learner.step(batch, check_finite=False)
            assert metrics.loss.is_cuda
        for _ in range(2):  # a graph from the second on
            assert learner.predict(batch, 3).is_cuda


if __name__ == "__main__":
    for context in imagined():
        context.__enter__()
    for name in sys.argv[1:]:
        train(name)
    print("captured", Graph.captures, "launched", Graph.launches)
