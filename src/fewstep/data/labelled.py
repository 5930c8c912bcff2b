"""Batches of images of all classes, each labelled by its class: supervised learning as tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from fewstep.core.errors import InputError, check_name
from fewstep.core.tasks import TaskBatch
from fewstep.data.changes import crop, mirror, recolour, shift, turn
from fewstep.data.counter_random import key_from_name, random_bits, random_uniform
from fewstep.data.episodes import check_square
from fewstep.data.store import ClassStore

TurnedClasses = Literal["none", "classes"]
_NARROWEST = 3 / 4  # sides of a crop, as in "Going deeper with convolutions", arXiv:1409.4842


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
            and c + 3 n of n classes; or "none".
        flips: Mirror each image left to right with probability 1/2.
        shifts: Move each image by up to so many pixels in both directions, edges repeated.
        crops: Cut a rectangle out of each image and stretch it to the whole, its sides 3:4 to 4:3
            and its share of the area between this and 1.
        colours: Multiply each image's brightness, contrast and saturation by factors of their own,
            up to so much below or above 1.
        seed: Any integer.

    Shapes: x is float32 in [0, 1], (tasks, 1 or examples, channels, height, width); y is int64,
        (tasks, 1 or examples).

    Raises:
        InputError: `examples` is below 1, `rotations` is neither, or images that are not square
            would be turned; `shifts` is negative or not below the images' side; `crops` is not
            above 0 and at most 1, or `colours` not at least 0 and below 1.
    """

    def __init__(
        self,
        store: ClassStore,
        split: str,
        *,
        examples: int,
        rotations: TurnedClasses = "none",
        flips: bool = False,
        shifts: int = 0,
        crops: float = 1.0,
        colours: float = 0.0,
        seed: int = 0,
    ) -> None:
        if examples < 1:
            raise InputError(f"examples={examples} must be at least 1")
        check_name("rotations", rotations, get_args(TurnedClasses))
        check_square(store, rotations)
        side = min(store.image_shape[1:])
        if not 0 <= shifts < side:
            raise InputError(f"shifts={shifts} must be 0 to {side - 1} pixels of these images")
        if not 0 < crops <= 1:
            raise InputError(f"crops={crops} must be above 0, and 1 at most: the whole image")
        if not 0 <= colours < 1:
            raise InputError(f"colours={colours} must be 0 or more, and below 1")
        self.store = store
        self.examples, self.rotations, self.flips, self.shifts = examples, rotations, flips, shifts
        self.crops, self.colours = crops, colours
        self.classes = len(store) * (4 if rotations == "classes" else 1)
        self._key = key_from_name(seed, f"{split}/labelled")

    def batch(self, start: int, count: int) -> TaskBatch:
        """Return tasks start, ..., start + count - 1."""
        device = self.store.starts.device
        task = torch.arange(start, start + count, device=device)[:, None]
        place = torch.arange(self.examples, device=device)

        def drawn(random: Callable[..., Tensor], first: int, draws: int) -> Iterator[Tensor]:
            for draw in range(first, first + draws):
                yield random(self._key, task, place, torch.full((), draw, device=device))

        of_class, of_image, flip, down, right = drawn(random_bits, 0, 5)
        y = of_class % self.classes
        c, quarters = y % len(self.store), y // len(self.store)
        x = self.store.images[self.store.starts[c] + of_image % self.store.counts[c]]
        if self.rotations == "classes":
            x = turn(x, quarters)
        if self.flips:
            x = mirror(x, flip % 2 == 1)
        if self.shifts:
            x = shift(x, *(bits % (2 * self.shifts + 1) - self.shifts for bits in (down, right)))
        x = x.float().div_(255)
        if self.crops < 1:
            x = crop(x, *_rectangle(self.crops, *drawn(random_uniform, 5, 4)))
        if self.colours:
            x = recolour(x, *(1 + self.colours * (2 * u - 1) for u in drawn(random_uniform, 9, 3)))
        return TaskBatch(x[:, :1], y[:, :1], x, y)


def _rectangle(least: float, u0: Tensor, u1: Tensor, u2: Tensor, u3: Tensor) -> tuple[Tensor, ...]:
    """Return top, left, height and width of rectangles of at least so much of the area."""
    area = least + (1 - least) * u0
    stretch = (2 * u1 - 1) * (-area.log()).clamp(max=-math.log(_NARROWEST))  # neither side above 1
    height, width = (area * stretch.exp()).sqrt(), (area / stretch.exp()).sqrt()
    return u2 * (1 - height), u3 * (1 - width), height, width
