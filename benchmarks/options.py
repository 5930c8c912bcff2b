"""The options of a benchmark, from its command line."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, TypeVar

import tyro


class _WithFile(Protocol):
    @property
    def out(self) -> Path | None: ...


Options = TypeVar("Options", bound=_WithFile)


def options_of(kind: type[Options]) -> Options:
    """Return the options; the folder of what will be written is made now, not after measuring."""
    options = tyro.cli(kind)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    return options
