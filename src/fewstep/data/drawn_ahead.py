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
        self._start = 0
        self._drawn: TaskBatch | None = None

    def batch(self, start: int, count: int) -> TaskBatch:
        """Return episodes start, ..., start + count - 1."""
        if self._drawn is None:
            self._start, self._drawn = start, self._episodes.batch(start, count)
        if not self._start <= start <= start + count <= self._start + len(self._drawn):
            size = sum(t.nbytes for t in self._drawn.tensors()) / len(self._drawn)
            ahead = max(count, min(_BATCHES * count, int(_BYTES / size)))
            self._start, self._drawn = start, self._episodes.batch(start, ahead)
        return self._drawn.batch(start - self._start, count)
