"""Tasks beside the channels: how a layer under `torch.vmap` sees all tasks at once."""

from __future__ import annotations

from typing import Any

from torch._C import _functorch
from torch.autograd import Function


def one_vmap_at_most() -> bool:
    """Whether this is called plainly, or under one `torch.vmap` and nothing else."""
    top = _functorch.peek_interpreter_stack()
    return top is None or (top.level() == 1 and top.key() == _functorch.TransformType.Vmap)


def joined(t: Any, now: int | None, at: int, tasks: int) -> Any:
    """Return a tensor of many tasks with their dimension, if it has one, joined to another."""
    if t is None:
        return None
    if now is None:
        t = t.unsqueeze(at).expand(*t.shape[:at], tasks, *t.shape[at:])
    else:
        t = t.movedim(now, at)
    return t.flatten(at, at + 1)


class Entrance(Function):
    """A function that only `torch.vmap` calls: subclasses do all tasks at once in `vmap`."""

    @staticmethod
    def forward(*_: Any) -> None:
        """Never called, but required by `Function`."""
        raise AssertionError("only torch.vmap calls this")

    @staticmethod
    def setup_context(*_: Any) -> None:
        """Never called, but required by `Function`."""
        raise AssertionError("only torch.vmap calls this")
