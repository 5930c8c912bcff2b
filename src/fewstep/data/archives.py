"""Image files by name, from folders and archives, which are never unpacked to the disk."""

from __future__ import annotations

import lzma
import os
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from PIL import Image

from fewstep.core.errors import InputError

# Of what Pillow opens, pictures; icons, drawings of layers, films and tables are not.
_FORMATS = frozenset(
    {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"}
)
_OF_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, OSError, EOFError,
    RuntimeError,
)  # fmt: skip


def is_image(name: str) -> bool:
    """Tell by its suffix whether a file is an image; hidden files are not.

    >>> is_image("a/b.JPG"), is_image("a/._b.jpg"), is_image("a/labels.csv")
    (True, False, False)
    """
    path = PurePosixPath(name)
    return path.suffix.lower() in _suffixes() and not path.name.startswith(".")


@cache
def _suffixes() -> frozenset[str]:
    return frozenset(s for s, of in Image.registered_extensions().items() if of in _FORMATS)


def warn_of_empty(folders: Iterable[Path]) -> None:
    """Warn of folders of classes that hold no image, if there are any."""
    named = [str(folder) for folder in folders]
    if named:
        warnings.warn(
            f"folders without an image are no classes, {len(named)} in all, such as {named[0]}; "
            "save images of other kinds as PNG or JPEG",
            stacklevel=2,
        )


def folders_in(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted, but for what is hidden and what macOS's zips add."""
    return sorted(
        p for p in folder.iterdir() if p.is_dir() and p.name[0] != "." and p.name != "__MACOSX"
    )


def is_archive(path: Path) -> bool:
    """Tell by its suffixes whether a file is a zip or tar file, compressed or not; hidden are not.

    >>> is_archive(Path("pets.tar.gz")), is_archive(Path("pets.ZIP")), is_archive(Path("pets.h5"))
    (True, True, False)
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    found = ".tar" in suffixes or suffixes[-1:] in ([".tgz"], [".zip"])
    return found and not path.name.startswith(".")


def archive_images(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every image of a zip or tar file.

    Raises:
        InputError: as in `zip_images` and `tar_images`.
    """
    return (zip_images if path.suffix.lower() == ".zip" else tar_images)(path)


def zip_images(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every image of a zip file.

    Raises:
        InputError: it is missing, truncated or damaged, or names a path outside its folder.
    """
    with _opened(path) as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            _check_inside(path, member.filename)
            if is_image(member.filename):
                yield member.filename, archive.read(member)


def tar_images(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every image of a tar file, compressed or not.

    Raises:
        InputError: it is missing, truncated or damaged, or names a path outside its folder.
    """
    with _opened(path) as file, tarfile.open(fileobj=file, mode="r:*") as archive:
        for member in archive:
            _check_inside(path, member.name)
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None and is_image(member.name):
                yield member.name, content.read()
        while archive.fileobj and archive.fileobj.read(1 << 20):
            pass  # to the end, where a compressed file that was cut short shows


def folder_images(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name, relative to `path`, and content of every image below a folder, sorted.

    Raises:
        InputError: one cannot be read.
    """
    for file in files_below(path):
        if is_image(file.name):
            yield file.relative_to(path).as_posix(), contents(file)


def files_below(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield every file below a folder and folders linked there, sorted, but for what is hidden.

    Args:
        folder: Where to look.
        above: Folders that led here, resolved.

    Raises:
        InputError: a folder cannot be read, or links to one it is in.
    """
    with reading(folder):
        resolved = folder.resolve()
        if resolved in above:
            raise InputError(f"{folder} links to a folder that it is in; remove the link")
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from files_below(Path(entry), above | {resolved})
            else:
                yield Path(entry)


def unread(folder: Path, suffixes: Set[str]) -> str:
    """Return a remark, for an error, on a file of such a suffix in a folder; "" without one."""
    found = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in suffixes)
    return f" ({found[0]} is not read)" if found else ""


def contents(file: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        InputError: it cannot be read.
    """
    with reading(file):
        return file.read_bytes()


@contextmanager
def reading(path: Path | None) -> Iterator[None]:
    """Name what cannot be read: `path`, or a file or folder below it.

    Raises:
        InputError: the block meets an error of the file system.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot read {error.filename or path}: {error.strerror}; check the path and its "
            "permissions"
        ) from error


def _check_inside(archive: Path, member: str) -> None:
    path = PurePosixPath(member.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise InputError(
            f"{archive} holds {member!r}, a path outside its folder; do not trust this archive, "
            "and get another copy"
        )


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open an archive; what goes wrong while it is read is damage.

    Raises:
        InputError: it cannot be opened, or is damaged.
    """
    with reading(path):
        file = path.open("rb")
    with file:
        try:
            yield file
        except _OF_DAMAGE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{path} is truncated or damaged ({reason}); download it again"
            ) from error
