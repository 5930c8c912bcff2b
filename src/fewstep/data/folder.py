"""Any folder or archive of images: `class/image`, `split/class/image`, or lists of labels."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from fewstep.core.errors import InputError, check_at_least, check_name
from fewstep.data.archives import (
    archive_images,
    contents,
    files_below,
    folders_in,
    is_archive,
    is_image,
    reading,
    unread,
    warn_of_empty,
)
from fewstep.data.label_lists import images_by_label
from fewstep.data.on_disk import OnDisk
from fewstep.data.pixels import DECODING, decode
from fewstep.data.prepared import Pixels, RawClass, fingerprint, load_or_prepare, stamp
from fewstep.data.store import ClassStore, dealt

SPLITS = ("train", "val", "test")
_ALSO_CALLED = {
    "train": ("training",), "val": ("valid", "validation", "dev"), "test": ("testing",),
}  # fmt: skip

_HOLD_DATA = {".csv", ".json", ".pkl", ".npz", ".npy", ".h5", ".zip", ".tar", ".tgz", ".gz", ".xz"}

Colour = Literal["rgb", "grey"]


@dataclass(frozen=True)
class ImageFolder(OnDisk):
    """Images of your own.

    One of

    - `root/class/image`, whose classes are dealt out to train, val and test by a fixed draw;
    - `root/split/class/image` with the splits named train, val and test and no class in two;
    - `root/labels.csv`, or `train.csv`, `val.csv` and `test.csv` there, with the columns filename
      and label, and the images at any depth;
    - a zip or tar file of one of the first two, in a folder or not. It is read into the memory.

    Classes may differ in their number of images; deeper folders count towards the class they are
    in.

    Raises:
        InputError: the folder is missing or has no classes, or one in two splits, or an image
            cannot be read, a list is wrong, or a setting is none of those below.
    """

    root: Path | None = None
    """The folder, or a zip or tar file."""
    size: int = 84
    """Height and width that the images are brought to."""
    colour: Colour = "rgb"
    """Three channels or one."""
    fractions: tuple[float, float, float] = (0.64, 0.16, 0.2)
    """Shares of the classes for train, val and test, where nothing splits them."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (3 if self.colour == "rgb" else 1, self.size, self.size)

    def pixels(self, content: bytes, name: str) -> Pixels:
        """Return an image file as one of this data set."""
        return decode(content, name, self.size, "RGB" if self.colour == "rgb" else "L")

    def splits(self) -> dict[str, ClassStore]:
        """Return the stores of train, val and test."""
        check_at_least(1, "pixel", size=self.size)
        check_name("colour", self.colour, get_args(Colour))
        if not (min(self.fractions) > 0 and abs(sum(self.fractions) - 1) <= 1e-6):
            raise InputError(f"fractions={self.fractions} must be positive and sum to 1")
        with reading(self.root):
            if self.root is None or not (self.root.is_dir() or is_archive(self.root)):
                given = self.root or "given"
                raise InputError(
                    f"there is no folder {given}; pass --root with class/image inside, or a zip or "
                    "tar file of that"
                )
            if self.root.is_dir():
                lists = _lists(self.root)
                files = images_by_label(self.root, lists) if lists else _files(self.root)
                _check_no_class_in_two(self.root, files)
                state = stamp(chain(lists.values(), *files.values()), self.root)
                read = partial(_of_folder, files, self.pixels)
            else:
                state = stamp([self.root], self.root.parent)
                read = partial(_of_archive, self.root, self.pixels)
        store = load_or_prepare(
            f"folder-{self.root.resolve().name}-{self.size}",
            fingerprint(DECODING, self.root.resolve(), self.size, self.colour, state),
            self.image_shape,
            read,
        )
        return {s: store.select(c) for s, c in _deal(store.names, self.fractions).items()}


def _lists(root: Path) -> dict[str, Path]:
    """Return the lists of labels of a folder, by what to put before a label."""
    of_splits = {f"{split}/": root / f"{split}.csv" for split in SPLITS}
    for lists in (of_splits, {"": root / "labels.csv"}):
        if all(path.is_file() for path in lists.values()):
            return lists
    return {}


def _files(root: Path) -> dict[str, list[Path]]:
    """Return the images of every class of a folder, by the names of `_by_class`."""
    names = [f.relative_to(root).as_posix() for f in files_below(root) if is_image(f.name)]
    folders = {p.name for p in root.iterdir() if p.is_dir()}
    classes = _by_class(root, names, folders, unread(root, _HOLD_DATA))
    above = [root / split for split in SPLITS] if set(SPLITS) <= folders else [root]
    empty = [folder for each in above for folder in folders_in(each)]
    warn_of_empty(c for c in empty if c.relative_to(root).as_posix() not in classes)
    return {name: [root / each for each in of_class] for name, of_class in classes.items()}


