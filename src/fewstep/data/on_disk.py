"""What data sets read from a folder have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class OnDisk:
    """A data set that is read from a folder, given as a path or by its name."""

    root: Path | None = None
    """The folder."""

    def __post_init__(self) -> None:
        if self.root is not None:
            object.__setattr__(self, "root", Path(self.root))
