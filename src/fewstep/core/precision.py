"""Less exact and faster products, where a device has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from fewstep.core.errors import InputError
from fewstep.core.process_wide import ProcessWide

Precision = Literal["float32", "tf32", "bfloat16"]


@contextmanager
def _rounded_to(kind: str) -> Iterator[None]:
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    backends = (torch.backends.cuda.matmul, conv)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = kind
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


_PRODUCTS = {kind: ProcessWide(partial(_rounded_to, kind)) for kind in ("tf32", "ieee")}
_CHOICE = Lock()


@contextmanager
def fp32_products(precision: Precision) -> Iterator[None]:
    """Choose what a GPU rounds the factors of float32 products to, for a while.

    PyTorch's own choice is TF32 (10 bits) in convolutions and float32 (23 bits) in matrix products.

    Raises:
        InputError: another choice is in force, as it is one for all threads.
    """
    mine, other = ("tf32", "ieee") if precision == "tf32" else ("ieee", "tf32")
    with _CHOICE:
        if _PRODUCTS[other].is_inside:
            raise InputError(
                f"precision={precision!r} was asked for while a learner of another precision is at "
                "work, and PyTorch has one for all threads; let one learner finish first, or give "
                "both the same"
            )
        _PRODUCTS[mine].__enter__()
    try:
        yield
    finally:
        _PRODUCTS[mine].__exit__()


@contextmanager
def forward_pass(precision: Precision, device: torch.device) -> Iterator[None]:
    """Let the products of a forward pass, and so of its derivatives, be bfloat16 where asked."""
    if precision != "bfloat16":
        yield
        return
    with torch.autocast(device.type, torch.bfloat16), _RoundedConvolutions():
        yield


class _RoundedConvolutions(TorchFunctionMode):
    """Rounds the factors of convolutions, which `torch.vmap` takes past autocast."""

    _ROUNDED = (
        torch.conv1d, torch.conv2d, torch.conv3d,
        torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    )  # fmt: skip

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function, a convolution with its float32 tensors rounded."""
        kwargs = kwargs or {}
        if func in self._ROUNDED:
            args, kwargs = tree_map_only(Tensor, _rounded, (args, kwargs))
        return func(*args, **kwargs)


def _rounded(t: Tensor) -> Tensor:
    is_wanted = t.dtype == torch.float32 and torch.is_autocast_enabled(t.device.type)
    return t.bfloat16() if is_wanted else t
