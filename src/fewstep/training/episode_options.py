"""What a task is, as settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fewstep.core.errors import check_at_least
from fewstep.data.augmentation import Augmentation
from fewstep.data.episodes import Rotations
from fewstep.data.labelled import TurnedClasses

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class _Drawing:
    """How an N-way K-shot episode is drawn."""

    ways: int = 5
    """Classes of an episode."""
    train_ways: int | None = None
    """Classes of an episode in training, where tasks start from prototypes; as many as in tests if
    not given."""
    shots: int = 1
    """Support images of each class."""
    queries: int = 5
    """Query images of each class, in training."""
    eval_queries: int = 15
    """Query images of each class, in validation and test."""
    rotations: Rotations = "none"
    """Quarter turns in training: none; each turn is a class of its own (classes), and each mirror
    image, too (mirrored-classes); each class of an episode is turned at random (episode); or all of
    them alike (together)."""
    eval_rotations: Rotations = "none"
    """The same in validation and test."""


@dataclass(frozen=True)
class ClassificationOptions(Augmentation, _Drawing):  # the last one's fields come first
    """What an N-way K-shot episode holds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(2, ways=self.ways, train_ways=self.train_ways)
        check_at_least(1, shots=self.shots, queries=self.queries, eval_queries=self.eval_queries)

    def ways_of(self, split: Split) -> int:
        """Return the classes of an episode of a split."""
        return self.ways if split != "train" or self.train_ways is None else self.train_ways

    def rotations_of(self, split: Split) -> Rotations:
        """Return the quarter turns of a split."""
        return self.rotations if split == "train" else self.eval_rotations


@dataclass(frozen=True)
class RegressionOptions:
    """What a regression episode holds."""

    shots: int = 10
    """Support points."""
    queries: int = 10
    """Query points, in training, validation and test."""


@dataclass(frozen=True)
class _Labelled:
    """How a batch of all training classes is drawn."""

    examples: int = 128
    """Images of a batch."""
    held_out: float = 0.05
    """Share of each class's images for validation, and as many for test."""
    rotations: TurnedClasses = "none"
    """Make every quarter turn of a class a class of its own, and its mirror image too."""


@dataclass(frozen=True)
class SupervisedOptions(Augmentation, _Labelled):
    """What a batch of all training classes holds; each class keeps images for validation, test."""


EpisodeOptions = ClassificationOptions | RegressionOptions | SupervisedOptions
