"""What a module must be, and the mode that it is in while it is called for tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

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
    """Return the layer that owns a parameter, parametrized ones included."""
    layer, apart, _ = f".{name}".partition(".parametrizations.")
    return layer[1:] if apart else name.rpartition(".")[0]


def last_layer(names: Iterable[str]) -> str:
    """Return the layer of the last of a module's parameters, which usually gives the outputs."""
    *_, last = names
    return layer_of(last)


def check_module(module: nn.Module) -> None:
    """Refuse what cannot be called with parameters of others."""
    given: object = module
    if not isinstance(given, nn.Module):
        raise InputError(
            f"the module is a {type(given).__name__}; pass an instance of torch.nn.Module, whose "
            "forward calls what you have"
        )
    kind = type(module).__name__
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise InputError(
            f"{kind} is scripted, so its parameters cannot be exchanged; pass it as it was before "
            "torch.jit"
        )
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise InputError(
            f"{kind} splits a batch by examples, but batches are split by tasks; pass its .module, "
            "and ranks=Ranks.of_torchrun() for several GPUs"
        )
    for part in module.modules():
        if isinstance(part, nn.SyncBatchNorm) and torch.distributed.is_initialized():
            raise InputError(
                f"{kind} has nn.SyncBatchNorm, which would mix the tasks of several processes; "
                "pass it with nn.BatchNorm in its place"
            )
        if isinstance(part, nn.Embedding | nn.EmbeddingBag):
            layer = f"{kind} has {type(part).__name__}"
            if part.sparse:
                raise InputError(
                    f"{layer}(sparse=True), whose gradients have no second derivative; pass "
                    "sparse=False"
                )
            if part.max_norm is not None:
                raise InputError(
                    f"{layer}(max_norm={part.max_norm}), which changes its table when it is "
                    "called; leave max_norm out, and scale in forward what the table gives"
                )
    for name, parameter in module.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise InputError(f"`{name}` of {kind} has no shape yet; call {kind} on inputs before")
        if parameter.is_complex():
            raise InputError(
                f"`{name}` of {kind} is complex; keep it as torch.view_as_real(...) and "
                "call torch.view_as_complex on that in forward"
            )


def unit_buffers(module: nn.Module) -> list[str]:
    """Return the names of buffers that are unit vectors: those of spectral norm."""
    names = []
    for path, part in module.named_modules():
        own = [f"{path}." * bool(path) + name for name in part._buffers]
        if isinstance(part, _SpectralNorm):
            names += own
        hooks = part._forward_pre_hooks.values()
        of_hooks = {f"{h.name}_{v}" for h in hooks if isinstance(h, SpectralNorm) for v in "uv"}
        names += [name for name in own if name.rpartition(".")[2] in of_hooks]
    return names


def has_backward_hooks(parts: Iterable[nn.Module]) -> bool:
    """Whether a part has a backward hook, or there is one for all modules."""
    of_all = nn.modules.module._global_backward_hooks or (
        nn.modules.module._global_backward_pre_hooks
    )
    return bool(of_all) or any(m._backward_hooks or m._backward_pre_hooks for m in parts)


def generators_of(parts: Iterable[object]) -> list[torch.Generator]:
    """Return the generators that parts keep as attributes."""
    kept = (v for part in parts for v in getattr(part, "__dict__", {}).values())
    return [v for v in kept if isinstance(v, torch.Generator)]


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
