"""What depends on data alone, computed once for all inner steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
_MOST = 4  # values held at once; data made anew at each step are not met again
_found: ContextVar[dict[Hashable, tuple[Tensor, Any]] | None] = ContextVar("found", default=None)


@contextmanager
def one_batch() -> Iterator[None]:
    """Let `once` remember, for as long as the data of one batch are gone through."""
    token = _found.set({})
    try:
        yield
    finally:
        _found.reset(token)


def once(compute: Callable[..., T], data: Tensor, *args: Hashable) -> T:
    """Return compute(data, *args), computed once for this very tensor within `one_batch`.

    Args:
        compute: Depends on its arguments alone.
        data: A tensor that the caller keeps and no gradient goes to.
        args: What else it depends on.
    """
    found = _found.get()
    if found is None or data.is_inference():  # which has no version
        return compute(data, *args)
    key = (compute, id(data), data._version, *args)
    if key not in found:
        if len(found) == _MOST:
            del found[next(iter(found))]
        found[key] = data, compute(data, *args)  # the id stays its own while it is held
    value: T = found[key][1]
    return value
