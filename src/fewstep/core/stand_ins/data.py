"""`Tensor.data`, past which a write would not be seen."""

from __future__ import annotations

from torch import Tensor

from fewstep.core.errors import InputError
from fewstep.core.stand_ins.registry import stands_in_for


@stands_in_for(Tensor.data.__get__, always=True)  # type: ignore[attr-defined]
def data(t: Tensor) -> Tensor:
    """Return t without its graph; unlike PyTorch's, it shares the count of what is written."""
    return t.detach()


@stands_in_for(Tensor.data.__set__, always=True)  # type: ignore[attr-defined]
def set_data(t: Tensor, value: Tensor) -> None:
    """Refuse it.

    Raises:
        InputError: always.
    """
    raise InputError(
        "the module assigns to .data when it is called, which no task and no derivative would see; "
        "compute with a new tensor, torch.renorm(self.weight, ...), or use "
        "torch.nn.utils.parametrize"
    )
