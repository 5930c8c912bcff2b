"""Tensors by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Tensors = dict[str, Tensor]


def below(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    """Return those whose names begin with a prefix, by the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
