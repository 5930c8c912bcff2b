"""Image sets prepared once: a memory-mapped uint8 array and a small file that describes it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from fewstep.core.cache import cache_folder
from fewstep.core.errors import InputError
from fewstep.core.files import write_atomically
from fewstep.data.archives import reading
from fewstep.data.store import ClassStore

Pixels = NDArray[np.uint8]

_DESCRIBED = {"names", "counts", "sha256"}
_DAY = 24 * 60 * 60.0  # seconds


@dataclass(frozen=True)
class RawClass:
    """A class before preparation.

    Args:
        name: Class name.
        readers: A function for each image, which returns its pixels, (channels, height, width).
    """

    name: str
    readers: Sequence[Callable[[], Pixels]]


def fingerprint(*parts: object) -> str:
    """Return a short name for what a prepared set was made from."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def stamp(files: Iterable[Path], root: Path) -> list[tuple[str, int, int]]:
    """Return what changes with the files: their paths below `root`, sizes and times."""
    return [
        (file.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns)
        for file in files
        for status in [file.stat()]
    ]


def load_or_prepare(
    name: str, source: str, shape: tuple[int, int, int], read: Callable[[], Sequence[RawClass]]
) -> ClassStore:
    """Return a prepared set, preparing it first if this source has not been prepared.

    Args:
        name: Data set name, the beginning of the file name.
        source: `fingerprint` of the source and the options; another one is prepared anew.
        shape: Channels, height and width of every image.
        read: Lists the classes; called only to prepare.

    Raises:
        InputError: what `read` raises, or the disk is full.
    """
    stem = cache_folder() / f"{name}-{source}".replace(".", "_")  # which would begin a suffix
    if not stem.with_suffix(".json").exists():
        _prepare(stem, shape, read())
    return _load(stem)


def verify_prepared(folder: Path) -> list[str]:
    """Compare every prepared array in `folder` with its recorded checksum.

    Returns:
        Names of the arrays.

    Raises:
        InputError: one differs, or cannot be read.
    """
    names: list[str] = []
    for path in sorted(folder.glob("*.json")):
        array = path.with_suffix(".npy")
        with reading(path):
            try:
                description = json.loads(path.read_bytes())
            except ValueError:
                description = None
            if description is None:  # damaged, or not ours
                is_ours, is_same = array.exists(), False
            else:
                is_ours = isinstance(description, dict) and description.keys() >= _DESCRIBED
                is_same = is_ours and array.exists() and _sha256(array) == description["sha256"]
        if is_ours and not is_same:
            raise InputError(
                f"{array} differs from what was prepared; remove {path} to prepare it again"
            )
        names += [path.stem] if is_ours else []
    return names


def _load(stem: Path) -> ClassStore:
    try:
        description = json.loads(stem.with_suffix(".json").read_text())
        images = np.load(stem.with_suffix(".npy"), mmap_mode="c")
        names, counts = description["names"], description["counts"]
        if len(images) != sum(counts) or len(names) != len(counts):
            raise ValueError("its length is wrong")
        return ClassStore.from_counts(torch.from_numpy(images), counts, names)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise InputError(
            f"the prepared set {stem} is damaged ({error}); remove {stem}.json to prepare it again"
        ) from error


def _prepare(stem: Path, shape: tuple[int, int, int], classes: Sequence[RawClass]) -> None:
    """Write the array, then the description that makes it count."""
    total = sum(len(c.readers) for c in classes)
    needed = total * math.prod(shape)
    temporary = stem.with_name(f".new-{secrets.token_hex(8)}")
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(stem.parent)
        if shutil.disk_usage(stem.parent).free < needed:
            raise OSError(errno.ENOSPC, "no space left")
        with temporary.open("xb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (total, *shape)}
            np.lib.format.write_array_header_2_0(file, header)
            readers = [read for c in classes for read in c.readers]
            for read in track(readers, f"preparing {stem.name}", transient=True):
                file.write(read().tobytes())
            file.flush()
            os.fsync(file.fileno())
        sha256 = _sha256(temporary)
        description = {
            "names": [c.name for c in classes],
            "counts": [len(c.readers) for c in classes],
            "sha256": sha256,
        }
        if (twin := _same_array(stem.parent, sha256)) is not None:
            _link(twin, temporary)
        temporary.replace(stem.with_suffix(".npy"))
        write_atomically(stem.with_suffix(".json"), json.dumps(description).encode())
    except OSError as error:
        raise InputError(
            f"cannot write {needed} bytes to {stem.parent}: {error.strerror}; free some space or "
            "set FEWSTEP_CACHE to another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _remove_abandoned(folder: Path) -> None:
    """Remove what preparations that were killed have left; one at work does not pause for a day."""
    for path in folder.glob(".new-*"):
        with contextlib.suppress(OSError):  # of another user, gone since, or a compiler's folder
            # The time of the change: a link has the time of writing of what it links to.
            if time.time() - path.stat().st_ctime > _DAY:
                path.unlink()


def _same_array(folder: Path, sha256: str) -> Path | None:
    """Return an array of this checksum, made of a source that was only moved or touched since."""
    for path in folder.glob("*.json"):
        array = path.with_suffix(".npy")
        with contextlib.suppress(OSError):  # of another user, or gone since
            if (
                array.exists()
                and f'"{sha256}"'.encode() in path.read_bytes()
                and _sha256(array) == sha256
            ):
                return array
    return None


def _link(array: Path, temporary: Path) -> None:
    """Let a copy of the array be the array itself, where the file system can."""
    link = temporary.with_name(f"{temporary.name}-link")
    with contextlib.suppress(OSError):
        link.hardlink_to(array)
        link.replace(temporary)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
