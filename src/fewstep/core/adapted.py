"""Slot: the parameters that the inner loop changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
        fixed_start: Patterns of those that each task adapts from where they are now, and the outer
            loop leaves there (CAVIA's context).

    Raises:
        InputError: a string in place of a tuple; a pattern matches no parameter, or none is left
            (when they are chosen).
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    fixed_start: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, given in vars(self).items():
            patterns: object = given
            if isinstance(patterns, str):
                raise InputError(
                    f"{name}={patterns!r} is a string; give a tuple of patterns, ({patterns!r},)"
                )

    def choose(
        self, names: Iterable[str], others: Mapping[str, str] | None = None
    ) -> tuple[str, ...]:
        """Return those of `names` to adapt, in their order.

        Args:
            names: Of the parameters.
            others: Further names of some, as of tied weights, and which of `names` they are.
        """
        of = {name: name for name in names} | dict(others or {})
        names = list(dict.fromkeys(of.values()))
        found, left_out = (
            {of[n] for n in _matching(patterns, list(of))}
            for patterns in (self.include, self.exclude)
        )
        chosen = tuple(n for n in names if n in found and n not in left_out)
        if not chosen:
            raise InputError(f"{self} leaves no parameter to adapt; exclude fewer")
        return chosen

    def fixed(self, adapted: Iterable[str]) -> tuple[str, ...]:
        """Return those of the adapted ones whose start stays as it is."""
        return _matching(self.fixed_start, list(adapted))


def _matching(patterns: Iterable[str], names: list[str]) -> tuple[str, ...]:
    """Return the names that a pattern matches, in their order."""
    found: set[str] = set()
    for pattern in patterns:
        # A name matches itself: as a pattern "a[0]" would be "a0" alone.
        matched = [n for n in names if n == pattern or fnmatchcase(n, pattern)]
        if not matched:
            raise InputError(
                f"pattern {pattern!r} matches no parameter; the names are {', '.join(names)}"
            )
        found.update(matched)
    return tuple(name for name in names if name in found)