def _by_class(
    root: Path, names: Iterable[str], folders: Set[str], remark: str = ""
) -> dict[str, list[str]]:
    """Return the images of every class, named `class`, or `split/class` where there are splits.

    Args:
        root: Where they are.
        names: Their paths from there.
        folders: The folders there.
        remark: On what else is there, for an error.
    """
    is_split = set(SPLITS) <= folders
    if not is_split:
        _check_no_splits(root, folders)
    depth = 2 if is_split else 1
    classes: dict[str, list[str]] = defaultdict(list)
    stray: list[str] = []
    for name in names:
        parts = name.split("/")
        if is_split and len(parts) > 1 and parts[0] not in SPLITS:
            raise InputError(
                f"{root / parts[0]} has images and is beside train, val and test; move it out of "
                f"{root} or into one of them"
            )
        if len(parts) > depth:
            classes["/".join(parts[:depth])].append(name)
        else:
            stray.append(name)
    if not classes:
        raise InputError(
            f"{root} has no image in class/image or split/class/image{remark}; sort the images "
            "into a folder for each class, or name their classes in labels.csv, with the columns "
            "filename,label"
        )
    for split in SPLITS if is_split else ():
        if not any(name.startswith(f"{split}/") for name in classes):
            raise InputError(
                f"{root / split} holds no class/image; put a folder of images for each class there"
            )
    if stray:
        warnings.warn(
            f"images in no class are left out, {len(stray)} in all, such as {root / stray[0]}; "
            "move each into the folder of its class",
            stacklevel=1,
        )
    return classes


def _check_no_class_in_two(root: Path, names: Iterable[str]) -> None:
    """Raise InputError if a class is in several splits, as where these share out its images."""
    within: dict[str, list[str]] = defaultdict(list)
    for split, _, name in sorted(n.partition("/") for n in names if "/" in n):
        within[name].append(split)
    twice = [name for name, splits in within.items() if len(splits) > 1]
    if twice:
        name = twice[0]
        raise InputError(
            f"{root} has class {name} in {' and '.join(within[name])} ({len(twice)} in all), "
            "where few-shot tasks test on classes never trained on; put each into one split, or "
            "all into class/image without splits, and rename what only shares a name"
        )


def _check_no_splits(root: Path, folders: Set[str]) -> None:
    """Raise InputError if folders that would be classes are meant as splits, by their names."""
    meant = {
        name: split
        for split, others in _ALSO_CALLED.items()
        for name in sorted(folders)
        if name.lower() in (split, *others)
    }
    if len(set(meant.values())) > 1:  # one alone may be a class, of trains
        missing = [split for split in SPLITS if split not in folders]
        wrong = [f"{split} by {name}" for name, split in meant.items() if name != split]
        remedy = f"did you mean {' and '.join(wrong)}? rename" if wrong else "add it, or rename"
        raise InputError(
            f"{root} has folders {' and '.join(meant)}, which would be classes, as there is no "
            f"{' and no '.join(missing)}; {remedy} them"
        )


def _of_folder(
    files: dict[str, list[Path]], pixels: Callable[[bytes, str], Pixels]
) -> list[RawClass]:
    """Return the classes of a folder, whose files are read one by one."""

    def image(file: Path) -> Pixels:
        return pixels(contents(file), str(file))

    return [
        RawClass(name, [partial(image, file) for file in of_class])
        for name, of_class in files.items()
    ]


def _of_archive(root: Path, pixels: Callable[[bytes, str], Pixels]) -> list[RawClass]:
    """Return the classes of an archive; it may have them all in a folder."""
    read = ((PurePosixPath(name).parts, content) for name, content in archive_images(root))
    images = {
        parts: content
        for parts, content in sorted(read)  # as folders are
        if not any(part.startswith(".") or part == "__MACOSX" for part in parts)
    }
    if len({parts[0] for parts in images}) == 1:
        images = {parts[1:]: content for parts, content in images.items()}
    folders = {parts[0] for parts in images if len(parts) > 1}
    content_of = {"/".join(parts): content for parts, content in images.items()}
    classes = _by_class(root, content_of, folders)
    _check_no_class_in_two(root, classes)
    return [
        RawClass(name, [partial(pixels, content_of[n], f"{root}: {n}") for n in of_class])
        for name, of_class in classes.items()
    ]


def _deal(names: tuple[str, ...], fractions: tuple[float, float, float]) -> dict[str, list[int]]:
    """Return the class numbers of train, val and test."""
    if "/" in names[0]:
        return {
            split: [i for i, name in enumerate(names) if name.split("/")[0] == split]
            for split in SPLITS
        }
    total = len(names)
    train, val = round(fractions[0] * total), round(fractions[1] * total)
    if min(train, val, total - train - val) < 1:
        raise InputError(
            f"the folder's {total} classes are too few for train, val and test; add classes or "
            "sort them into train/, val/ and test/"
        )
    return dealt("folder", total, train, val)
