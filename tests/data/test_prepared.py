import errno
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.core.errors import InputError
from fewstep.data.prepared import RawClass, load_or_prepare, verify_prepared
from tests.data.conftest import deny

SHAPE = (1, 2, 3)


def _classes():
    """Return classes of 2 and 1 images with all different pixels."""
    pixels = np.arange(18, dtype=np.uint8).reshape(3, *SHAPE)
    return [
        RawClass("a", [lambda: pixels[0], lambda: pixels[1]]),
        RawClass("b", [lambda: pixels[2]]),
    ]


def _not_called():
    raise AssertionError("a prepared set is not read again")


def test_holds_the_images_class_after_class_and_reads_them_once(own_cache):
    first = load_or_prepare("set", "v1", SHAPE, _classes)
    again = load_or_prepare("set", "v1", SHAPE, _not_called)
    for store in (first, again):
        assert torch.equal(store.images, torch.arange(18).to(torch.uint8).reshape(3, *SHAPE))
        assert store.names == ("a", "b")
        assert store.starts.tolist() == [0, 2]
        assert store.counts.tolist() == [2, 1]
    assert sorted(p.name for p in own_cache.iterdir()) == ["set-v1.json", "set-v1.npy"]


def test_another_source_is_prepared_anew():
    load_or_prepare("set", "v1", SHAPE, _classes)
    with pytest.raises(AssertionError, match="not read again"):
        load_or_prepare("set", "v2", SHAPE, _not_called)


def test_a_name_may_have_dots(own_cache):
    """What follows a dot was taken for a suffix, the source with it."""
    load_or_prepare("birds.v1-84", "a", SHAPE, _classes)
    with pytest.raises(AssertionError, match="not read again"):
        load_or_prepare("birds.v1-84", "b", SHAPE, _not_called)
    assert verify_prepared(own_cache) == ["birds_v1-84-a"]


def test_a_damaged_description_is_refused(own_cache):
    load_or_prepare("set", "v1", SHAPE, _classes)
    (own_cache / "set-v1.json").write_text("{")
    with pytest.raises(InputError, match=r"differs from .* remove .*set-v1\.json to prepare it"):
        verify_prepared(own_cache)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"counts": [1, 2]}', '{"counts": 3}'])
def test_what_is_damaged_is_refused_when_it_is_loaded(own_cache, text):
    load_or_prepare("set", "v1", SHAPE, _classes)
    (own_cache / "set-v1.json").write_text(text)
    with pytest.raises(InputError, match=r"damaged .*remove .*set-v1\.json to prepare it again"):
        load_or_prepare("set", "v1", SHAPE, _not_called)


def test_an_empty_array_is_refused_when_it_is_loaded(own_cache):
    load_or_prepare("set", "v1", SHAPE, _classes)
    (own_cache / "set-v1.npy").write_bytes(b"")
    with pytest.raises(InputError, match="damaged"):
        load_or_prepare("set", "v1", SHAPE, _not_called)


def test_garbage_beside_it_does_not_matter(own_cache):
    load_or_prepare("other", "v1", SHAPE, _classes)
    (own_cache / "other-v1.json").write_bytes(b"\xff\xfe")
    load_or_prepare("set", "v1", SHAPE, _classes)


def test_what_was_prepared_of_another_source_is_kept_once(own_cache):
    load_or_prepare("set", "v1", SHAPE, _classes)
    load_or_prepare("set", "v2", SHAPE, lambda: _classes()[:1])
    store = load_or_prepare("set", "v3", SHAPE, _classes)
    one, other, same = (own_cache / f"set-v{i}.npy" for i in (1, 2, 3))
    assert one.samefile(same)
    assert not one.samefile(other)
    (own_cache / "set-v3.json").unlink()
    load_or_prepare("set", "v3", SHAPE, _classes)
    assert one.samefile(same)
    assert not list(own_cache.glob(".new-*"))
    one.unlink()
    assert torch.equal(store.images, torch.arange(18).to(torch.uint8).reshape(3, *SHAPE))


