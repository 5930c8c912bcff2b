"""One image of any kind, as 8 bits of grey or colour."""

import hashlib
import importlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fewstep.core.errors import InputError
from fewstep.data.pixels import DECODING, decode, strokes

GREY = np.array([[0, 10], [200, 255]], dtype=np.uint8)
OPACITY = np.array([[255, 0], [255, 51]], dtype=np.uint8)
ON_WHITE = np.array([[0, 255], [200, 255]], dtype=np.uint8)


def _file(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _transparent(mode: str) -> bytes:
    """Return GREY, as much of it to be seen as OPACITY says, or none of its 10."""
    grey, opacity = Image.fromarray(GREY), Image.fromarray(OPACITY)
    if mode == "palette":
        return _file(grey.convert("P"), transparency=bytes([255] * 10 + [0] + [255] * 245))
    if mode == "key":
        return _file(grey, transparency=10)
    bands = [grey, opacity] if mode == "LA" else [grey, grey, grey, opacity]
    return _file(Image.merge(mode, bands))


@pytest.mark.parametrize("mode", ["LA", "RGBA", "palette", "key"])
def test_what_is_transparent_is_white(mode):
    content = _transparent(mode)
    assert decode(content, "x", 2, "L")[0].tolist() == ON_WHITE.tolist()
    assert decode(content, "x", 2, "RGB").tolist() == [ON_WHITE.tolist()] * 3
    assert strokes(content, "x", 2)[0].tolist() == (255 - ON_WHITE).tolist()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_are_scaled_to_eight(kind, order):
    values = np.array([[0, 128], [51400 + 128, 65535]], dtype=order)
    content = _file(Image.fromarray(values), kind)
    assert decode(content, "x", 2, "L").tolist() == [[[0, 0], [200, 255]]]
    assert decode(content, "x", 2, "RGB").tolist() == [[[0, 0], [200, 255]]] * 3


def _tiff(bits: int, photometric: int, data: bytes) -> bytes:
    """Return a 2x2 grey TIFF, uncompressed, as PIL does not write it."""
    entries = [
        (256, 4, 2), (257, 4, 2), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8),
        (277, 3, 1), (278, 4, 2), (279, 4, len(data)),
    ]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, n) for tag, kind, n in entries)
    start = b"II*\0" + struct.pack("<I", 8 + len(data)) + data
    return start + struct.pack("<H", len(entries)) + directory + bytes(4)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (_tiff(12, 1, bytes.fromhex("000fff80080f")), [[0, 255], [128, 128]]),
        (_tiff(16, 0, np.array([0, 65535, 257, 51400], "<u2").tobytes()), [[255, 0], [254, 55]]),
        (_tiff(16, 1, np.array([0, 65535, 257, 51400], "<u2").tobytes()), [[0, 255], [1, 200]]),
        (_tiff(8, 0, bytes([0, 255, 1, 200])), [[255, 0], [254, 55]]),
    ],
    ids=["12 bits", "16 bits, white is 0", "16 bits", "8 bits, white is 0"],
)
def test_grey_of_a_tiff_is_as_its_tags_say(content, expected):
    """How many bits there are, and which end is white."""
    assert decode(content, "x", 2, "L").tolist() == [expected]
    assert decode(content, "x", 2, "RGB").tolist() == [expected] * 3


def test_a_transparent_grey_of_16_bits_is_white():
    content = _file(Image.fromarray(np.array([[0, 1000], [65535, 1001]], np.uint16)))
    body = b"tRNS" + struct.pack(">H", 1000)
    chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    at = content.index(b"IDAT") - 4
    assert decode(content, "x", 2, "L").tolist() == [[[0, 4], [255, 4]]]
    keyed = content[:at] + chunk + content[at:]
    assert decode(keyed, "x", 2, "L").tolist() == [[[0, 255], [255, 4]]]


