"""Batches of images of all classes, each labelled by its class: supervised learning as tasks."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch

from fewstep.core.errors import InputError, check_at_least, check_name
from fewstep.core.tasks import TaskBatch
from fewstep.data.augmentation import UNCHANGED, Augmentation
from fewstep.data.changes import orient
from fewstep.data.counter_random import key_from_name, random_bits
from fewstep.data.episodes import check_square, classes_of_each
from fewstep.data.store import ClassStore

TurnedClasses = Literal["none", "classes", "mirrored-classes"]


def hold_out(store: ClassStore, share: float) -> dict[str, ClassStore]:
    """Return stores of the same classes with images of their own: train, val and test.

    Args:
        store: The classes.
        share: How much of each class's images goes to val, and to test; an image at least.

    Raises:
        InputError: nothing would be left to train on, or `share` is not positive.
    """
    held = (store.counts * share).round().long().clamp(min=1)
    kept = store.counts - 2 * held
    if not (share > 0 and kept.min() >= 1):
        raise InputError(
            f"held_out={share} for val, and for test, must be above 0 and leave each class an "
            f"image; the smallest has {int(store.counts.min())}"
        )
    ends = store.starts + store.counts
    return {
        "train": replace(store, counts=kept),
        "val": replace(store, starts=ends - 2 * held, counts=held),
        "test": replace(store, starts=ends - held, counts=held),
    }


class LabelledImages:
    """Tasks whose query set is a batch of images of all classes, labelled by class.

    Class c has label c in every task, so that a model can learn them without adapting: an
    algorithm of no inner steps on such tasks is supervised learning. Task i is a pure function of
    (seed, split, i). The support set, which nobody adapts to, is the first image.

    Args:
        store: The classes.
        split: Name of the split, which separates its tasks from other splits'.
        examples: Images of a batch, of classes and images drawn with replacement.
        rotations: "classes" makes each quarter turn of class c a class of its own, c + n, c + 2 n
            and c + 3 n of n classes; "mirrored-classes" their mirror images too, c + 4 n to
            c + 7 n; or "none".
        augmentation: What chance does to each image, after its turn.
        seed: Any integer.

    Shapes: x is float32 in [0, 1], (tasks, 1 or examples, channels, height, width); y is int64,
        (tasks, 1 or examples).

    Raises:
        InputError: `examples` is below 1, `rotations` is none of these, or images that are not
            square would be turned, or a shift is as wide as they are.
    """

    def __init__(
        self,
        store: ClassStore,
        split: str,
        *,
        examples: int,
        rotations: TurnedClasses = "none",
        augmentation: Augmentation = UNCHANGED,
        seed: int = 0,
    ) -> None:
        check_at_least(1, examples=examples)
        check_name("rotations", rotations, get_args(TurnedClasses))
        check_square(store, rotations)
        augmentation.check_fits(store.image_shape)
        self.store = store
        self.examples, self.rotations, self.augmentation = examples, rotations, augmentation
        self.classes = len(store) * classes_of_each(rotations)
        self._key = key_from_name(seed, f"{split}/labelled")
        self._key_augmentation = key_from_name(seed, f"{split}/augmentation")

    def batch(self, start: int, count: int) -> TaskBatch:
        """Return tasks start, ..., start + count - 1."""
        device = self.store.starts.device
        task = torch.arange(start, start + count, device=device)[:, None]
        place = torch.arange(self.examples, device=device)
        of_class, of_image = (
            random_bits(self._key, task, place, torch.full((), draw, device=device))
            for draw in range(2)
        )
        y = of_class % self.classes
        drawn, orientation = y % len(self.store), y // len(self.store)
        x = self.store.images[self.store.starts[drawn] + of_image % self.store.counts[drawn]]
        if self.rotations != "none":
            x = orient(x, orientation)
        x = self.augmentation(x, self._key_augmentation, task, place)
        return TaskBatch(x[:, :1], y[:, :1], x, y)
