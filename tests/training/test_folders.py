"""Folders of runs, held by one process."""

import os

import pytest

from fewstep.core.errors import InputError
from fewstep.training.folders import locked
from tests.data.conftest import deny
from tests.processes import errors_of


def locks(folder):
    with locked(folder):
        pass


def test_second_process_is_refused(tmp_path):
    with locked(tmp_path):
        errors = errors_of(tmp_path, locks, tmp_path)
    assert f"in use by process {os.getpid()}" in errors
    with locked(tmp_path):
        pass


def test_a_lock_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    deny(monkeypatch, tmp_path / "lock")
    message = r"cannot write .*/lock: Permission denied; check"
    with pytest.raises(InputError, match=message), locked(tmp_path):
        pass
