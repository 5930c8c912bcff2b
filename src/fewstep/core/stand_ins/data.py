"""Writing by `Tensor.data`, past the count of changes by which writing is noticed."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.errors import InputError
from fewstep.core.stand_ins.registry import stands_in_for


@stands_in_for(Tensor.data.__get__, always=True)  # type: ignore[attr-defined]
def get_data(t: Tensor) -> Tensor:
    """Return t without its graph: the same values, whose changes count as those of t."""
    return t.detach()


@stands_in_for(Tensor.data.__set__, always=True)  # type: ignore[attr-defined]
def set_data(t: Tensor, values: Tensor) -> None:
    """Write values into t, so that it counts as a change.

    Raises:
        InputError: they are of another kind.
    """
    if (t.shape, t.dtype) != (values.shape, values.dtype):
        raise InputError(
            f"the module assigns {tuple(values.shape)} of {values.dtype} to the .data of "
            f"{tuple(t.shape)} of {t.dtype}; make a new tensor, or one of that shape and type"
        )
    with torch.no_grad():
        t.detach().copy_(values)
