"""Small episodes drawn for many iterations at once."""

from __future__ import annotations

from fewstep.core.tasks import Episodes, TaskBatch

_BYTES = 1 << 24
_BATCHES = 64


class DrawnAhead:
    """The same episodes, drawn for the batches to come as well while they are small.

    Drawing takes as many operations for one episode as for hundreds. Ahead are at most 64 batches
    and 16 MiB.

    Args:
        episodes: Where to draw from.
    """

    def __init__(self, episodes: Episodes) -> None:
        self._episodes = episodes
        self._size: float | None = None
        self._drawn: dict[tuple[int, int], TaskBatch] = {}

    def batch(self, start: int, count: int) -> TaskBatch:
        """Return episodes start, ..., start + count - 1."""
        found = self._drawn.get((start, count))
        if found is None:
            drawn = self._episodes.batch(start, self._batches(count) * count)
            self._size = sum(t.nbytes for t in drawn.tensors()) / len(drawn)
            batches = enumerate(drawn.split(count))
            self._drawn = {(start + i * count, count): batch for i, batch in batches}
            found = self._drawn[start, count]
        return found

    def _batches(self, count: int) -> int:
        """Return how many to draw at once: one before the size of an episode is known."""
        if self._size is None:
            return 1
        return max(1, min(_BATCHES, int(_BYTES / (self._size * count))))
