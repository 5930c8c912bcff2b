import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Every test prepares into a folder of its own, and finds no data by chance."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEWSTEP_DATA", raising=False)
    return tmp_path / "cache"


def real_data(name: str) -> Path:
    """Return the folder of a real data set, or skip."""
    folder = Path(os.environ.get("FEWSTEP_DATA", "")) / name
    if "FEWSTEP_DATA" not in os.environ or not folder.is_dir():
        pytest.skip(f"FEWSTEP_DATA names no folder with {name}")
    return folder


def image_bytes(value: int, size: int = 8, mode: str = "RGB", kind: str = "PNG") -> bytes:
    """Return an image file of one colour."""
    shape = (size, size, 3) if mode == "RGB" else (size, size)
    buffer = io.BytesIO()
    Image.fromarray(np.full(shape, value, dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write_images(root: Path, classes: dict[str, int]) -> None:
    """Write `classes[name]` images into each class folder, the class's number as their colour."""
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i:03d}.png").write_bytes(image_bytes(10 * number + i))


def deny(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Let a file or folder not be opened or listed, as permissions do to all but root."""

    def refusing(allowed):
        def refuse(given=".", *args, **kwargs):
            if not isinstance(given, int) and Path(given) == path:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(given))
            return allowed(given, *args, **kwargs)

        return refuse

    for module, name in ((os, "scandir"), (os, "listdir"), (io, "open")):
        monkeypatch.setattr(module, name, refusing(getattr(module, name)))
