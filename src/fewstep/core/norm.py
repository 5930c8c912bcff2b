"""Slots of normalisation: which statistics, and whose scale and shift."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from fewstep.core.errors import InputError, check_name

Use = Literal["batch", "support", "running"]
Tensors = dict[str, Tensor]
_WITH_AFFINE = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class NormStatistics:
    """What batch normalisation normalises by (BNRS where `per_step`).

    z = gamma * (y - mean) / sqrt(var + eps) + beta

    Args:
        use: Where mean and var come from. "batch": the examples at hand, so that the query
            examples of a task see each other (transductive; what published MAML numbers used).
            "support": the support set, under the same parameters, for support and query alike.
            "running": running statistics, as they stand before the call at hand; training moves
            them with each call.
        per_step: Keep running statistics for each point of the trajectory: row k, of
            num_steps + 1, belongs to theta[k].

    Raises:
        InputError: unknown `use`.

    Deviation: the authors' code collects a row for each step and never uses it; its row k mixes
        the support set under theta[k] with the query set under theta[k+1]. Here "running" uses
        them, as the paper says.

    Reference: Antoniou, Edwards and Storkey, How to train your MAML, ICLR 2019, arXiv:1810.09502;
        "support": Bronskill et al., TaskNorm, ICML 2020, arXiv:2003.03284 (MetaBN).
    """

    use: Use = "batch"
    per_step: bool = False

    def __post_init__(self) -> None:
        check_name("statistics", self.use, get_args(Use))

    def rows(self, module: nn.Module, num_steps: int) -> dict[str, int]:
        """Return the names of the buffers that have rows, with their number."""
        parts = _parts(module, _BatchNorm) if self.per_step else {}
        return {f"{part}{name}": num_steps + 1
                for part, norm in parts.items() for name, _ in norm.named_buffers(recurse=False)
                }  # fmt: skip

    def describe(self, module: nn.Module) -> str:
        """Return what to print beside a score."""
        if not _parts(module, _BatchNorm):
            return "per example"
        step = " of each step" if self.per_step else ""
        return {"batch": "batch (transductive)", "support": "support set",
                "running": f"running averages{step}"}[self.use]  # fmt: skip


@dataclass(frozen=True)
class SharedAffine:
    """One scale and shift for all steps, adapted like any other parameter."""

    per_step = False

    def rows(self, module: nn.Module, num_steps: int) -> dict[str, int]:
        """Return the names of the parameters that have rows, with their number: none."""
        return {}

    def outer_only(self, module: nn.Module) -> tuple[str, ...]:
        """Return the names that the inner loop must leave alone: none."""
        return ()


@dataclass(frozen=True)
class PerStepAffine:
    """A scale and shift of every normalisation layer for each step, learned outside (BNWB).

    Row k, of num_steps, serves the support set under theta[k] and the query set under theta[k+1].
    Layers are batch, layer, group and RMS norms, found by type; their parameters are stacked and
    the module is left as it is.

    Args:
        adapted: Let the inner loop change the rows too: step k changes row k.

    Deviation: none from the authors' code; where that adapts the scale and shift, it shares them
        among the steps (`SharedAffine` here).

    Reference: Antoniou, Edwards and Storkey, How to train your MAML, ICLR 2019, arXiv:1810.09502.
    """

    adapted: bool = False
    per_step = True

    def rows(self, module: nn.Module, num_steps: int) -> dict[str, int]:
        """Return the names of the parameters that have rows, with their number."""
        return {
            f"{part}{name}": max(num_steps, 1)
            for part, norm in _parts(module, _WITH_AFFINE).items()
            for name, parameter in norm.named_parameters(recurse=False)
            if parameter.requires_grad
        }

    def outer_only(self, module: nn.Module) -> tuple[str, ...]:
        """Return the names that the inner loop must leave alone."""
        return () if self.adapted else tuple(self.rows(module, 1))


NormAffine = SharedAffine | PerStepAffine


@dataclass(frozen=True)
class StepRows:
    """Picks the rows of a point out of stacked tensors, (tasks, rows, *shape).

    After the last row, the last row serves.

    Args:
        parameters: Names of the parameters with rows.
        buffers: Names of the buffers with rows.
    """

    parameters: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()

    def pick_parameters(self, theta: Tensors, step: int, *, is_query: bool) -> Tensors:
        """Return what the module is given on a set of the point after `step` steps."""
        row = max(step - 1, 0) if is_query else step
        return {n: _row(p, row) if n in self.parameters else p for n, p in theta.items()}

    def pick_buffers(self, buffers: Tensors, step: int) -> Tensors:
        """Return the buffers that the module is given."""
        return {n: _row(b, step) if n in self.buffers else b for n, b in buffers.items()}

    def put_buffers(self, buffers: Tensors, step: int, after: Tensors) -> Tensors:
        """Return all buffers, with those of a row as they are after the call."""
        return {n: _with_row(b, step, after[n]) if n in self.buffers else after[n]
                for n, b in buffers.items()}  # fmt: skip


def _row(stacked: Tensor, row: int) -> Tensor:
    return stacked[:, min(row, stacked.shape[1] - 1)]


def _with_row(stacked: Tensor, row: int, value: Tensor) -> Tensor:
    stacked = stacked.clone()
    stacked[:, min(row, stacked.shape[1] - 1)] = value
    return stacked


def _parts(module: nn.Module, types: Any) -> dict[str, nn.Module]:
    """Return the modules of some types, by the prefix of their tensors' names."""
    return {f"{n}." if n else "": m for n, m in module.named_modules() if isinstance(m, types)}


