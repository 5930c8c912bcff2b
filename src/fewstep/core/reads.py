"""What is in a loss's graph: parameters that are learned, operations with derivatives enough."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node

from fewstep.core.errors import InputError
from fewstep.core.explained import NO_SECOND_DERIVATIVE

# What the decorator puts in place of every function is one code.
_ONCE = once_differentiable(lambda ctx: None).__code__
_OF_VMAP = "autograd_function"  # what a backward function that torch.vmap makes calls


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


def check_differentiable_twice(kind: str, loss: Tensor, of_tasks: Iterable[Tensor]) -> None:
    """Check that `torch.autograd.grad` would leave out no term of a loss's second derivative.

    It passes by the error that `once_differentiable` puts into the graph, which leads to no input.

    Args:
        kind: Of the module.
        loss: What is differentiated twice.
        of_tasks: What it is differentiated by; what is behind these is not looked at.

    Raises:
        InputError: a function on the way is differentiable once.
    """
    for node in _nodes_behind(loss, of_tasks):
        function = getattr(node, "_forward_cls", None)
        if function is not None and _is_once_differentiable(function.backward):
            reason = f"{function.__name__} is marked once_differentiable"
            raise InputError(NO_SECOND_DERIVATIVE.format(kind=kind, reason=reason))


def _is_once_differentiable(backward: Any) -> bool:
    """Whether a backward function is marked so, or calls one under `torch.vmap` that is."""
    code = getattr(backward, "__code__", None)
    if code is None or code is _ONCE:
        return code is _ONCE
    if _OF_VMAP not in code.co_freevars:
        return False
    inner = backward.__closure__[code.co_freevars.index(_OF_VMAP)].cell_contents
    return _is_once_differentiable(inner.backward)


def _parameters_behind(loss: Tensor, before: Iterable[Tensor]) -> Iterator[nn.Parameter]:
    """Yield the parameters, no other leaves, that a tensor's graph leads to before some tensors."""
    for node in _nodes_behind(loss, before):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter):
            yield leaf


def _nodes_behind(loss: Tensor, before: Iterable[Tensor]) -> Iterator[Node]:
    """Yield the nodes of a tensor's graph before those of some tensors."""
    met, ahead = {None, *(t.grad_fn for t in before)}, [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in met:
            continue
        met.add(node)
        yield node
        ahead += [before for before, _ in node.next_functions]
