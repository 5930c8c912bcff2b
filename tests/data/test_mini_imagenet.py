import csv
import io
import tarfile
import zipfile
from collections import defaultdict

import pytest

from fewstep.core.errors import InputError
from fewstep.data import mini_imagenet
from fewstep.data.mini_imagenet import CLASSES, MiniImageNet
from tests.data.conftest import image_bytes, real_data

ALL = [name for names in CLASSES.values() for name in names]


@pytest.fixture(autouse=True)
def two_images_a_class(monkeypatch):
    monkeypatch.setattr(mini_imagenet, "IMAGES", 2)


def _images(names):
    """Return path and content of two images of each class, coloured by the class's number."""
    return {
        f"{name}/{name}0000000{i}.jpg": image_bytes(2 * ALL.index(name) + i, kind="PNG")
        for name in names
        for i in range(2)
    }


def _write_files(root, images):
    for name, content in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def _class_folders(root):
    _write_files(root, _images(ALL))


def _split_folders(root):
    for split, names in CLASSES.items():
        _write_files(root / split, _images(names))


def _tar_parts(root):
    for part, names in (("train-0", CLASSES["train"][:30]), ("train-1", CLASSES["train"][30:]),
                        ("val", CLASSES["val"]), ("test", CLASSES["test"])):  # fmt: skip
        with tarfile.open(root / f"{part}.tar.xz", "w:xz") as archive:
            for name, content in _images(names).items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def _csv_splits(root):
    for split, names in CLASSES.items():
        images = _images(names)
        _write_files(root / "images", {n.split("/")[1]: c for n, c in images.items()})
        with (root / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("filename", "label"))
            writer.writerows((n.split("/")[1], n.split("/")[0]) for n in images)


def _zip_parts(root):
    for part, names in (("train", CLASSES["train"]), ("rest", CLASSES["val"] + CLASSES["test"])):
        with zipfile.ZipFile(root / f"{part}.zip", "w") as archive:
            for name, content in _images(names).items():
                archive.writestr(f"{part}/{name}", content)


def _zip_parts_beside_what_they_held(root):
    _zip_parts(root)
    _split_folders(root)


LAYOUTS = [
    _zip_parts,
    _zip_parts_beside_what_they_held,
    _class_folders,
    _split_folders,
    _tar_parts,
    _csv_splits,
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_published_split(tmp_path, layout):
    layout(tmp_path)
    splits = MiniImageNet(tmp_path, size=8).splits()
    assert [len(splits[s]) for s in ("train", "val", "test")] == [64, 16, 20]
    for split, store in splits.items():
        assert list(store.names) == CLASSES[split]
        first = store.images[store.starts].flatten(1)[:, 0].tolist()
        assert first == [2 * ALL.index(name) for name in CLASSES[split]]


@pytest.mark.parametrize("layout", [_class_folders, _split_folders, _csv_splits])
def test_an_image_that_changes_is_noticed(tmp_path, layout):
    root = tmp_path / "images"
    root.mkdir()
    layout(root)
    MiniImageNet(root, size=8).splits()
    (file,) = root.rglob(f"{ALL[0]}00000000.jpg")
    file.write_bytes(image_bytes(222))
    assert MiniImageNet(root, size=8).splits()["train"].images[0, 0, 0, 0] == 222


def test_a_missing_image_is_named(tmp_path):
    _class_folders(tmp_path)
    (tmp_path / ALL[70] / f"{ALL[70]}00000001.jpg").unlink()
    with pytest.raises(InputError, match=f"holds 1 images of class {ALL[70]}"):
        MiniImageNet(tmp_path).splits()


def test_a_pickle_is_named_as_what_is_not_read(tmp_path):
    (tmp_path / "mini-imagenet-cache-val.pkl").touch()
    named = rf"holds 0 images of class {ALL[0]}, .* 2 \(mini-imagenet-cache-val.pkl is not read\); "
    with pytest.raises(InputError, match=named + "complete it by class folders, tar or zip files"):
        MiniImageNet(tmp_path).splits()


def test_a_truncated_part_is_named(tmp_path):
    _tar_parts(tmp_path)
    part = tmp_path / "train-1.tar.xz"
    part.write_bytes(part.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"train-1\.tar\.xz is truncated or damaged"):
        MiniImageNet(tmp_path).splits()


def test_a_corrupt_image_is_named(tmp_path):
    _class_folders(tmp_path)
    file = tmp_path / ALL[5] / f"{ALL[5]}00000001.jpg"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(InputError, match=f"{file.name} is not a readable image"):
        MiniImageNet(tmp_path).splits()


def test_wrong_csv_columns_are_named(tmp_path):
    _csv_splits(tmp_path)
    (tmp_path / "val.csv").write_text("file,class\na.jpg,n01855672\n")
    with pytest.raises(InputError, match="must have the columns filename,label, not file,class"):
        MiniImageNet(tmp_path).splits()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"filename\na.jpg,n01855672\n", "columns filename,label, not filename; rename"),
        (b"", "must have the columns"),
        ("filename,label\na.jpg,n01855672\n".encode("utf-16"), "is no CSV file in UTF-8"),
    ],
)
def test_what_is_no_table_of_labels_is_named(tmp_path, content, message):
    _csv_splits(tmp_path)
    (tmp_path / "val.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        MiniImageNet(tmp_path).splits()


def test_images_of_other_classes_are_not_kept(tmp_path, monkeypatch):
    _class_folders(tmp_path)
    (tmp_path / "n99999999").mkdir()
    for i in range(3):
        (tmp_path / "n99999999" / f"{i}.jpg").write_bytes(b"no image")
    kept = []

    class Counting(defaultdict):
        def __missing__(self, key):
            kept.append(key)
            return super().__missing__(key)

    monkeypatch.setattr("fewstep.data.mini_imagenet.defaultdict", Counting)
    MiniImageNet(tmp_path, size=8).splits()
    assert sorted(kept) == sorted(ALL)


def test_what_spreadsheets_and_macs_leave_does_no_harm(tmp_path):
    _csv_splits(tmp_path)
    for split in CLASSES:
        file = tmp_path / f"{split}.csv"
        file.write_text(file.read_text(), encoding="utf-8-sig")  # as "CSV UTF-8" is saved
    (tmp_path / "._train.tar").write_bytes(b"a resource fork")
    (tmp_path / "old.tar").mkdir()
    splits = MiniImageNet(tmp_path, size=8).splits()
    assert [len(splits[s]) for s in ("train", "val", "test")] == [64, 16, 20]


def test_no_folder_says_why_there_is_no_download(tmp_path):
    with pytest.raises(
        InputError, match=r"ImageNet's terms .*; put .* set FEWSTEP_DATA .* or pass --root"
    ):
        MiniImageNet().splits()


def test_the_lists_are_those_of_the_real_csv_files(real_mini_imagenet):
    for split, names in CLASSES.items():
        with (real_mini_imagenet / f"{split}.csv").open(newline="") as file:
            labels = [row["label"] for row in csv.DictReader(file)]
        assert sorted(set(labels)) == sorted(names)
        assert len(labels) == 600 * len(names)


@pytest.fixture(scope="module")
def real_mini_imagenet():
    return real_data("mini-imagenet")