Update = Callable[[Tensor, Tensor, "Moments", int, "float | Tensor"], None]


class Moments(NamedTuple):
    """Mean and variance of each channel, (channels,)."""

    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class Statistics:
    """What a call of batch normalisation normalises by, and leaves in its running statistics.

    Args:
        examples: Its moments are those of so many examples, the first; None takes all.
        of: How many examples there are, to find layers that get other rows (time steps or patches
            folded into the batch).
        running: It normalises by the running statistics in place of its moments.
        update: Changes running mean and variance, given the moments, of how many elements they
            are, and the momentum; None leaves them as they are.
    """

    examples: int | None = None
    of: int | None = None
    running: bool = False
    update: Update | None = None

    def first(self, rows: int) -> int | None:
        """Return of how many of these rows the moments are, the first; None: of all.

        Raises:
            InputError: a row is no example, so that the first could be any.
        """
        if self.examples is not None and self.of not in (None, rows):
            raise InputError(
                f"statistics='support' cannot tell the support set in the {rows} rows that a batch "
                f"norm gets for {self.of} examples; choose 'batch' or 'running'"
            )
        return self.examples

    @property
    def needs_moments(self) -> bool:
        """Whether moments have to be taken."""
        return not self.running or self.update is not None

    def given(self, mean: Tensor | None, var: Tensor | None) -> Moments | None:
        """Return running statistics to normalise by, as they stand; None: take the moments."""
        if not self.running:
            return None
        if mean is None or var is None:
            raise InputError(
                "statistics='running' needs batch norms with track_running_stats=True; "
                "choose 'batch' or 'support'"
            )
        return Moments(mean.clone(), var.clone())


def follow(mean: Tensor, var: Tensor, batch: Moments, count: int, momentum: float | Tensor) -> None:
    """Move running statistics towards a batch's, as `nn.BatchNorm2d` does: variance unbiased."""
    unbiased = batch.var * (count / max(count - 1, 1))
    mean.mul_(1 - momentum).add_(batch.mean * momentum)
    var.mul_(1 - momentum).add_(unbiased * momentum)


def take_over(
    mean: Tensor, var: Tensor, batch: Moments, count: int, momentum: float | Tensor
) -> None:
    """Leave a batch's moments in the running statistics, uncorrected."""
    mean.copy_(batch.mean)
    var.copy_(batch.var)


OF_BATCH = Statistics(update=follow)
_innermost: ContextVar[Statistics] = ContextVar("innermost", default=OF_BATCH)


class NormaliseBy(TorchFunctionMode):
    """While active, every batch normalisation in training mode goes by other statistics."""

    def __init__(self, statistics: Statistics) -> None:
        super().__init__()
        self._statistics = statistics

    @staticmethod
    def innermost() -> Statistics:
        """Return what normalisation goes by here, in this thread."""
        return _innermost.get()

    def __enter__(self) -> NormaliseBy:
        self._token = _innermost.set(self._statistics)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _innermost.reset(self._token)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace `batch_norm` in training mode; call anything else as it is."""
        kwargs = kwargs or {}
        return self._batch_norm(*args, **kwargs) if func is F.batch_norm else func(*args, **kwargs)

    def _batch_norm(
        self,
        y: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(y, running_mean, running_var, weight, bias, False, momentum, eps)
        by = self._statistics
        mean, var = by.given(running_mean, running_var) or _moments(y[: by.first(len(y))])
        if by.update is not None:
            if running_mean is None or running_var is None:
                raise InputError(
                    "statistics='support' needs batch norms with track_running_stats=True to keep "
                    "them in"
                )
            found = _moments(y.detach()) if by.running else Moments(mean.detach(), var.detach())
            by.update(running_mean, running_var, found, y.numel() // y.shape[1], momentum)
        scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
        shift = -mean * scale if bias is None else bias - mean * scale
        to_channels = (1, -1, *[1] * (y.ndim - 2))
        return y * scale.view(to_channels) + shift.view(to_channels)


def _moments(y: Tensor) -> Moments:
    var, mean = torch.var_mean(y, [0, *range(2, y.ndim)], correction=0)
    return Moments(mean, var)
