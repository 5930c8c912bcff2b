"""mini-ImageNet: 100 classes of 600 colour images, in Ravi and Larochelle's split."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from fewstep.core.errors import InputError, check_at_least
from fewstep.data.archives import (
    archive_images,
    files_below,
    folder_images,
    is_archive,
    reading,
    unread,
)
from fewstep.data.label_lists import read_labels
from fewstep.data.on_disk import OnDisk
from fewstep.data.pixels import DECODING, decode
from fewstep.data.prepared import Pixels, RawClass, fingerprint, load_or_prepare, stamp
from fewstep.data.store import ClassStore

_PICKLED = {".pkl", ".pickle", ".npz"}  # by others, and a pickle may run anything
IMAGES = 600  # of every class
_LISTS = {
    "train": """
        n01532829 n01558993 n01704323 n01749939 n01770081 n01843383 n01910747 n02074367
        n02089867 n02091831 n02101006 n02105505 n02108089 n02108551 n02108915 n02111277
        n02113712 n02120079 n02165456 n02457408 n02606052 n02687172 n02747177 n02795169
        n02823428 n02966193 n03017168 n03047690 n03062245 n03207743 n03220513 n03337140
        n03347037 n03400231 n03476684 n03527444 n03676483 n03838899 n03854065 n03888605
        n03908618 n03924679 n03998194 n04067472 n04243546 n04251144 n04258138 n04275548
        n04296562 n04389033 n04435653 n04443257 n04509417 n04515003 n04596742 n04604644
        n04612504 n06794110 n07584110 n07697537 n07747607 n09246464 n13054560 n13133613
    """,
    "val": """
        n01855672 n02091244 n02114548 n02138441 n02174001 n02950826 n02971356 n02981792
        n03075370 n03417042 n03535780 n03584254 n03770439 n03773504 n03980874 n09256479
    """,
    "test": """
        n01930112 n01981276 n02099601 n02110063 n02110341 n02116738 n02129165 n02219486
        n02443484 n02871525 n03127925 n03146219 n03272010 n03544143 n03775546 n04146614
        n04149813 n04418357 n04522168 n07613480
    """,
}
CLASSES = {split: names.split() for split, names in _LISTS.items()}


@dataclass(frozen=True)
class MiniImageNet(OnDisk):
    """mini-ImageNet from class folders, tar or zip parts, or a flat folder with CSV splits.

    ImageNet's terms do not allow a download; a folder of yours may hold any of

    - class folders, `n01532829/*.jpg`, at any depth (`train/n01532829/*.jpg` too);
    - tar files of such folders, compressed or not, or zip files, in any number of parts;
    - images at any depth and train.csv, val.csv and test.csv (columns filename,label).

    Raises:
        InputError: there is no such folder, or it lacks classes or images.

    Reference: Ravi and Larochelle, Optimization as a model for few-shot learning, ICLR 2017.
    """

    root: Path | None = None
    """Folder with the images; else $FEWSTEP_DATA/mini-imagenet."""
    size: int = 84
    """Height and width of the images."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (3, self.size, self.size)

    def pixels(self, content: bytes, name: str) -> Pixels:
        """Return an image file as one of this data set."""
        return decode(content, name, self.size, "RGB")

    def splits(self) -> dict[str, ClassStore]:
        """Return the stores of train, val and test: 64, 16 and 20 classes."""
        check_at_least(1, "pixel", size=self.size)
        with reading(self.root):
            root = _root(self.root)
            state = stamp(files_below(root), root)
        store = load_or_prepare(
            f"mini-imagenet-{self.size}",
            fingerprint(DECODING, self.size, state),
            self.image_shape,
            partial(_read, root, self.pixels),
        )
        number = {name: i for i, name in enumerate(store.names)}
        return {
            split: store.select([number[name] for name in names])
            for split, names in CLASSES.items()
        }


def _root(root: Path | None) -> Path:
    if root is None and (data := os.environ.get("FEWSTEP_DATA")):
        root = Path(data) / "mini-imagenet"
    if root is None or not root.is_dir():
        missing = "no folder with mini-ImageNet is given" if root is None else f"no folder {root}"
        raise InputError(
            f"{missing}, and ImageNet's terms allow no download; put class folders, tar or zip "
            "files or CSV splits into a folder mini-imagenet and set FEWSTEP_DATA to the folder "
            "around it, or pass --root to `fewstep train`, `resume` or `evaluate`"
        )
    return root


def _read(root: Path, pixels: Callable[[bytes, str], Pixels]) -> list[RawClass]:
    labels = _labels(root)
    images: dict[str, dict[str, tuple[str, bytes]]] = defaultdict(dict)
    wanted = dict.fromkeys(name for names in CLASSES.values() for name in names)
    for file, name, content in _entries(root):
        path = PurePosixPath(name)
        label = labels.get(path.name, path.parent.name)
        if label in wanted:  # of all of ImageNet, the others would fill the memory
            # Of an archive beside what was taken out of it, once.
            images[label].setdefault(path.name, (f"{file}: {name}", content))
    for name in wanted:
        if len(images[name]) != IMAGES:
            raise InputError(
                f"{root} holds {len(images[name])} images of class {name}, where mini-ImageNet has "
                f"{IMAGES}{unread(root, _PICKLED)}; complete it by class folders, tar or zip "
                "files, or use --dataset folder for images of your own"
            )
    return [
        RawClass(
            name,
            [partial(pixels, content, file) for file, content in sorted(images[name].values())],
        )
        for name in wanted
    ]


def _entries(root: Path) -> Iterator[tuple[Path, str, bytes]]:
    """Yield source, name and content of every image in the folder and in its tar and zip files."""
    for name, content in folder_images(root):
        yield root, name, content
    for archive in sorted(p for p in root.iterdir() if p.is_file() and is_archive(p)):
        for name, content in archive_images(archive):
            yield archive, name, content


def _labels(root: Path) -> dict[str, str]:
    """Return the label of every file that the CSV splits name; none if there are none."""
    lists = [path for split in CLASSES if (path := root / f"{split}.csv").exists()]
    return {name: label for path in lists for name, label in read_labels(path)}
