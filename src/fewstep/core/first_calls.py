"""What is checked of the first call of a kind alone, as checking it takes time."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fewstep.core.calls import put_back_if_refused
from fewstep.core.judge import Judge
from fewstep.core.reads import check_differentiable_twice, check_reads


class FirstCalls:
    """Checks what calls of a module read and write, once for each kind of call.

    Args:
        module: The module.
        judge: Losses and metric.
    """

    def __init__(self, module: nn.Module, judge: Judge) -> None:
        self._module = module
        self._judge = judge
        self._met: set[Hashable] = set()

    def check_reads(
        self, what: str, loss: Tensor, kind: Hashable, of_tasks: Iterable[Tensor] = ()
    ) -> None:
        """Check a loss as `reads.check_reads` does."""
        if (what, kind) not in self._met:
            check_reads(what, loss, self._module, self._judge.modules(), of_tasks)
            self._met.add((what, kind))

    def check_differentiable_twice(self, loss: Tensor, of_tasks: Iterable[Tensor]) -> None:
        """Check a support loss as `reads.check_differentiable_twice` does."""
        if "twice" not in self._met:
            check_differentiable_twice(type(self._module).__name__, loss, of_tasks)
            self._met.add("twice")

    @contextmanager
    def undone_if_refused(
        self, parameters: Iterable[Tensor], inputs: list[Tensor], kind: Hashable
    ) -> Iterator[None]:
        """Put back what a refused call has written into parameters or inputs."""
        kind = ("written", kind, *(t.shape for t in inputs))
        if kind in self._met:
            yield
            return
        with put_back_if_refused([*parameters, *inputs]):
            yield
        self._met.add(kind)
