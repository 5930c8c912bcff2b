"""Batches of images of all classes, each labelled by its class: supervised learning as tasks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fewstep.core.errors import InputError
from fewstep.core.tasks import TaskBatch
from fewstep.data.counter_random import key_from_name, random_bits
from fewstep.data.store import ClassStore


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
        flips: Mirror each image left to right with probability 1/2.
        shifts: Move each image by up to so many pixels in both directions, edges repeated.
        seed: Any integer.

    Shapes: x is float32 in [0, 1], (tasks, 1 or examples, channels, height, width); y is int64,
        (tasks, 1 or examples).

    Raises:
        InputError: `examples` is below 1, or `shifts` is negative or not below the images' side.
    """

    def __init__(
        self,
        store: ClassStore,
        split: str,
        *,
        examples: int,
        flips: bool = False,
        shifts: int = 0,
        seed: int = 0,
    ) -> None:
        if examples < 1:
            raise InputError(f"examples={examples} must be at least 1")
        side = min(store.image_shape[1:])
        if not 0 <= shifts < side:
            raise InputError(f"shifts={shifts} must be 0 to {side - 1} pixels of these images")
        self.store = store
        self.examples, self.flips, self.shifts = examples, flips, shifts
        self._key = key_from_name(seed, f"{split}/labelled")

    def batch(self, start: int, count: int) -> TaskBatch:
        """Return tasks start, ..., start + count - 1."""
        device = self.store.starts.device
        task = torch.arange(start, start + count, device=device)[:, None]
        place = torch.arange(self.examples, device=device)
        of_class, of_image, flip, down, right = (
            random_bits(self._key, task, place, torch.full((), draw, device=device))
            for draw in range(5)
        )
        y = of_class % len(self.store)
        index = self.store.starts[y] + of_image % self.store.counts[y]
        _, height, width = self.store.image_shape
        rows = self._along(height, down, torch.zeros_like(flip))
        columns = self._along(width, right, flip)
        x = self.store.images[index]
        if self.flips or self.shifts:
            x = x.take_along_dim(rows[..., None, :, None], -2)
            x = x.take_along_dim(columns[..., None, None, :], -1)
        x = x.float().div_(255)
        return TaskBatch(x[:, :1], y[:, :1], x, y)

    def _along(self, side: int, shift: Tensor, flip: Tensor) -> Tensor:
        """Return which row, or column, comes where: (tasks, examples, side)."""
        at = torch.arange(side, device=shift.device).expand(*shift.shape, side)
        if self.flips:
            at = torch.where((flip % 2 == 1)[..., None], at.flip(-1), at)
        moved = at + (shift % (2 * self.shifts + 1) - self.shifts)[..., None]
        return moved.clamp(0, side - 1)
