"""What a part of a module is given when the module is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fewstep.core.errors import InputError


class Watch:
    """What a part was given, and what it and the module gave, in the last call."""

    def __init__(self, module: nn.Module, part: nn.Module) -> None:
        self._module, self._part = module, part
        self._given: list[object] = []
        self._gave: dict[nn.Module, object] = {}

    def begin(self) -> None:
        """Forget the call before."""
        self._given.clear()
        self._gave.clear()

    def given(self, name: str, *, is_last: bool) -> Tensor:
        """Return the first of what the part was given.

        Args:
            name: The part's, for messages.
            is_last: The part must be the one whose outputs the module returned.

        Raises:
            InputError: it was not called once with a tensor, or is not the last.
        """
        kind = type(self._module).__name__
        found = self._given[0] if len(self._given) == 1 else None
        if not isinstance(found, Tensor):
            count = len(self._given)
            times = "with a tensor" if count == 1 else f"once, but {count} times"
            raise InputError(f"{kind} does not call its part {name!r} {times}; name another")
        if is_last and self._gave[self._part] is not self._gave[self._module]:
            raise InputError(
                f"{kind} does not return what its part {name!r} gives, the layer of its last "
                "parameter; name the one that gives its outputs"
            )
        return found

    def note_given(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Note what the part is about to be called with."""
        first = next(iter((*args, *named.values())), None)
        # As it is now, before a part that works in place changes it.
        self._given.append(first.clone() if isinstance(first, Tensor) else first)

    def note_gave(self, called: nn.Module, _: object, outputs: object) -> None:
        """Note what the part, or the module, has returned."""
        self._gave[called] = outputs


@contextmanager
def watching(module: nn.Module, part: nn.Module) -> Iterator[Watch]:
    """Watch a part of a module for a while."""
    watch = Watch(module, part)
    hooks = [
        part.register_forward_pre_hook(watch.note_given, with_kwargs=True),
        *(each.register_forward_hook(watch.note_gave) for each in {part, module}),
    ]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()
