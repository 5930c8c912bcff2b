"""What is checked of the first call of a kind alone, as checking it takes time."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator
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

    def check_support_loss(self, loss: Tensor, order: int, of_tasks: Collection[Tensor]) -> None:
        """Check what a support loss reads, and that it can be differentiated so many times.

        Args:
            loss: Of all tasks.
            order: Of the derivative.
            of_tasks: The tasks' own parameters; what is behind these is not looked at.
        """
        kind = ("support loss", order)
        if kind in self._met:
            return
        check_reads("support loss", loss, self._module, self._judge.modules(), of_tasks)
        if order == 2:
            check_differentiable_twice(type(self._module).__name__, loss, of_tasks)
        self._met.add(kind)

    def check_meta_loss(self, loss: Tensor, kind: Hashable) -> None:
        """Check what a meta-loss of a kind reads."""
        kind = ("meta-loss", kind)
        if kind not in self._met:
            check_reads("meta-loss", loss, self._module, self._judge.modules())
            self._met.add(kind)

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
