"""What a module must be, and how it is while it is called for tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase

from fewstep.core.errors import InputError
from fewstep.core.process_wide import ProcessWide


def under_two_names(module: nn.Module) -> list[nn.Module]:
    """Return the parts that are registered twice."""
    met: set[nn.Module] = set()
    again: list[nn.Module] = []
    for _, part in module.named_modules(remove_duplicate=False):
        (again.append if part in met else met.add)(part)
    return again


def layer_of(name: str) -> str:
    """Return the layer that a parameter is of, also one that `nn.utils.parametrize` put apart."""
    layer, apart, _ = f".{name}".partition(".parametrizations.")
    return layer[1:] if apart else name.rpartition(".")[0]


def last_layer(names: Iterable[str]) -> str:
    """Return the layer of the last of a module's parameters, which usually gives the outputs."""
    *_, last = names
    return layer_of(last)


def check_module(module: nn.Module) -> None:
    """Refuse what cannot be called with parameters of others."""
    kind = type(module).__name__
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise InputError(
            f"{kind} is scripted, so its parameters cannot be exchanged; pass it as it was before "
            "torch.jit"
        )
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise InputError(
            f"{kind} divides batches of examples, and tasks are to be divided; pass its .module, "
            "and ranks=Ranks.of_torchrun() for several GPUs"
        )
    for name, parameter in module.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise InputError(f"`{name}` of {kind} has no shape yet; call {kind} on inputs before")
        if parameter.is_complex():
            raise InputError(
                f"`{name}` of {kind} is complex; keep it as torch.view_as_real(...) and "
                "call torch.view_as_complex on that in forward"
            )


@contextmanager
def nothing_left_behind(parts: list[nn.Module]) -> Iterator[None]:
    """Take back what a call under `torch.vmap` puts into attributes: tensors nothing can read."""
    before = [(part, dict(vars(part))) for part in parts]
    try:
        yield
    finally:
        for part, attributes in before:
            for name, value in list(vars(part).items()):
                if not isinstance(value, Tensor) or not _functorch.is_batchedtensor(value):
                    continue
                if name in attributes:
                    vars(part)[name] = attributes[name]
                else:
                    del vars(part)[name]


def set_mode(module: nn.Module, *, is_training: bool) -> None:
    """Set training or evaluation mode, batch normalisation as in training in both."""
    for part in module.modules():
        mode = is_training or isinstance(part, _NormBase)
        if part.training != mode:  # setting an attribute of a module takes microseconds
            part.training = mode


@contextmanager
def _differentiable_twice() -> Iterator[None]:
    """Choose kernels that have a second derivative: fused attention has none."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


DIFFERENTIABLE_TWICE = ProcessWide(_differentiable_twice)
