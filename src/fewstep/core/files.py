"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path

from fewstep.core.errors import InputError


def check_name_of_file(path: Path, suffix: str) -> None:
    """Check, before the work that fills it, that a file may have such a name.

    Raises:
        InputError: `path` does not end in `suffix`, or its folder does not exist.
    """
    if path.suffix != suffix:
        raise InputError(f"{path} must end in {suffix}; rename it")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} for {path.name}; make it first")


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, or leave it as it was.

    The bytes go to a temporary file in the same folder, to the disk, and only then to the name.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    temporary = path.parent / f".new-{secrets.token_hex(8)}"
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"no space left to write {path} ({len(content)} bytes); the file that was there is "
                "intact, so free some space and resume"
            ) from error
        raise InputError(
            f"cannot write {path}: {error.strerror}; check the folder's permissions"
        ) from error
    finally:  # also of an interrupt
        with suppress(OSError):
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
