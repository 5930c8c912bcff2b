"""The command that tells images of yours apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from fewstep.core.algorithm import ExtraSteps
from fewstep.core.errors import InputError
from fewstep.core.norm import Use
from fewstep.core.tasks import TaskBatch
from fewstep.data.archives import contents, files_below, is_image, reading
from fewstep.data.views import Views, views_of
from fewstep.training.config import ClassificationOptions, Images, SinusoidData
from fewstep.training.load import OneCheckpoint, check_few_shot, load_learner
from fewstep.training.parse import load_config
from fewstep.training.run_folder import RunFolder


@dataclass(frozen=True)
class Predict:
    """Adapt a run's model to a few images of each of your classes, and name the class of others."""

    run_folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    support: Path
    """Folder with a folder of images for each class, as many classes as the run's ways."""
    query: Path
    """The images to name: a folder of them, or one."""
    checkpoint: OneCheckpoint = "best"
    """The best in validation, or the last."""
    steps: int | None = None
    """Inner steps; the run's eval_steps if not given."""
    extra_steps: ExtraSteps | None = None
    """More steps than trained: refuse, or repeat the last, where parts differ by step; the run's if
    not given."""
    statistics: Use | None = None
    """What batch normalisation normalises by; the run's if not given. By "batch", the images of
    --query are normalised together, so that each answer depends on the others."""
    views: Views | None = None
    """Take the mean of the outputs for your images as they are and all of them mirrored, or turned
    by 1 to 3 quarters, each adapted to on its own."""
    device: str = "auto"
    """"cpu", "cuda", ...; "auto" takes a GPU where there is one."""

    def run(self, console: Console) -> None:
        """Print a class for each image, and how sure the model is."""
        config = load_config(RunFolder.open(self.run_folder).path / "config.toml")
        if isinstance(config.data, SinusoidData):
            raise InputError(f"{self.run_folder} is a run on sinusoids; predict needs images")
        check_few_shot(config, self.run_folder)
        assert isinstance(config.episodes, ClassificationOptions)
        ways = config.episodes.ways
        with reading(self.support):
            classes = _classes(self.support, ways)
        with reading(self.query):
            queries = [self.query] if self.query.is_file() else _images(self.query)
        learner = load_learner(
            self.run_folder,
            checkpoint=self.checkpoint,
            device=self.device,
            extra_steps=self.extra_steps,
        )
        device = next(learner.module.parameters()).device
        labels = [i for i, files in enumerate(classes.values()) for _ in files]
        files = [file for of_class in classes.values() for file in of_class]
        task = TaskBatch(
            _read(files, config.data)[None],
            torch.tensor([labels]),
            _read(queries, config.data)[None],
            torch.zeros(1, len(queries), dtype=torch.int64),  # nobody knows; the loss is not used
        ).to(device)
        steps = config.algorithm.eval_steps if self.steps is None else self.steps
        outputs = [
            learner.predict(task.seen(view), 1, num_steps=steps, statistics=self.statistics)[0, -1]
            for view in views_of(self.views)
        ]
        sure, found = torch.stack(outputs).mean(0).softmax(-1).cpu().max(-1)
        norm = learner.algorithm.norm_statistics
        if self.statistics is not None:
            norm = replace(norm, use=self.statistics)
        table = Table(
            title=f"{ways} classes, {len(files)} images to learn from, {steps} inner steps",
            caption=f"normalisation statistics: {norm.describe(learner.module)}",
        )
        for column in ("image", "class"):
            table.add_column(column, overflow="fold")  # a name is never cut
        table.add_column("probability", justify="right")
        names = list(classes)
        for file, number, probability in zip(queries, found, sure, strict=True):
            words = escape(file.name), escape(names[int(number)])
            table.add_row(*words, f"{float(probability):.1%}")
        console.print(table)


def _classes(folder: Path, ways: int) -> dict[str, list[Path]]:
    """Return the images of each class, by the name of its folder."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give one with a folder for each class")
    found: dict[str, list[Path]] = {}
    for file in files_below(folder):  # as in a folder to train on, deeper ones count
        first, *deeper = file.relative_to(folder).parts
        if deeper and is_image(file.name):
            found.setdefault(first, []).append(file)
    if len(found) != ways:
        raise InputError(
            f"{folder} holds {len(found)} folders of images, and the run learned to tell {ways} "
            f"classes apart; give {ways}"
        )
    return found


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"there is no image or folder {folder}; check the path")
    found = sorted(p for p in folder.iterdir() if p.is_file() and is_image(p.name))
    if not found:
        raise InputError(f"{folder} holds no image; put some there")
    return found


def _read(files: Sequence[Path], data: Images) -> Tensor:
    """Return the images as the run's are, (images, channels, height, width) on [0, 1]."""
    pixels = np.stack([data.pixels(contents(file), str(file)) for file in files])
    return torch.from_numpy(pixels).float().div_(255)
