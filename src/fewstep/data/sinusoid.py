"""Sinusoid regression, the first problem of the MAML paper."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.core.errors import check_at_least
from fewstep.core.tasks import TaskBatch
from fewstep.data.counter_random import key_from_name, random_uniform


class SinusoidEpisodes:
    """Regression onto y = A sin(x - p); episode i is a pure function of (seed, split, i).

    Amplitude A ~ U[0.1, 5], phase p ~ U[0, pi], inputs x ~ U[-5, 5].

    Args:
        split: Name of the split, which separates its episodes from other splits'.
        shots: Support points.
        queries: Query points.
        seed: Any integer.
        device: Where the episodes are drawn.

    Shapes: x and y are float32, (tasks, shots or queries, 1).

    Raises:
        InputError: `shots` or `queries` is below 1.

    Reference: Finn, Abbeel and Levine, ICML 2017, arXiv:1703.03400, section 5.1; the sign of the
        phase is that of its code.
    """

    def __init__(
        self,
        split: str,
        *,
        shots: int,
        queries: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        check_at_least(1, "point", shots=shots, queries=queries)
        self.shots, self.queries = shots, queries
        self.device = device
        self._key_curve = key_from_name(seed, f"{split}/curve")
        self._key_x = key_from_name(seed, f"{split}/x")

    def curve(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Return amplitudes and phases of episodes start, ..., start + count - 1, each (count,)."""
        episode = torch.arange(start, start + count, device=self.device)
        u = random_uniform(self._key_curve, episode[:, None], torch.arange(2, device=self.device))
        return 0.1 + 4.9 * u[:, 0], math.pi * u[:, 1]

    def batch(self, start: int, count: int) -> TaskBatch:
        """Return episodes start, ..., start + count - 1."""
        amplitude, phase = (c[:, None, None] for c in self.curve(start, count))
        episode = torch.arange(start, start + count, device=self.device)
        point = torch.arange(self.shots + self.queries, device=self.device)
        x = 10 * random_uniform(self._key_x, episode[:, None], point)[..., None] - 5
        y = amplitude * torch.sin(x - phase)
        x_support, x_query = torch.split(x.float(), [self.shots, self.queries], dim=1)
        y_support, y_query = torch.split(y.float(), [self.shots, self.queries], dim=1)
        return TaskBatch(x_support, y_support, x_query, y_query)