def test_what_a_killed_preparation_left_is_removed_after_a_day(own_cache, monkeypatch):
    own_cache.mkdir()
    left, others = own_cache / ".new-0123", own_cache / "of-another"
    for path in (left, others):
        path.write_bytes(b"half an array")
    (own_cache / ".new-kernels").mkdir()
    load_or_prepare("set", "v1", SHAPE, _classes)
    assert left.exists()  # may be at work
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 60 * 60)
    load_or_prepare("set", "v2", SHAPE, _classes)
    assert not left.exists()
    assert others.exists()


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError])
@pytest.mark.parametrize("of", ["json", "npy"])
def test_what_cannot_be_compared_with_does_not_matter(monkeypatch, of, error):
    """In a folder shared with others, who may forbid to read it or remove it meanwhile."""
    load_or_prepare("set", "v1", SHAPE, _classes)
    open_ = Path.open

    def refusing(path, *args, **kwargs):
        if path.name == f"set-v1.{of}":
            raise error(errno.EACCES, "of another user", str(path))
        return open_(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refusing)
    store = load_or_prepare("set", "v2", SHAPE, _classes)
    assert torch.equal(store.images, torch.arange(18).to(torch.uint8).reshape(3, *SHAPE))


def test_a_damaged_array_is_not_taken_for_the_same(own_cache):
    load_or_prepare("set", "v1", SHAPE, _classes)
    path = own_cache / "set-v1.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    store = load_or_prepare("set", "v2", SHAPE, _classes)
    assert torch.equal(store.images, torch.arange(18).to(torch.uint8).reshape(3, *SHAPE))


def test_verify_finds_a_changed_byte(own_cache):
    load_or_prepare("set", "v1", SHAPE, _classes)
    assert verify_prepared(own_cache) == ["set-v1"]
    path = own_cache / "set-v1.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(InputError, match=r"set-v1\.npy differs from what was prepared"):
        verify_prepared(own_cache)


@pytest.mark.parametrize("text", ['{"images": []}', "[]", "{", '{"sha256": "0"}'])
def test_verify_passes_over_files_of_others(own_cache, text):
    """A folder for all data may hold annotations: nobody is told to remove them."""
    load_or_prepare("set", "v1", SHAPE, _classes)
    (own_cache / "annotations.json").write_text(text)
    assert verify_prepared(own_cache) == ["set-v1"]


def test_verify_misses_an_array(own_cache):
    load_or_prepare("set", "v1", SHAPE, _classes)
    (own_cache / "set-v1.npy").unlink()
    with pytest.raises(InputError, match=r"set-v1\.npy differs from what was prepared"):
        verify_prepared(own_cache)


@pytest.mark.parametrize("of", ["json", "npy"])
def test_verify_names_what_it_may_not_read(own_cache, monkeypatch, of):
    load_or_prepare("set", "v1", SHAPE, _classes)
    deny(monkeypatch, own_cache / f"set-v1.{of}")
    with pytest.raises(InputError, match=rf"cannot read .*set-v1\.{of}: Permission denied; check"):
        verify_prepared(own_cache)


def test_a_description_without_its_array_is_refused(own_cache):
    load_or_prepare("set", "v1", SHAPE, _classes)
    (own_cache / "set-v1.npy").write_bytes(b"short")
    with pytest.raises(InputError, match=r"damaged .*remove .*set-v1\.json"):
        load_or_prepare("set", "v1", SHAPE, _not_called)


def test_what_is_prepared_may_be_read_by_whom_the_umask_lets(own_cache):
    before = os.umask(0o027)
    try:
        load_or_prepare("set", "v1", SHAPE, _classes)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in own_cache.iterdir()} == {0o640}


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"cannot write 18 bytes to .*: Not a directory"):
        load_or_prepare("set", "v1", SHAPE, _classes)


def test_an_image_that_fails_leaves_nothing(own_cache):
    def broken():
        raise InputError("x.png is not a readable image")

    with pytest.raises(InputError, match=r"x\.png"):
        load_or_prepare(
            "set", "v1", SHAPE, lambda: [RawClass("a", [*_classes()[0].readers, broken])]
        )
    assert list(own_cache.iterdir()) == []


@pytest.mark.parametrize("moment", ["before", "while writing"])
def test_a_full_disk_leaves_nothing(own_cache, monkeypatch, moment):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if moment == "before":
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=17))
    else:
        monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"cannot write 18 bytes to .*FEWSTEP_CACHE"):
        load_or_prepare("set", "v1", SHAPE, _classes)
    assert list(own_cache.iterdir()) == []


def test_the_array_is_an_ordinary_npy_file(own_cache):
    load_or_prepare("set", "v1", SHAPE, _classes)
    assert np.load(own_cache / "set-v1.npy").shape == (3, *SHAPE)
    assert json.loads((own_cache / "set-v1.json").read_text())["counts"] == [2, 1]
