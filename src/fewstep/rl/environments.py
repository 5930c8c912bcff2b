"""What a task is in reinforcement learning: an environment, here many at once."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fewstep.core.errors import check_at_least
from fewstep.data.counter_random import random_normal


class Outcome(NamedTuple):
    """What one time step gives.

    Args:
        observations: What is seen next, (tasks, episodes, observation_size).
        rewards: (tasks, episodes).
        ended: Whether the episode is over, (tasks, episodes), bool; what comes after is ignored.
    """

    observations: Tensor
    rewards: Tensor
    ended: Tensor


class Environments(Protocol):
    """The environments of several tasks, in each of which several episodes run side by side."""

    def reset(self) -> Tensor:
        """Begin all episodes; return the observations, (tasks, episodes, observation_size)."""
        ...

    def step(self, actions: Tensor) -> Outcome:
        """Take actions, (tasks, episodes, action_size), in all of them."""
        ...

    def close(self) -> None:
        """Free what they hold; nobody steps in them any more."""
        ...


class TaskEnvironments(Protocol):
    """A source of tasks, in which task i is always the same."""

    @property
    def observation_size(self) -> int:
        """Numbers of an observation."""
        ...

    @property
    def action_size(self) -> int:
        """Numbers of an action."""
        ...

    @property
    def horizon(self) -> int:
        """Time steps of an episode, at most."""
        ...

    def environments(self, start: int, count: int, episodes: int) -> Environments:
        """Return tasks start, ..., start + count - 1, with so many episodes of each."""
        ...

    def noise(self, start: int, count: int, episodes: int, step: int) -> Tensor:
        """Return normal numbers for the actions of the episodes after `step` inner steps.

        Returns:
            (horizon, tasks, episodes, action_size), of task i always the same.
        """
        ...


class DrawnNoise:
    """What sources of tasks share that draw the noise of their actions.

    Args:
        key: Of the noise, from `key_from_name`.
        action_size: Numbers of an action.
        horizon: Time steps of an episode, at most.
        dtype: Of the noise.
        device: Of the noise.

    Raises:
        InputError: `horizon` is below 1.
    """

    def __init__(
        self,
        key: int,
        action_size: int,
        horizon: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        check_at_least(1, "time step", horizon=horizon)
        self.action_size, self.horizon = action_size, horizon
        self.dtype, self.device = dtype, device
        self._key_noise = key

    def noise(self, start: int, count: int, episodes: int, step: int) -> Tensor:
        """Return the noise of the actions, (horizon, count, episodes, action_size)."""
        tasks = torch.arange(start, start + count, device=self.device)
        sizes = (self.horizon, episodes, self.action_size)
        return action_noise(self._key_noise, tasks, step, *sizes).to(self.dtype)


def action_noise(
    key: int, tasks: Tensor, step: int, horizon: int, episodes: int, action_size: int
) -> Tensor:
    """Return normal numbers, a pure function of (key, task, step, time, episode, entry).

    Args:
        key: Of the stream, from `key_from_name`.
        tasks: Their numbers, (tasks,).
        step: Inner steps done before.
        horizon: Time steps.
        episodes: Of each task.
        action_size: Numbers of an action.

    Returns:
        (horizon, tasks, episodes, action_size), in float64.
    """
    time, episode, entry = (
        torch.arange(n, device=tasks.device) for n in (horizon, episodes, action_size)
    )
    return random_normal(
        key,
        tasks[:, None, None],
        torch.tensor(step, device=tasks.device),
        time[:, None, None, None],
        episode[:, None],
        entry,
    )
