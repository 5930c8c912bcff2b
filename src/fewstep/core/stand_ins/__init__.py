"""Functions that stand in for PyTorch's: importing one registers it."""

from fewstep.core.stand_ins import (  # noqa: F401
    data,
    embedding,
    recurrent,
    under_vmap,
    weight_norm,
)
