import math
import re
import shutil
import tarfile
import zipfile

import pytest
import torch
from PIL import Image, features

from fewstep.core.errors import InputError
from fewstep.data.folder import SPLITS, ImageFolder
from tests.data.conftest import deny, write_images

SPLIT = {"train/a": 2, "train/b": 3, "val/c": 2, "test/d": 4}
CLASSES = {f"class{i:02d}": 3 + i % 4 for i in range(10)}


def test_classes_are_dealt_out_once_and_for_all(tmp_path):
    write_images(tmp_path / "images", CLASSES)
    splits = ImageFolder(tmp_path / "images", size=8).splits()
    assert [len(splits[s]) for s in ("train", "val", "test")] == [6, 2, 2]
    assert {n for s in splits.values() for n in s.names} == set(CLASSES)
    for store in splits.values():
        for name, start, count in zip(store.names, store.starts, store.counts, strict=True):
            number = int(name[-2:])
            assert count == CLASSES[name]
            values = store.images[start : start + count].flatten(1)
            assert values[:, 0].tolist() == [10 * number + i for i in range(CLASSES[name])]


def test_a_split_folder_is_taken_as_it_is(tmp_path):
    write_images(tmp_path, SPLIT)
    splits = ImageFolder(tmp_path, size=8).splits()
    assert {s: store.names for s, store in splits.items()} == {
        "train": ("train/a", "train/b"), "val": ("val/c",), "test": ("test/d",),
    }  # fmt: skip


def test_a_class_in_two_splits_is_refused(tmp_path):
    """As where the splits share out the images of every class: few-shot tests need new classes."""
    write_images(tmp_path, {f"{split}/{name}": 2 for split in SPLITS for name in "cab"})
    named = r"has class a in test and train and val \(3 in all\), .*; put each into one split"
    with pytest.raises(InputError, match=named):
        ImageFolder(tmp_path, size=8).splits()
    write_images(tmp_path / "one", SPLIT | {"test/a": 1})
    with pytest.raises(InputError, match=r"has class a in test and train \(1 in all\)"):
        ImageFolder(tmp_path / "one", size=8).splits()


def test_a_folder_beside_the_splits_is_refused(tmp_path):
    """Dealt out with the rest, the classes of test would be trained on."""
    write_images(tmp_path, SPLIT | {"extra/e/more": 1})
    with pytest.raises(InputError, match=r"extra.* beside train, val and test; move"):
        ImageFolder(tmp_path, size=8).splits()


def test_hidden_folders_do_not_void_the_split(tmp_path):
    write_images(tmp_path, SPLIT | {".thumbs/x": 1, "train/.trash/x": 1, "train/a/.thumbs": 1})
    splits = ImageFolder(tmp_path, size=8).splits()
    found = {n: int(c) for s in splits.values() for n, c in zip(s.names, s.counts, strict=True)}
    assert found == SPLIT
    assert splits["test"].names == ("test/d",)


def test_linked_folders_are_entered(tmp_path):
    write_images(tmp_path / "elsewhere", SPLIT)
    root = tmp_path / "images"
    (root / "train").mkdir(parents=True)
    for name in ("train/a", "train/b", "val", "test"):
        (root / name).symlink_to(tmp_path / "elsewhere" / name)
    splits = ImageFolder(root, size=8).splits()
    assert [splits[s].names for s in SPLITS] == [("train/a", "train/b"), ("val/c",), ("test/d",)]
    (root / "train" / "all").symlink_to(root)
    with pytest.raises(InputError, match=r"all links to a folder that it is in"):
        ImageFolder(root, size=8).splits()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_without_classes_is_named(tmp_path, split):
    write_images(tmp_path, {name: n for name, n in SPLIT.items() if not name.startswith(split)})
    write_images(tmp_path, {split: 2})
    with pytest.raises(InputError, match=f"{split} holds no class/image; put a folder of images"):
        ImageFolder(tmp_path, size=8).splits()


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "validation", "test"), "train and validation and test, which would be classes, "
         "as there is no val; did you mean val by validation? rename them"),
        (("Train", "val", "Test", "a", "b"), "as there is no train and no test; did you mean train "
         "by Train and test by Test? rename them"),
        (("train", "test", "a", "b", "c"), "train and test, which would be classes, as there is no "
         "val; add it, or rename them"),
    ],
)  # fmt: skip
def test_splits_of_other_names_are_no_classes(tmp_path, folders, message):
    write_images(tmp_path, {f"{name}/{of}": 2 for name in folders for of in ("a", "b")})
    with pytest.raises(InputError, match=re.escape(f"{tmp_path} has folders")) as error:
        ImageFolder(tmp_path, size=8).splits()
    assert str(error.value).endswith(message)


