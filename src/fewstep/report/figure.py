"""Writing a figure."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

from fewstep.core.errors import InputError
from fewstep.training.files import write_atomically


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG.

    Raises:
        InputError: `path` does not end in .png, or its folder does not exist.
    """
    if path.suffix != ".png":
        raise InputError(f"the picture {path} must end in .png; rename it")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} for the picture; make it first")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
