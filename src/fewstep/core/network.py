"""Any `nn.Module`, called for many tasks at once with parameters of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase

from fewstep.core.errors import InputError

Tensors = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the share of examples whose largest output is the target class.

    >>> accuracy(torch.eye(2), torch.tensor([0, 0])).item()
    0.5
    """
    return (outputs.argmax(-1) == targets).to(outputs.dtype).mean()


class TaskNetwork:
    """A module and its loss as a function of stacked parameters: one set for each task.

    The module is called through `torch.func.functional_call` and is not changed. One call serves
    all tasks through `torch.vmap`, or, with `vectorize=False`, a loop that needs no batching rule
    and serves as the reference.

    Args:
        module: Maps a batch of inputs to a batch of outputs.
        loss: (outputs, targets) of one task to a scalar.
        metric: (outputs, targets) of one task to a scalar that is reported, never differentiated;
            None takes the accuracy where targets are integers and the loss elsewhere.
        vectorize: Use `torch.vmap`; else loop over the tasks.

    Raises:
        InputError: the module has a part that cannot be vectorised (when it is called).
    """

    def __init__(
        self, module: nn.Module, loss: Loss, metric: Loss | None, *, vectorize: bool
    ) -> None:
        self.module = module
        self.loss = loss
        self.metric = metric
        self.vectorize = vectorize

    def __call__(
        self, parameters: Tensors, buffers: Tensors, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensors]:
        """Return losses (tasks,), metric values (tasks,) and the buffers after the call.

        Args:
            parameters: By name, each (tasks, *shape).
            buffers: By name, each (tasks, *shape).
            x: Inputs, (tasks, examples, ...).
            y: Targets, (tasks, examples, ...).
        """
        with _differentiable_twice():
            if not self.vectorize:
                return self._loop(parameters, buffers, x, y)
            try:
                return torch.vmap(self._one_task, randomness="different")(parameters, buffers, x, y)
            except RuntimeError as error:
                if "vmap" not in str(error) and "atching rule" not in str(error):
                    raise
                recurrent = [f"`{n}` ({type(m).__name__})" for n, m in self.module.named_modules()
                             if isinstance(m, nn.RNNBase)]  # fmt: skip
                culprit = ", ".join(recurrent) or type(self.module).__name__
                reason = str(error).splitlines()[0]
                raise InputError(
                    f"{culprit} cannot be vectorised over tasks ({reason}); "
                    "pass vectorize=False to loop over the tasks instead"
                ) from error

    def metric_for(self, targets: Tensor) -> Loss:
        """Return the metric that is reported for such targets."""
        return self.metric or (self.loss if targets.is_floating_point() else accuracy)

    def metric_name(self, targets: Tensor) -> str:
        """Name the metric that is reported for such targets."""
        metric = self.metric_for(targets)
        return "loss" if metric is self.loss else getattr(metric, "__name__", "metric")

    def _loop(
        self, parameters: Tensors, buffers: Tensors, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensors]:
        results = [
            self._one_task(
                {n: p[j] for n, p in parameters.items()},
                {n: b[j] for n, b in buffers.items()},
                x[j],
                y[j],
            )
            for j in range(x.shape[0])
        ]
        losses, metrics, after = zip(*results, strict=True)
        stacked = {n: torch.stack([b[n] for b in after]) for n in buffers}
        return torch.stack(losses), torch.stack(metrics), stacked

    def _one_task(
        self, parameters: Tensors, buffers: Tensors, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensors]:
        buffers = {name: b.clone() for name, b in buffers.items()}  # modules update them in place
        outputs = functional_call(self.module, (parameters, buffers), (x,))
        loss = self.loss(outputs, y)
        if loss.ndim != 0:
            raise InputError(
                f"the loss returned shape {tuple(loss.shape)} for one task; it must return a "
                "scalar, for instance the mean over the examples"
            )
        return (
            loss,
            self.metric_for(y)(outputs.detach(), y),
            {n: b.detach() for n, b in buffers.items()},
        )

    @contextmanager
    def mode(self, *, is_training: bool) -> Iterator[None]:
        """Set the module's mode for a while: training, or evaluation with batch statistics.

        In evaluation dropout is off, while batch normalisation goes on using the statistics of
        the batch at hand (transductive), as the published numbers of MAML do.
        """
        before = [(m, m.training) for m in self.module.modules()]
        set_mode(self.module, is_training=is_training)
        try:
            yield
        finally:
            for module, mode in before:
                module.training = mode


def set_mode(module: nn.Module, *, is_training: bool) -> None:
    """Set training or evaluation mode, normalisation by batch statistics in both."""
    for part in module.modules():
        part.training = is_training or isinstance(part, _NormBase)


def normalisation_statistics(module: nn.Module) -> str:
    """Name the statistics that the module's normalisation uses, to be printed with every score."""
    has_batch_norm = any(isinstance(part, _NormBase) for part in module.modules())
    return "batch (transductive)" if has_batch_norm else "per example"


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