def test_a_class_may_be_one_of_trains(tmp_path):
    write_images(tmp_path, CLASSES | {"train": 2})
    assert sum(map(len, ImageFolder(tmp_path, size=8).splits().values())) == 11


@pytest.mark.parametrize(("classes", "stray"), [(SPLIT, "train"), (CLASSES, ".")])
def test_images_in_no_class_are_named(tmp_path, classes, stray):
    write_images(tmp_path, classes | {stray: 2})
    named = f"left out, 2 in all, such as {tmp_path / stray / '000.png'}; move each into"
    with pytest.warns(UserWarning, match=named):
        splits = ImageFolder(tmp_path, size=8).splits()
    assert {name for store in splits.values() for name in store.names} == set(classes)


def test_other_files_do_not_count(tmp_path):
    write_images(tmp_path, CLASSES | {".hidden": 2})
    (tmp_path / "class00" / "notes.txt").write_text("not an image")
    counts = {n: c for s in ImageFolder(tmp_path, size=8).splits().values()
              for n, c in zip(s.names, s.counts.tolist(), strict=True)}  # fmt: skip
    assert counts == CLASSES


@pytest.mark.parametrize("classes", [SPLIT, CLASSES])
def test_classes_without_an_image_are_named(tmp_path, classes):
    write_images(tmp_path, classes | {".hidden": 1})
    above = tmp_path / "train" if classes is SPLIT else tmp_path
    (above / ".thumbs").mkdir()
    (above / "__MACOSX").mkdir()
    for name in ("empty", "of text/deep"):
        (above / name).mkdir(parents=True)
        (above / name / "notes.txt").write_text("not an image")
    named = f"without an image are no classes, 2 in all, such as {above / 'empty'}; save images"
    with pytest.warns(UserWarning, match=re.escape(named)):
        splits = ImageFolder(tmp_path, size=8).splits()
    assert {name for store in splits.values() for name in store.names} == set(classes)


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".JFIF", "JPEG"), (".ppm", "PPM"), (".jp2", "JPEG2000")]
)
def test_images_of_any_suffix_count(tmp_path, suffix, kind):
    if not features.check("jpg_2000") and kind == "JPEG2000":
        pytest.skip("Pillow without JPEG 2000")
    write_images(tmp_path, CLASSES)
    for i in range(5):
        Image.new("RGB", (9, 9)).save(tmp_path / "class00" / f"more{i}{suffix}", kind)
    counts = {n: c for s in ImageFolder(tmp_path, size=8).splits().values()
              for n, c in zip(s.names, s.counts.tolist(), strict=True)}  # fmt: skip
    assert counts == CLASSES | {"class00": CLASSES["class00"] + 5}


@pytest.mark.parametrize("name", ["labels.json", "images.zip", "cache.PKL"])
def test_what_is_not_read_is_named(tmp_path, name):
    """A folder of another form than ours: images beside a list of their classes, an archive."""
    root = tmp_path / "images"
    write_images(root, {".": 3})
    (root / name).touch()
    named = rf"no image in class/image or split/class/image \({name} is not read\); sort the images"
    with pytest.raises(InputError, match=named):
        ImageFolder(root).splits()


def test_grey_images_have_one_channel(tmp_path):
    write_images(tmp_path, CLASSES)
    store = ImageFolder(tmp_path, size=8, colour="grey").splits()["train"]
    assert store.image_shape == (1, 8, 8)


def test_a_new_image_is_noticed(tmp_path):
    root = tmp_path / "images"
    write_images(root, CLASSES)
    before = ImageFolder(root, size=8).splits()
    write_images(root, CLASSES | {"class00": 9})
    after = ImageFolder(root, size=8).splits()
    total = [sum(int(s.counts.sum()) for s in splits.values()) for splits in (before, after)]
    assert total[1] == total[0] + 6


def test_an_image_that_moves_to_another_class_is_noticed(tmp_path):
    """Its name, size and time stay, and its place among all images."""
    write_images(tmp_path, SPLIT)
    a, b = (tmp_path / "train" / name for name in "ab")
    (a / "001.png").rename(a / "1.png")
    for i in range(3):
        (b / f"00{i}.png").rename(b / f"{2 + i}.png")
    ImageFolder(tmp_path, size=8).splits()
    (b / "2.png").rename(a / "2.png")
    assert ImageFolder(tmp_path, size=8).splits()["train"].counts.tolist() == [3, 2]


def test_a_corrupt_image_is_named(tmp_path):
    write_images(tmp_path, CLASSES)
    (tmp_path / "class03" / "001.png").write_bytes(b"<html>not found</html>")
    with pytest.raises(InputError, match=r"class03/001\.png is not a readable image"):
        ImageFolder(tmp_path, size=8).splits()


