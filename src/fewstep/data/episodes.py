"""Few-shot classification episodes from a class store."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from fewstep.core.errors import InputError, check_at_least, check_name
from fewstep.core.tasks import TaskBatch
from fewstep.data.augmentation import UNCHANGED, Augmentation
from fewstep.data.changes import orient, turn
from fewstep.data.counter_random import key_from_name, random_bits, random_subset
from fewstep.data.store import ClassStore

Rotations = Literal["none", "classes", "mirrored-classes", "episode", "together"]


def classes_of_each(rotations: Rotations) -> int:
    """Return how many classes each class of a store makes."""
    return {"classes": 4, "mirrored-classes": 8}.get(rotations, 1)


def check_square(store: ClassStore, rotations: Rotations) -> None:
    """Check that the images can be turned, if they are to be.

    Raises:
        InputError: they are not square.
    """
    _, height, width = store.image_shape
    if rotations != "none" and height != width:
        raise InputError(
            f"rotations={rotations!r} needs square images, but these are {height}x{width}; "
            "use rotations='none'"
        )


class ClassificationEpisodes:
    """N-way K-shot episodes; episode i is a pure function of (seed, split, i).

    An episode draws `ways` classes, and for each class `shots` images for the support and
    `queries` other images for the query set. Labels number the drawn classes 0 .. ways - 1, so a
    class has another label in another episode. All of it happens on the store's device.

    Args:
        store: The classes to draw from.
        split: Name of the split, which separates its episodes from other splits'.
        ways: Classes of an episode.
        shots: Support images of each class.
        queries: Query images of each class.
        rotations: "none"; "classes", each quarter turn of a class is a class of its own;
            "mirrored-classes", and so are their mirror images; "episode", each drawn class of an
            episode is turned as a whole by a random quarter; or "together", all classes of an
            episode are turned by the same random quarter, so that none can be told from another by
            how it stands.
        augmentation: What chance does to each image after that, whatever its class.
        seed: Any integer.

    Shapes: x is float32 in [0, 1], (tasks, ways * shots or queries, channels, height, width), class
        after class; y is int64, (tasks, ways * shots or queries).

    Raises:
        InputError: `ways`, `shots` or `queries` is below 1, the store has too few classes, a class
            too few images, `rotations` is none of these or would turn images that are not square,
            or a shift is as wide as the images.

    Reference: rotated classes, Santoro et al. 2016; turned per episode, the code of MAML; turned
        together, ours.
    """

    def __init__(
        self,
        store: ClassStore,
        split: str,
        *,
        ways: int,
        shots: int,
        queries: int,
        rotations: Rotations = "none",
        augmentation: Augmentation = UNCHANGED,
        seed: int = 0,
    ) -> None:
        check_at_least(1, ways=ways, shots=shots, queries=queries)
        check_name("rotations", rotations, get_args(Rotations))
        self._classes = len(store) * classes_of_each(rotations)
        if ways > self._classes:
            raise InputError(
                f"ways={ways} asks for more classes than the {self._classes} of the {split} split; "
                f"ask for at most {self._classes}"
            )
        check_square(store, rotations)
        augmentation.check_fits(store.image_shape)
        self._largest = int(store.counts.max())
        smallest = int(store.counts.min())
        if shots + queries > smallest:
            name = store.names[int(store.counts.argmin())]
            raise InputError(
                f"shots={shots} and queries={queries} need {shots + queries} images of every "
                f"class, but class {name} of the {split} split has {smallest}; ask for fewer"
            )
        self.store = store
        self.ways, self.shots, self.queries = ways, shots, queries
        self.rotations, self.augmentation = rotations, augmentation
        self._key_classes = key_from_name(seed, f"{split}/classes")
        self._key_images = key_from_name(seed, f"{split}/images")
        self._key_turns = key_from_name(seed, f"{split}/turns")
        self._key_augmentation = key_from_name(seed, f"{split}/flips")  # when these were all

    def batch(self, start: int, count: int) -> TaskBatch:
        """Return episodes start, ..., start + count - 1."""
        device = self.store.starts.device
        episode = torch.arange(start, start + count, device=device)
        way = torch.arange(self.ways, device=device)
        population = torch.full((1,), self._classes, device=device)
        drawn = random_subset(
            self._key_classes, self.ways, population, episode, largest=self._classes
        )
        classes = drawn % len(self.store)
        images = random_subset(
            self._key_images,
            self.shots + self.queries,
            self.store.counts[classes],
            episode[:, None],
            way,
            largest=self._largest,
        )
        index = self.store.starts[classes][..., None] + images
        x = self.store.images[index]  # (tasks, ways, shots + queries, channels, height, width)
        if self.rotations in ("classes", "mirrored-classes"):
            x = orient(x, drawn[..., None] // len(self.store))
        elif self.rotations == "episode":
            bits = random_bits(self._key_turns, episode[:, None], way)
            x = turn(x, bits[..., None] % 4)
        elif self.rotations == "together":
            x = turn(x, random_bits(self._key_turns, episode[:, None, None]) % 4)
        place = torch.arange(self.shots + self.queries, device=device)
        x = self.augmentation(
            x, self._key_augmentation, episode[:, None, None], way[:, None], place
        )
        x_support, x_query = torch.split(x, [self.shots, self.queries], dim=2)
        y = way.expand(count, self.ways)
        return TaskBatch(
            x_support.flatten(1, 2),
            y.repeat_interleave(self.shots, dim=1),
            x_query.flatten(1, 2),
            y.repeat_interleave(self.queries, dim=1),
        )
