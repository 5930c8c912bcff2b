"""Batch normalisation by the batch's, the support set's or running statistics."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fewstep.core.errors import InputError

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
        """Return how many of the first rows the moments are taken over; None means all.

        Raises:
            InputError: a row is no example, so that the first could be any.
        """
        if self.examples is not None and self.of not in (None, rows):
            raise InputError(
                f"statistics='support' cannot tell the support set in the {rows} rows that a batch "
                f"norm gets for {self.of} examples; choose 'batch' or 'running'"
            )
        return self.examples

    def count(self, y: Tensor) -> int:
        """Return of how many elements of each channel the moments are."""
        return y[: self.first(len(y))].numel() // y.shape[1]

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
        self._taken_over: list[Tensor] | None = None
        if statistics.update is take_over:
            self._taken_over = []
            statistics = replace(statistics, update=self._take_over_once)
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
        if running_mean is None or running_var is None:
            if self._taken_over is not None:
                raise InputError(
                    "statistics='support' needs batch norms with track_running_stats=True to keep "
                    "them in"
                )
        elif by.update is not None:
            found = _moments(y.detach()) if by.running else Moments(mean.detach(), var.detach())
            by.update(running_mean, running_var, found, by.count(y), momentum)
        scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
        shift = -mean * scale if bias is None else bias - mean * scale
        to_channels = (1, -1, *[1] * (y.ndim - 2))
        return y * scale.view(to_channels) + shift.view(to_channels)

    def _take_over_once(self, mean: Tensor, *of_batch: Any) -> None:
        """Do `take_over`, unless there is something already, which it would replace."""
        assert self._taken_over is not None
        if any(mean is other for other in self._taken_over):
            raise InputError(
                "statistics='support' has one set of statistics for each batch norm, and one is "
                "called twice; choose 'batch' or 'running', or predict"
            )
        self._taken_over.append(mean)
        take_over(mean, *of_batch)


def _moments(y: Tensor) -> Moments:
    var, mean = torch.var_mean(y, [0, *range(2, y.ndim)], correction=0)
    return Moments(mean, var)