@pytest.mark.parametrize("locked", ["class03", "class03/001.png", "."])
def test_what_may_not_be_read_is_named(tmp_path, monkeypatch, locked):
    """The source is, not the cache, which is where the array would be written."""
    root = tmp_path / "images"
    write_images(root, CLASSES)
    deny(monkeypatch, root / locked)
    with pytest.raises(InputError, match=f"cannot read {root / locked}: Permission denied; check"):
        ImageFolder(root, size=8).splits()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is no folder given; pass --root"),
        ({"root": "nowhere"}, "there is no folder .*nowhere; pass --root"),
        ({"root": "empty"}, "has no image in class/image"),
        ({"root": "two"}, "2 classes are too few"),
        ({"root": "two", "fractions": (0.5, 0.5, 0.5)}, "must be positive and sum to 1"),
        ({"root": "two", "fractions": (0.5, 0.25, 0.26)}, "must be positive and sum to 1"),
        ({"root": "three", "fractions": (0.5, 0.4, 0.1)}, "3 classes are too few"),  # for a test
        ({"root": "two", "fractions": (math.nan, 0.5, 0.5)}, "must be positive and sum to 1"),
        ({"root": "two", "colour": "gray"}, "unknown colour 'gray'; did you mean 'grey'"),
        ({"root": "two", "size": 0}, "size=0 must be at least 1"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "two", {"a": 1, "b": 1})
    write_images(tmp_path / "three", {"a": 1, "b": 1, "c": 1})
    if "root" in options:
        options = options | {"root": tmp_path / options["root"]}
    with pytest.raises(InputError, match=message):
        ImageFolder(**options).splits()


def _zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, file in files.items():
            archive.write(file, name)


def _tar(path, files):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, file in files.items():
            archive.add(file, name)


@pytest.mark.parametrize("classes", [CLASSES | {"class00-b": 2, "class00 c": 2}, SPLIT])
@pytest.mark.parametrize("within", ["", "./", "pets/", "./pets/"])
@pytest.mark.parametrize(
    ("name", "pack"), [("a.zip", _zip), ("a.tar", _tar), ("a.tar.gz", _tar), ("a.TGZ", _tar)]
)
def test_an_archive_is_as_good_as_the_folder(tmp_path, name, pack, within, classes):
    write_images(tmp_path / "images", classes | {".thumbs/x": 1, "__MACOSX/y": 1})
    files = [f for f in (tmp_path / "images").rglob("*") if f.is_file()]
    pack(
        tmp_path / name,
        {within + f.relative_to(tmp_path / "images").as_posix(): f for f in reversed(files)},
    )
    shutil.rmtree(tmp_path / "images" / "__MACOSX")
    expected = ImageFolder(tmp_path / "images", size=8).splits()
    found = ImageFolder(tmp_path / name, size=8).splits()
    for split, store in expected.items():
        assert found[split].names == store.names
        assert torch.equal(found[split].counts, store.counts)
        assert torch.equal(found[split].images[found[split].starts], store.images[store.starts])


def test_another_archive_of_the_same_name_is_noticed(tmp_path):
    for folder, count in (("old", 10), ("new", 11)):
        write_images(tmp_path / folder, {f"class{i}": 2 for i in range(count)})
        files = sorted((tmp_path / folder).rglob("*.png"))
        _zip(tmp_path / "a.zip", {f.relative_to(tmp_path / folder).as_posix(): f for f in files})
        splits = ImageFolder(tmp_path / "a.zip", size=8).splits()
        assert sum(map(len, splits.values())) == count


@pytest.mark.parametrize(("classes", "message"), [
    ({"train/a": 1, "val/a": 1, "test/b": 1}, r"a.zip has class a in train and val \(1 in all\)"),
    ({"train/a": 1, "val/b": 1, "test/c": 1, "more/d": 1}, r"a.zip/more has images and is beside"),
    ({"cat": 2}, r"a.zip has no image in class/image or split/class/image; sort"),
    ({f"c{i}": 1 for i in range(2)}, r"the folder's 2 classes are too few"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:images in no class")
def test_what_is_wrong_with_an_archive_is_named(tmp_path, classes, message):
    write_images(tmp_path / "images", classes)
    files = sorted((tmp_path / "images").rglob("*.png"))
    _zip(tmp_path / "a.zip", {f.relative_to(tmp_path / "images").as_posix(): f for f in files})
    with pytest.raises(InputError, match=message):
        ImageFolder(tmp_path / "a.zip", size=8).splits()


def test_a_file_that_is_no_archive_is_no_folder(tmp_path):
    (tmp_path / "a.h5").touch()
    (tmp_path / "a.zip").write_bytes(b"half")
    with pytest.raises(InputError, match=r"no folder .*a.h5; .* or a zip or tar file of that"):
        ImageFolder(tmp_path / "a.h5", size=8).splits()
    with pytest.raises(InputError, match=r"a.zip is truncated or damaged"):
        ImageFolder(tmp_path / "a.zip", size=8).splits()
