"""What a loss reads: each parameter in its graph should be one that is learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fewstep.core.errors import InputError


def check_reads(
    what: str,
    loss: Tensor,
    module: nn.Module,
    functions: Iterable[nn.Module],
    of_tasks: Iterable[Tensor] = (),
) -> None:
    """Check that a loss reads no parameter that nothing would learn.

    Args:
        what: What it is called.
        loss: Its graph leads to copies of the parameters that are learned, and to nothing else.
        module: The module, whose parameters as they stand no task has.
        functions: Losses and metric, where they are modules.
        of_tasks: What it may read; what is behind these is not looked at.

    Raises:
        InputError: it reads one of the module, of a loss, or of somewhere else.
    """
    read = {id(p): tuple(p.shape) for p in _parameters_behind(loss, of_tasks)}
    if not read:
        return
    named = {id(p): f"`{n}`" for n, p in module.named_parameters()}
    for function in functions:
        kind = type(function).__name__
        named |= {id(p): f"`{n}` of {kind}" for n, p in function.named_parameters()}
    if known := [name for parameter, name in named.items() if parameter in read]:
        raise InputError(
            f"the {what} reads {known[0]} past the call of the module, as a penalty on "
            "module.parameters() does; each task has its own copy, so that nothing would be "
            "learned of it; let the module return what the loss needs"
        )
    shape, *_ = read.values()
    raise InputError(
        f"the {what} reads a parameter of shape {shape} that nothing would learn; register it "
        "in the module (lists by nn.ModuleList) or in a support_loss, return it in the table of "
        "the algorithm's part, .detach() inputs that it made, or freeze it by "
        ".requires_grad_(False)"
    )


def once_differentiable_behind(loss: Tensor) -> str | None:
    """Return the name of an operation in a graph that PyTorch leaves out of second derivatives.

    `torch.autograd.grad` passes by what `once_differentiable` marks, where `backward` complains.
    """
    for node in _behind(loss, ()):
        function = getattr(node, "_forward_cls", None)
        if function is not None and _is_once_differentiable(function):
            return str(node.name())
    return None


def _is_once_differentiable(function: type) -> bool:
    """Whether a Function is marked, or one that `torch.vmap` made of it."""
    backward = getattr(function, "backward", None)
    code = getattr(backward, "__code__", None)
    if code is None:
        return False
    if code.co_filename == once_differentiable.__code__.co_filename and code.co_name == "wrapper":
        return True
    around = [cell.cell_contents for cell in getattr(backward, "__closure__", None) or ()]
    return any(_is_once_differentiable(f) for f in around if isinstance(f, type) and f != function)


def _parameters_behind(loss: Tensor, before: Iterable[Tensor]) -> Iterator[nn.Parameter]:
    """Yield the parameters, no other leaves, that a tensor's graph leads to before some tensors."""
    for node in _behind(loss, before):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter):
            yield leaf


def _behind(loss: Tensor, before: Iterable[Tensor]) -> Iterator[Any]:
    """Yield the operations that a tensor's graph leads to before some tensors."""
    met, ahead = {None, *(t.grad_fn for t in before)}, [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in met:
            continue
        met.add(node)
        yield node
        ahead += [before for before, _ in node.next_functions]
