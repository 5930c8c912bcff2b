"""Slot: the parameters that the inner loop changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fewstep.core.errors import InputError


@dataclass(frozen=True)
class AdaptedParameters:
    """The parameters that the inner loop changes, by shell-style name patterns.

    The others are learned by the outer loop alone.

    Args:
        include: Patterns of names to adapt; `("head.*",)` adapts the head only (ANIL).
        exclude: Patterns of names to leave out of those.

    Raises:
        InputError: a pattern matches no parameter, or none is left (when they are chosen).
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def choose(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return those of `names` to adapt, in their order."""
        names = list(names)
        for pattern in (*self.include, *self.exclude):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise InputError(
                    f"pattern {pattern!r} matches no parameter; the names are {', '.join(names)}"
                )
        chosen = tuple(
            name
            for name in names
            if any(fnmatchcase(name, p) for p in self.include)
            and not any(fnmatchcase(name, p) for p in self.exclude)
        )
        if not chosen:
            raise InputError(f"{self} leaves no parameter to adapt; exclude fewer")
        return chosen
