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
        include: Patterns of names to adapt; `("head.*",)` adapts the head only (ANIL). A name
            matches itself, whatever it holds.
        exclude: Patterns of names to leave out of those.

    Raises:
        InputError: a string in place of a tuple; a pattern matches no parameter, or none is left
            (when they are chosen).
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given: dict[str, object] = {"include": self.include, "exclude": self.exclude}
        for name, patterns in given.items():
            if isinstance(patterns, str):
                raise InputError(
                    f"{name}={patterns!r} is a string; give a tuple of patterns, ({patterns!r},)"
                )

    def choose(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return those of `names` to adapt, in their order."""
        names = list(names)
        for pattern in (*self.include, *self.exclude):
            if not any(_matches(name, pattern) for name in names):
                raise InputError(
                    f"pattern {pattern!r} matches no parameter; the names are {', '.join(names)}"
                )
        chosen = tuple(
            name
            for name in names
            if any(_matches(name, p) for p in self.include)
            and not any(_matches(name, p) for p in self.exclude)
        )
        if not chosen:
            raise InputError(f"{self} leaves no parameter to adapt; exclude fewer")
        return chosen


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)  # "a[0]" would be "a0" alone
