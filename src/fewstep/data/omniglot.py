"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

import pooch
from requests.exceptions import RequestException

from fewstep.core.cache import cache_folder
from fewstep.core.errors import InputError, check_at_least, check_name
from fewstep.data.archives import files_below, folder_images, reading, zip_images
from fewstep.data.on_disk import OnDisk
from fewstep.data.pixels import DECODING, strokes
from fewstep.data.prepared import Pixels, RawClass, fingerprint, load_or_prepare, stamp
from fewstep.data.store import ClassStore, dealt

PARTS = ("images_background", "images_evaluation")
CLASSES, DRAWINGS = 1623, 20
DOWNLOAD = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
MD5 = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
VALIDATION_ALPHABETS = frozenset(
    {"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"}
)
TEST_ALPHABETS = frozenset(
    {
        "Kannada", "Keble", "Malayalam", "Manipuri", "Mongolian", "Old_Church_Slavonic_(Cyrillic)",
        "Oriya", "Sylheti", "Syriac_(Serto)", "Tengwar", "Tibetan", "ULOG",
    }
)  # fmt: skip
TEST_CHARACTERS = frozenset(f"Gurmukhi/character{number}" for number in (42, 43, 44, 45))
ClassSplit = Literal["vinyals", "finn", "maml++"]
RANDOM_SPLITS = {"finn": (1100, 100), "maml++": (1150, 50)}  # train and val classes of 1,623


@dataclass(frozen=True)
class Omniglot(OnDisk):
    """Omniglot from a folder, the two zips, or a checksummed download.

    Strokes are 255 and the background is 0, the papers' 1 - pixel.

    Raises:
        InputError: the files are missing or damaged, or are not Omniglot, or a setting is none of
            those below.

    Deviation: the classes of the splits "finn" and "maml++" are as many as in the papers' code, but
        drawn by us, once for all runs; it shuffles the order in which it happens to list files.

    Reference: Lake, Salakhutdinov and Tenenbaum, Science 2015; split "vinyals": Vinyals et al.,
        Matching networks, NeurIPS 2016, in the lists published with Prototypical networks.
    """

    root: Path | None = None
    """Folder with the two zips or what they hold; else $FEWSTEP_DATA/omniglot; else a download."""
    class_split: ClassSplit = "vinyals"
    """Classes of train/val/test: 1028/172/423 by alphabet, 1100/100/423 or 1150/50/423 drawn."""
    size: int = 28
    """Height and width of the images."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (1, self.size, self.size)

    def pixels(self, content: bytes, name: str) -> Pixels:
        """Return an image file as one of this data set: strokes 255 on 0."""
        return strokes(content, name, self.size)

    def splits(self) -> dict[str, ClassStore]:
        """Return the stores of train, val and test."""
        check_at_least(1, "pixel", size=self.size)
        check_name("class_split", self.class_split, get_args(ClassSplit))
        with reading(self.root):
            sources = _sources(self.root)
            files = [f for s in sources for f in (files_below(s) if s.is_dir() else [s])]
            state = stamp(files, sources[0].parent)
        store = load_or_prepare(
            f"omniglot-{self.size}",
            fingerprint(DECODING, self.size, state),
            self.image_shape,
            partial(_read, sources, self.pixels),
        )
        return {
            name: store.select(c) for name, c in _classes(self.class_split, store.names).items()
        }


def _sources(root: Path | None) -> list[Path]:
    """Return the two zips, or the two folders, to read."""
    if root is None and (data := os.environ.get("FEWSTEP_DATA")):
        folder = Path(data) / "omniglot"
        root = folder if folder.is_dir() else None
    if root is None:
        return [_download(part) for part in PARTS]
    for candidates in ([root / p for p in PARTS], [root / f"{p}.zip" for p in PARTS]):
        if all(c.exists() for c in candidates):
            return candidates
    missing = [f"{p}.zip" for p in PARTS if not (root / f"{p}.zip").exists()]
    raise InputError(
        f"{root} lacks {' and '.join(missing)}; put the two Omniglot zips, or the folders they "
        "hold, there, or leave out --root to download them"
    )


def _download(part: str) -> Path:
    try:
        file = pooch.retrieve(
            f"{DOWNLOAD}{part}.zip",
            known_hash=f"md5:{MD5[part]}",
            fname=f"{part}.zip",
            path=cache_folder() / "downloads",
            progressbar=False,
        )
    except (RequestException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(
            f"could not download {part}.zip ({reason}); get images_background.zip and "
            "images_evaluation.zip another way, put both into a folder omniglot and set "
            "FEWSTEP_DATA to the folder around it, or pass --root to `fewstep train`, `resume` or "
            "`evaluate`"
        ) from error
    return Path(file)


def _read(sources: Sequence[Path], pixels: Callable[[bytes, str], Pixels]) -> list[RawClass]:
    images: dict[str, list[tuple[str, bytes]]] = defaultdict(list)
    for source in sources:
        entries = folder_images(source) if source.is_dir() else zip_images(source)
        for name, content in entries:
            path = PurePosixPath(name)
            images["/".join(path.parts[-3:-1])].append((f"{source}: {name}", content))
    wrong = [name for name, drawings in images.items() if len(drawings) != DRAWINGS]
    if len(images) != CLASSES or wrong:
        found = f"{wrong[0]} has {len(images[wrong[0]])} drawings" if wrong else f"{len(images)}"
        raise InputError(
            f"{sources[0].parent} is not the whole of Omniglot, {CLASSES} characters of {DRAWINGS} "
            f"drawings (found: {found}{'' if wrong else ' characters'}); get the two zips again"
        )
    return [
        RawClass(
            name,
            [partial(pixels, content, file) for file, content in sorted(images[name])],
        )
        for name in sorted(images)
    ]


def _classes(split: str, names: Sequence[str]) -> dict[str, list[int]]:
    """Return the class numbers of train, val and test."""
    if split in RANDOM_SPLITS:
        return dealt(f"omniglot/{split}", len(names), *RANDOM_SPLITS[split])
    alphabets = [name.split("/")[0] for name in names]
    test = [
        i for i, (name, alphabet) in enumerate(zip(names, alphabets, strict=True))
        if alphabet in TEST_ALPHABETS or name in TEST_CHARACTERS
    ]  # fmt: skip
    val = [i for i, alphabet in enumerate(alphabets) if alphabet in VALIDATION_ALPHABETS]
    held_out = {*test, *val}
    train = [i for i in range(len(names)) if i not in held_out]
    return {"train": train, "val": val, "test": test}
