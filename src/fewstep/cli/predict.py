"""The command that tells images of yours apart."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fewstep.core.algorithm import ExtraSteps
from fewstep.core.errors import InputError
from fewstep.core.files import check_name_of_file, write_atomically
from fewstep.core.norm import Use
from fewstep.data.archives import files_below, folders_in, is_image, reading, warn_of_empty
from fewstep.data.views import Views
from fewstep.training.classifier import FewShotClassifier
from fewstep.training.display import say
from fewstep.training.load import OneCheckpoint


@dataclass(frozen=True)
class Predict:
    """Adapt a run's model to a few images of each of your classes, and name the class of others."""

    run_folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    support: Path
    """Folder with a folder of images for each class: as many classes as the run's ways, or fewer;
    any number where tasks start from prototypes. Characters are dark ink on light paper and fill
    the image."""
    query: Path
    """The images to name, drawn or taken as those of --support: a folder of them, at any depth, or
    one."""
    checkpoint: OneCheckpoint = "best"
    """The best in validation, or the last."""
    steps: int | None = None
    """Inner steps; the run's eval_steps if not given."""
    extra_steps: ExtraSteps | None = None
    """More steps than trained: refuse, or repeat the last, where parts differ by step; the run's if
    not given."""
    statistics: Use | None = None
    """What batch normalisation normalises by. By the batch, the images of --query are normalised
    together, and each answer depends on the others. If not given the run's, but the support set in
    place of the batch."""
    views: Views | None = None
    """Take the mean of the outputs for your images as they are and all of them mirrored, or turned
    by 1 to 3 quarters, each adapted to on its own."""
    out: Path | None = None
    """CSV file for the probability of every class, a row for each image."""
    device: str = "auto"
    """"cpu", "cuda", ...; "auto" takes a GPU where there is one."""

    def run(self, console: Console) -> None:
        """Print a class for each image, and how sure the model is."""
        if self.out is not None:
            check_name_of_file(self.out, ".csv")
        classifier = FewShotClassifier(
            self.run_folder,
            checkpoint=self.checkpoint,
            num_steps=self.steps,
            extra_steps=self.extra_steps,
            statistics=self.statistics,
            views=self.views,
            device=self.device,
        )
        with reading(self.support):
            images, labels = _labelled(self.support)
        classifier.check_classes(len(set(labels)))
        with reading(self.query):
            queries = [self.query] if self.query.is_file() else _images(self.query)
        classifier.fit(images, labels)
        probabilities = classifier.predict_proba(queries)
        table = Table()
        for column in ("image", "class"):
            table.add_column(column, overflow="fold")  # a name is never cut
        table.add_column("probability", justify="right")
        names = [f.name if f == self.query else str(f.relative_to(self.query)) for f in queries]
        classes = [str(classifier.classes_[c]) for c in probabilities.argmax(1)]
        for name, of_class, share in zip(names, classes, probabilities.max(1), strict=True):
            table.add_row(escape(name), escape(of_class), f"{share:.1%}")
        console.print(table)
        say(console, f"{len(classifier.classes_)} classes, {len(labels)} images to learn from; "
            f"{classifier.num_steps} inner steps; "
            f"normalisation statistics: {classifier.normalisation}")  # fmt: skip
        if self.out is not None:
            rows = zip(names, classes, *probabilities.T, strict=True)
            _write_csv(self.out, [("image", "class", *classifier.classes_), *rows])
            say(console, f"wrote {self.out}")


def _write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    # A name that is not Unicode is written byte by byte as the file system has it.
    write_atomically(path, text.getvalue().encode(errors="surrogateescape"))


def _labelled(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the images, and the class of each: the name of its folder."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give one with a folder for each class")
    # As in a folder to train on, deeper ones count.
    files = list(files_below(folder))
    images = [f for f in files if is_image(f.name) and f.parent != folder]
    if not images:
        raise InputError(
            f"{folder} has no folder of images for each class; put the images into CLASS/IMAGE"
        )
    names = [f.relative_to(folder).parts[0] for f in images]
    remedy = "put images to learn from into CLASS/IMAGE, as PNG or JPEG"
    _warn_of_left_out(files, images, "images of a class", remedy)
    warn_of_empty(c for c in folders_in(folder) if c.name not in names)
    return images, names


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"there is no image or folder {folder}; check the path")
    files = list(files_below(folder))
    images = sorted(f for f in files if is_image(f.name))
    if not images:
        raise InputError(
            f"{folder} holds no image; put some there, or give the folder that has them"
        )
    _warn_of_left_out(files, images, "images", "save images of other kinds as PNG or JPEG")
    return images


def _warn_of_left_out(
    files: Collection[Path], images: Collection[Path], what: str, remedy: str
) -> None:
    left = sorted(set(files) - set(images))
    if left:
        warnings.warn(
            f"files that are no {what} are left out, {len(left)} in all, such as {left[0]}; "
            f"{remedy}",
            stacklevel=2,
        )
