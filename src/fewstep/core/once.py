"""What depends on data alone, computed once for all inner steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
_MOST = 4  # values held at once; data made anew at each step are not met again
_found: ContextVar[dict[Hashable, tuple[Any, Any]] | None] = ContextVar("found", default=None)


@contextmanager
def one_batch() -> Iterator[None]:
    """Let `once` remember, for as long as the data of one batch are gone through."""
    token = _found.set({})
    try:
        yield
    finally:
        _found.reset(token)


def once(compute: Callable[..., T], *args: Hashable) -> T:
    """Return compute(*args), computed once for these very tensors within `one_batch`.

    Args:
        compute: Depends on its arguments alone.
        args: Anything hashable; tensors among them need no gradient and outlive the call.
    """
    found = _found.get()
    # A tensor of inference mode has no version.
    if found is None or any(isinstance(a, Tensor) and a.is_inference() for a in args):
        return compute(*args)
    key = (compute, *((id(a), a._version) if isinstance(a, Tensor) else a for a in args))
    if key not in found:
        if len(found) == _MOST:
            del found[next(iter(found))]
        found[key] = args, compute(*args)  # ids stay their own while tensors are held
    value: T = found[key][1]
    return value
