"""Files that are whole or not there, whatever happens while they are written."""

import errno
import os
import resource
import signal

import pytest

from fewstep.core.errors import InputError
from fewstep.core.files import write_atomically
from tests.processes import errors_of


def test_replaces_a_file(tmp_path):
    path = tmp_path / "f"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_may_be_read_by_whom_the_umask_lets(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "f", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "f").touch()
    with pytest.raises(InputError, match=r"cannot write .*/f/g: Not a directory"):
        write_atomically(tmp_path / "f" / "g", b"new")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "f"
    write_atomically(path, b"old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(InputError, match=r"no space left .*the file that was there is intact"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def writes_to_a_small_disk(path):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))  # room for what it says
    write_atomically(path, b"x" * 20_000)


def test_really_full_disk(tmp_path):
    """A write that the file system refuses part of the way, by a limit on file sizes."""
    path = tmp_path / "folder" / "f"
    path.parent.mkdir()
    path.write_bytes(b"old")
    assert "InputError: cannot write" in errors_of(tmp_path, writes_to_a_small_disk, path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["f"]


def test_an_interrupt_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomically(path, b"old")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
