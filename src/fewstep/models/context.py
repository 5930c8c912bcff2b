"""A learned vector beside each input, for an inner loop that adapts nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.core.errors import InputError


class Context(nn.Module):
    """Append a learned vector, of zeros at first, to each input.

    y = (x, c)

    With `fewstep.cavia(context="context.*")`, or what its name in a module is, the inner loop
    changes c alone, from zeros in each task, which tells the rest of the module what the task is;
    with `fewstep.anil(head="context.*")` the outer loop learns where c starts, too.

    Args:
        size: Numbers of the vector.

    Raises:
        InputError: `size` is below 1, or inputs have more dimensions, as images do.

    Shapes: (examples, features) to (examples, features + size), with steps or tokens between the
        two if there are any.

    Reference: Finn, Abbeel and Levine, ICML 2017, arXiv:1703.03400, which compares with it;
        Zintgraf et al., ICML 2019, arXiv:1810.03642.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise InputError(f"Context(size={size}) must be at least 1 number")
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Return inputs and vector side by side."""
        if x.ndim > 3:
            raise InputError(
                f"Context got inputs of shape {tuple(x.shape)}, whose rows it would widen; flatten "
                "images before it, such as by nn.Flatten()"
            )
        return torch.cat([x, self.vector.expand(*x.shape[:-1], -1)], -1)
