"""Weight normalisation, whose second derivative PyTorch gets wrong.

The double backward of `torch._weight_norm` takes the norm of v for a constant (2.13, on CPUs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.stand_ins.registry import stands_in_for


@stands_in_for(torch._weight_norm, always=True)
def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return g v / |v|, with the norm over all dimensions but `dim`, or over all if that is -1."""
    others = [d for d in range(v.ndim) if dim == -1 or d != dim % v.ndim]
    norm: Tensor = torch.linalg.vector_norm(v, dim=others, keepdim=True)
    return v * (g / norm)
