"""Images grouped by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.data.counter_random import key_from_name, random_subset


@dataclass(frozen=True)
class ClassStore:
    """Images of many classes in one array; an episode is an index into it.

    Args:
        images: uint8, (images, channels, height, width); may be memory-mapped and shared between
            the splits of one data set.
        starts: int64, (classes,): index of each class's first image.
        counts: int64, (classes,): how many images follow it.
        names: Class names, for messages and pictures.
    """

    images: Tensor
    starts: Tensor
    counts: Tensor
    names: tuple[str, ...]

    @classmethod
    def from_counts(cls, images: Tensor, counts: Sequence[int], names: Sequence[str]) -> ClassStore:
        """Build from images that lie class after class, `counts[c]` of class c."""
        count = torch.tensor(counts, dtype=torch.int64)
        return cls(images, count.cumsum(0) - count, count, tuple(names))

    def __len__(self) -> int:
        """Return the number of classes."""
        return len(self.names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def select(self, classes: Sequence[int]) -> ClassStore:
        """Return the store of some classes, by index, sharing the images."""
        index = torch.as_tensor(classes, dtype=torch.int64, device=self.starts.device)
        names = tuple(self.names[c] for c in classes)
        return ClassStore(self.images, self.starts[index], self.counts[index], names)

    def to(self, device: torch.device | str) -> ClassStore:
        """Return the same store on `device`."""
        (moved,) = to_device({"": self}, device).values()
        return moved


def dealt(name: str, classes: int, train: int, val: int) -> dict[str, list[int]]:
    """Return the classes of train, val and test, drawn once for all runs.

    Args:
        name: What is dealt; another name, another order.
        classes: How many there are.
        train: How many of them are for training.
        val: How many for validation; the others are for the test.
    """
    key, zero = key_from_name(0, name), torch.zeros(1, dtype=torch.int64)
    order = random_subset(key, classes, zero + classes, zero, largest=classes)[0].tolist()
    return {
        "train": order[:train],
        "val": order[train : train + val],
        "test": order[train + val :],
    }


def to_device(
    stores: Mapping[str, ClassStore], device: torch.device | str
) -> dict[str, ClassStore]:
    """Return the same stores on `device`; images that several share are moved once."""
    images = {id(store.images): store.images for store in stores.values()}
    moved = {each: of_it.to(device) for each, of_it in images.items()}
    return {
        name: ClassStore(
            moved[id(store.images)], store.starts.to(device), store.counts.to(device), store.names
        )
        for name, store in stores.items()
    }
