"""The commands about data: list, prepare, verify, show."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from fewstep.core.cache import cache_folder
from fewstep.core.errors import InputError, check_at_least
from fewstep.data.glyphs import Glyphs
from fewstep.data.prepared import verify_prepared
from fewstep.report.episode_picture import picture_episodes
from fewstep.training.build import classification_episodes
from fewstep.training.config import SOURCES, Images, SinusoidData, option_arguments, to_dict
from fewstep.training.display import say
from fewstep.training.episode_options import ClassificationOptions, Split
from fewstep.training.parse import value_of
from fewstep.training.presets import preset

ImageDataset = Literal["glyphs", "omniglot", "mini-imagenet", "folder"]

_DESCRIPTIONS = {
    "glyphs": "drawn characters made by a program; needs no files",
    "omniglot": "handwritten characters; a folder, the two zips, or a download",
    "mini-imagenet": "100 ImageNet classes at 84x84; folders, tars, zips or CSV splits of yours",
    "folder": "your own images: --root with class/image, split/class/image or labels.csv, or a zip",
    "sinusoid": "regression; needs no files",
}


@dataclass(frozen=True)
class DataList:
    """List the data sets and where their prepared arrays are kept."""

    def run(self, console: Console) -> None:
        """Print the table."""
        table = Table("data set", "what it is")
        for name in SOURCES:
            table.add_row(name, _DESCRIPTIONS[name])
        console.print(table)
        say(console, f"prepared arrays: {cache_folder()}  ($FEWSTEP_CACHE moves them)")
        say(console, "raw data: --root, or $FEWSTEP_DATA/<data set>")
        for name in SOURCES:  # below the table, which would break them on a narrow terminal
            root = " --root FOLDER" if name == "folder" else ""
            first = "next: " if name == next(iter(SOURCES)) else "      "
            say(console, f"{first}fewstep train --dataset {name}{root}")


@dataclass(frozen=True)
class DataPrepare:
    """Read a data set once and store it as one memory-mapped array."""

    dataset: ImageDataset = "glyphs"
    """Which data set."""
    data: Images = field(default_factory=Glyphs)
    """Where it comes from."""

    @classmethod
    def default(cls, arguments: Sequence[str]) -> DataPrepare:
        """Return the command for the data set that `arguments` name."""
        return cls(*_dataset(arguments)[:2])

    def run(self, console: Console) -> None:
        """Prepare, and print what there is."""
        stores = self.data.splits()
        table = Table("split", "classes", "images", "image shape")
        for split, store in stores.items():
            images = int(store.counts.sum())
            shape = "x".join(map(str, store.image_shape))
            table.add_row(split, f"{len(store):,}", f"{images:,}", shape)
        console.print(table)
        say(console, f"next: {_command('data show', self)}")


@dataclass(frozen=True)
class DataVerify:
    """Compare every prepared array with its recorded checksum."""

    def run(self, console: Console) -> None:
        """Print a line for each array."""
        names = verify_prepared(cache_folder())
        for name in names:
            say(console, f"{name}: as prepared")
        if not names:
            say(console, "nothing is prepared yet; next: fewstep data prepare")


@dataclass(frozen=True)
class DataShow:
    """Draw a few episodes as a PNG file."""

    dataset: ImageDataset = "glyphs"
    """Which data set."""
    data: Images = field(default_factory=Glyphs)
    """Where it comes from."""
    episodes: ClassificationOptions = field(default_factory=ClassificationOptions)
    """What an episode holds."""
    split: Split = "train"
    """Which split; val and test use the eval options."""
    count: int = 3
    """How many episodes."""
    out: Path = Path("episodes.png")
    """Picture to write."""

    @classmethod
    def default(cls, arguments: Sequence[str]) -> DataShow:
        """Return the command for the data set that `arguments` name."""
        return cls(*_dataset(arguments))

    def run(self, console: Console) -> None:
        """Draw."""
        check_at_least(1, "episode", count=self.count)
        stores = self.data.splits()
        episodes = classification_episodes(self.episodes, stores, self.split, 0)
        picture_episodes(episodes, self.count, self.out)
        say(console, f"wrote {self.out}")
        recipe = "" if self.episodes.train_ways is None else " --recipe prototypes"
        say(console, f"next: {_command('train', self)}{recipe}")


def _command(name: str, after: DataPrepare | DataShow) -> str:
    """Return a command on the same data, and the same episodes, to be pasted."""
    parts: list[tuple[Any, Any]] = [(after.data, type(after.data)())]
    if isinstance(after, DataShow):
        parts.append((after.episodes, preset(after.dataset).episodes))
    words = ["fewstep", *name.split(), "--dataset", after.dataset]
    for part, default in parts:
        usual = to_dict(default)
        given = {key: value for key, value in to_dict(part).items() if value != usual.get(key)}
        words += option_arguments(given, part)
    return shlex.join(words)


def _dataset(arguments: Sequence[str]) -> tuple[ImageDataset, Images, ClassificationOptions]:
    """Return the data set that `--dataset` names, its source, and what training on it draws."""
    config = preset(value_of(arguments, "--dataset") or "glyphs")
    if isinstance(config.data, SinusoidData) or config.dataset == "sinusoid":
        raise InputError("dataset 'sinusoid' has no images; choose glyphs, omniglot or another")
    assert isinstance(config.episodes, ClassificationOptions)
    return config.dataset, config.data, config.episodes
