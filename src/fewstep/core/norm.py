"""Slots of normalisation: which statistics, and whose scale and shift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fewstep.core.errors import check_name
from fewstep.core.tensors import Tensors

Use = Literal["batch", "support", "running"]
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
        if not has_batch_norm(module):
            return "none (no batch norm)"
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
        adapted: Let the inner loop change the rows too: step k changes row k. Else it leaves them
            alone, whatever `Algorithm.adapted` names.

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

    parameters: frozenset[str]
    buffers: frozenset[str]

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


def has_batch_norm(module: nn.Module) -> bool:
    """Tell whether any part normalises by statistics that there is a choice of."""
    return bool(_parts(module, _BatchNorm))
