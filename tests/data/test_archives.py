import io
import random
import tarfile
import zipfile

import pytest

from fewstep.core.errors import InputError
from fewstep.data.archives import folder_images, is_image, tar_images, zip_images
from tests.data.conftest import deny


def _zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _tar(path, members):
    with tarfile.open(path, f"w:{path.suffix[1:]}") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


FORMATS = pytest.mark.parametrize(
    ("write", "read", "name"), [(_zip, zip_images, "a.zip"), (_tar, tar_images, "a.tar.xz")]
)
MEMBERS = {"c/1.png": bytes(range(256)) * 40, "c/2.JPG": b"two", "c/._2.jpg": b"", "list.csv": b"x"}


@FORMATS
def test_yields_the_images_and_only_them(tmp_path, write, read, name):
    write(tmp_path / name, MEMBERS)
    expected = {n: MEMBERS[n] for n in ("c/1.png", "c/2.JPG")}
    assert dict(read(tmp_path / name)) == expected


def test_a_folder_gives_the_same(tmp_path):
    for name, content in MEMBERS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert [n for n, _ in folder_images(tmp_path)] == ["c/1.png", "c/2.JPG"]


@FORMATS
@pytest.mark.parametrize("member", ["../evil.png", "/etc/evil.png", "a/../../evil.png"])
def test_a_path_outside_the_folder_is_refused(tmp_path, write, read, name, member):
    write(tmp_path / name, {member: b"x"})
    with pytest.raises(InputError, match=r"evil\.png', a path outside its folder"):
        list(read(tmp_path / name))


@FORMATS
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95])
def test_a_truncated_archive_is_named(tmp_path, write, read, name, share):
    write(tmp_path / name, MEMBERS)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=f"{name} is truncated or damaged .*download it again"):
        list(read(tmp_path / name))


@FORMATS
def test_a_missing_archive_is_named(tmp_path, write, read, name):
    with pytest.raises(InputError, match=f"cannot read .*{name}: No such file"):
        list(read(tmp_path / name))


@FORMATS
def test_an_archive_that_may_not_be_read_is_not_called_damaged(
    tmp_path, monkeypatch, write, read, name
):
    write(tmp_path / name, MEMBERS)
    deny(monkeypatch, tmp_path / name)
    with pytest.raises(InputError, match=f"cannot read .*{name}: Permission denied; check"):
        list(read(tmp_path / name))


def test_a_damaged_zip_of_another_compression_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("c/1.png", bytes(range(256)) * 40)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[50:80] = b"\xff" * 30
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(InputError, match="truncated or damaged"):
        list(zip_images(tmp_path / "a.zip"))


def test_a_changed_byte_in_a_zip_is_noticed(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:  # stored: only the checksum can tell
        archive.writestr("c/1.png", b"pixels")
    content = (tmp_path / "a.zip").read_bytes().replace(b"pixels", b"pixelz", 1)
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(InputError, match="truncated or damaged"):
        list(zip_images(tmp_path / "a.zip"))


@pytest.mark.parametrize(
    ("write", "read", "name"), [(_zip, zip_images, "a.zip"), (_tar, tar_images, "a.tar.gz")]
)
def test_changed_bytes_of_what_is_compressed_are_noticed(tmp_path, write, read, name):
    noise = random.Random(0).randbytes(3000)
    write(tmp_path / name, {"c/1.png": noise + bytes(3000)})
    whole = bytearray((tmp_path / name).read_bytes())
    for place in range(60, 2000, 7):
        changed = bytearray(whole)
        changed[place] ^= 0x55
        (tmp_path / name).write_bytes(changed)
        with pytest.raises(InputError, match=f"{name} is truncated or damaged"):
            list(read(tmp_path / name))


def test_an_encrypted_zip_is_refused(tmp_path):
    _zip(tmp_path / "a.zip", MEMBERS)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag in the directory
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.zip is truncated or damaged .*encrypted"):
        list(zip_images(tmp_path / "a.zip"))


def test_what_pillow_opens_is_no_image_by_that_alone():
    for name in ("a.png", "a.JPG", "a.jpe", "a.jfif", "a.tif", "a.ppm", "a.tga", "a.webp", "a.bmp"):
        assert is_image(name)
    for name in (
        "a.h5",
        "a.pdf",
        "a.mpg",
        "a.ico",
        "a.psd",
        "a.eps",
        "a.fits",
        "a",
        "png",
        "a.csv",
    ):
        assert not is_image(name)
