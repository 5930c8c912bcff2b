"""Episodes drawn ahead are the same episodes."""

from __future__ import annotations

import pytest
import torch

from fewstep.core.tasks import TaskBatch
from fewstep.data.drawn_ahead import DrawnAhead
from fewstep.data.sinusoid import SinusoidEpisodes


class Counted:
    """Episodes that note what they were asked for."""

    def __init__(self, shots: int) -> None:
        self._episodes = SinusoidEpisodes("train", shots=shots, queries=3)
        self.asked: list[tuple[int, int]] = []

    def batch(self, start: int, count: int) -> TaskBatch:
        self.asked.append((start, count))
        return self._episodes.batch(start, count)


@pytest.mark.parametrize("starts", [range(0, 400, 4), [8, 0, 100, 3, 3], range(396, -1, -4)])
def test_the_same_episodes(starts: range | list[int]) -> None:
    episodes = Counted(shots=2)
    ahead = DrawnAhead(episodes)
    for start in starts:
        expected = episodes._episodes.batch(start, 4)
        for found, wanted in zip(ahead.batch(start, 4).tensors(), expected.tensors(), strict=True):
            assert torch.equal(found, wanted)


def test_many_batches_are_drawn_at_once() -> None:
    episodes = Counted(shots=2)
    ahead = DrawnAhead(episodes)
    for start in range(0, 4 * 65, 4):
        ahead.batch(start, 4)
    assert episodes.asked == [(0, 4), (4, 256)]


def test_large_episodes_are_not() -> None:
    episodes = Counted(shots=500_000)  # 4 MB each
    ahead = DrawnAhead(episodes)
    for start in range(0, 8, 2):
        ahead.batch(start, 2)
    assert episodes.asked == [(0, 2), (2, 4), (6, 4)]
