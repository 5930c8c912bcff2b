import csv
import re

import pytest

from fewstep.core.errors import InputError
from fewstep.data.folder import SPLITS, ImageFolder
from tests.data.conftest import image_bytes


def write_image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(value))


def write_list(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("filename", "label"), *rows])


def colours(store):
    """Return the colours of the images of each class, sorted."""
    values = store.images.flatten(1)[:, 0]
    each = zip(store.names, store.starts, store.counts, strict=True)
    return {name: sorted(values[start : start + count].tolist()) for name, start, count in each}


@pytest.fixture
def split(tmp_path):
    """Two classes of two images in each list, those of val by paths, the others by bare names."""
    root = tmp_path / "birds"
    for number, name in enumerate(SPLITS):
        rows = []
        for i in range(4):
            path = f"images/{name}/{name}{i}.png"
            write_image(root / path, 10 * number + i)
            rows.append((path if name == "val" else f"{name}{i}.png", f"{name}-{i % 2}"))
        write_list(root / f"{name}.csv", rows)
    return root


def test_lists_of_the_splits_are_taken_as_they_are(split):
    splits = ImageFolder(split, size=8).splits()
    for number, name in enumerate(SPLITS):
        first = 10 * number
        assert colours(splits[name]) == {
            f"{name}/{name}-0": [first, first + 2],
            f"{name}/{name}-1": [first + 1, first + 3],
        }


def test_one_list_is_dealt_out_as_folders_are(tmp_path):
    """The same classes go to the same splits, whatever the order of the lines."""
    names = [f"class{i}" for i in range(10)]
    rows = []
    for i, name in enumerate(names):
        for j in range(2):
            write_image(tmp_path / "folders" / name / f"{j}.png", 10 * i + j)
            write_image(tmp_path / "flat" / f"{i}-{j}.png", 10 * i + j)
            rows.append((f"{i}-{j}.png", name))
    write_list(tmp_path / "flat" / "labels.csv", rows[::-1])
    of_folders = ImageFolder(tmp_path / "folders", size=8).splits()
    of_list = ImageFolder(tmp_path / "flat", size=8).splits()
    assert {s: colours(store) for s, store in of_list.items()} == {
        s: colours(store) for s, store in of_folders.items()
    }


def test_a_list_that_changes_is_noticed(split):
    ImageFolder(split, size=8).splits()
    write_list(split / "val.csv", [("val0.png", "a"), ("val1.png", "a"), ("val2.png", "b")])
    with pytest.warns(
        UserWarning, match=r"no list names are left out, 1 in all, such as .*val3.png"
    ):
        splits = ImageFolder(split, size=8).splits()
    assert colours(splits["val"]) == {"val/a": [10, 11], "val/b": [12]}


def test_one_list_of_three_is_no_split(tmp_path):
    """As where a list of the images lies beside their folders."""
    for i in range(10):
        write_image(tmp_path / f"class{i}" / "0.png", i)
    write_list(tmp_path / "train.csv", [("0.png", "class0")])
    splits = ImageFolder(tmp_path, size=8).splits()
    assert sum(len(store) for store in splits.values()) == 10


MISTAKES = [
    ([("val0.png", "a"), ("9.png", "b")], r"val.csv names 9.png, and there is no such image below"),
    ([("val0.png", "a"), ("val0.png", "b")], r"val0.png is of val/a and of val/b by the lists; le"),
    ([("same.png", "a")], r"names same.png, which could be .*here.same.png or .*there.same.png; g"),
    ([("val0.png", "train-0")], r"has class train-0 in train and val \(1 in all\), where few-shot"),
    ([("val0.png", "a/b")], r"val.csv has the label 'a/b'; write it without a slash"),
    ([("val0.png", "a"), ("val1.png", "")], r"val.csv lacks a filename or a label in line 3; fill"),
    ([("val0.png", "a"), ("val1.png",)], r"val.csv lacks a filename or a label in line 3; fill"),
    ([], r"val.csv names no image; add a line for each"),
]


@pytest.mark.parametrize(("rows", "message"), MISTAKES)
@pytest.mark.filterwarnings("ignore:images that no list names")
def test_what_is_wrong_with_a_list_is_named(split, rows, message):
    for folder in ("here", "there"):
        write_image(split / folder / "same.png")
    write_list(split / "val.csv", rows)
    with pytest.raises(InputError, match=message) as caught:
        ImageFolder(split, size=8).splits()
    assert "\n" not in str(caught.value)


def test_a_folder_without_classes_is_told_of_lists(tmp_path):
    write_image(tmp_path / "0.png")
    expected = re.escape("or name their classes in labels.csv, with the columns filename,label")
    with pytest.raises(InputError, match=expected):
        ImageFolder(tmp_path, size=8).splits()
