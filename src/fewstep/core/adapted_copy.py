"""A module adapted to one task, on its own."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from fewstep.core.inner import InnerLoop
from fewstep.core.modules import set_mode
from fewstep.core.norm import Use
from fewstep.core.normalise import NormaliseBy, Statistics, take_over
from fewstep.core.once import one_batch
from fewstep.core.tasks import TaskBatch


def adapted_copy(
    loop: InnerLoop, x_support: Tensor, y_support: Tensor, num_steps: int, use: Use
) -> nn.Module:
    """Return a copy of the module after `num_steps` inner steps on one task.

    Args:
        loop: What adapts, and the module.
        x_support: Inputs, (examples, ...).
        y_support: Targets, (examples, ...).
        num_steps: Inner steps.
        use: What batch normalisation normalises by.
    """
    batch = TaskBatch(x_support[None], y_support[None], x_support[None], y_support[None])
    rows = loop.meta.rows
    with torch.no_grad(), loop.mode(is_training=False, use=use), one_batch():
        module = copy.deepcopy(loop.network.module, _left_behind(loop.network.module))
        *_, last = loop.trajectory(batch, num_steps, derivative_order=1)
        theta = rows.pick_parameters(last.theta, num_steps, is_query=True)
        buffers = rows.pick_buffers(last.buffers, num_steps)
        for name, parameter in module.named_parameters():
            parameter.copy_(theta[name][0])
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name][0])
        set_mode(module, is_training=False)
        if use == "support":
            with NormaliseBy(Statistics(update=take_over)):
                module(x_support)
    if use != "batch":
        for part in module.modules():
            part.training = part.training and not isinstance(part, _BatchNorm)
    return module


def _left_behind(module: nn.Module) -> dict[int, None]:
    """Return what a forward pass left in attributes, by id: no copy of the module may have it."""
    values = [each for part in module.modules() for each in tree_leaves(vars(part))]
    return {
        id(t): None
        for t in values
        if isinstance(t, Tensor) and (_functorch.is_batchedtensor(t) or not t.is_leaf)
    }