def _odd_files() -> list[bytes]:
    """Return files of the kinds that are decoded by rules of ours."""
    values = np.arange(7 * 9, dtype=np.uint8).reshape(7, 9) * 4
    grey = Image.fromarray(values)
    exif = Image.Exif()
    exif[0x0112] = 6
    ink = Image.merge("CMYK", [grey, grey.rotate(90, expand=False), grey.rotate(180), grey])
    return [
        _file(grey),
        _file(grey, exif=exif),
        _file(Image.fromarray(values.astype(np.uint16) * 257)),
        _tiff(12, 1, bytes.fromhex("000fff80080f")),
        _file(grey.convert("P"), transparency=bytes(range(256))),
        _file(Image.merge("RGBA", [grey, grey.rotate(180), grey, grey])),
        _file(grey.convert("1")),
        _file(ink, "TIFF"),
    ]


def test_another_way_to_decode_has_another_number():
    """If the digest differs, raise DECODING, or what was prepared before will be taken for new."""
    pixels = [decode(f, "x", 5, mode) for f in _odd_files() for mode in ("L", "RGB")]
    digest = hashlib.sha256(b"".join(p.tobytes() for p in pixels)).hexdigest()[:12]
    assert (DECODING, digest) == (1, "d9a142684eb8")


@pytest.mark.parametrize("of", ["folder", "omniglot", "mini_imagenet"])
def test_a_set_is_prepared_anew_where_images_are_decoded_otherwise(tmp_path, monkeypatch, of):
    module = importlib.import_module(f"fewstep.data.{of}")
    for name in ("images_background", "images_evaluation"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(_file(Image.fromarray(GREY)))
    sources = []

    def prepare(name, source, *_):
        sources.append(source)
        raise InterruptedError

    monkeypatch.setattr(module, "load_or_prepare", prepare)
    data = {"folder": "ImageFolder", "omniglot": "Omniglot", "mini_imagenet": "MiniImageNet"}[of]
    for decoding in (DECODING, DECODING, DECODING + 1):
        monkeypatch.setattr(module, "DECODING", decoding)
        with pytest.raises(InterruptedError):
            getattr(module, data)(tmp_path).splits()
    assert sources[0] == sources[1] != sources[2]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_32_bits_are_refused(kind):
    content = _file(Image.fromarray(GREY.astype(kind)), "TIFF")
    with pytest.raises(InputError, match=r"^a\.tif .*pixels of 32 bits .*; save 8 or 16 bits"):
        decode(content, "a.tif", 2, "L")


@pytest.mark.parametrize(
    ("orientation", "first_row", "first_column"),
    [
        (1, "top", "left"), (2, "top", "right"), (3, "bottom", "right"), (4, "bottom", "left"),
        (5, "left", "top"), (6, "right", "top"), (7, "right", "bottom"), (8, "left", "bottom"),
    ],
)  # fmt: skip
def test_an_image_is_upright(orientation, first_row, first_column):
    """The sides of the scene that EXIF's standard says the first row and column stored are."""
    scene = np.arange(12, dtype=np.uint8).reshape(4, 3) * 20
    stored = scene if first_row in ("top", "bottom") else scene.T
    stored = stored[::-1] if first_row in ("bottom", "right") else stored
    stored = stored[:, ::-1] if first_column in ("bottom", "right") else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = _file(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    plain = _file(Image.fromarray(scene))
    assert decode(content, "x", 12, "L").tolist() == decode(plain, "x", 12, "L").tolist()


def _too_large() -> bytes:
    """Return a small file that says it holds 65,535x65,535 pixels."""
    content = bytearray(_file(Image.fromarray(GREY), "GIF"))
    content[6:10] = b"\xff" * 4
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<html>not found</html>", "of no known format"),
        (b"", "of no known format"),
        (_file(Image.fromarray(GREY))[:45], "truncated"),
        (_too_large(), "exceeds limit"),
    ],
    ids=["page", "nothing", "half", "bomb"],
)
def test_what_is_no_image_is_named(content, reason):
    with pytest.raises(InputError, match=f"^a/b.png is not a readable image .*{reason}") as caught:
        decode(content, "a/b.png", 2, "L")
    assert "object at" not in str(caught.value)
