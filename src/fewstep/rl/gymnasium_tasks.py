"""Tasks made of Gymnasium environments; needs `pip install -e ".[rl]"`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from fewstep.core.errors import InputError
from fewstep.data.counter_random import key_from_name, random_bits
from fewstep.rl.environments import DrawnNoise, Outcome

Environment = gymnasium.Env[Any, Any]
Numbers = np.ndarray[Any, Any]


class GymnasiumTasks(DrawnNoise):
    """Tasks of environments that a function makes; each episode has an environment of its own.

    Where a number of an action is bounded on both sides, [-1, 1] of a policy is the whole of its
    range; what is beyond a bound is cut off. Of a `Discrete` space, an action is the largest entry
    of a policy's, as `CategoricalPolicy` gives it. Noise and seeds of resets are pure functions of
    (seed, task, step, episode).

    Args:
        make: Returns an environment of task i, a new one at each call. Observations are of a
            `gymnasium.spaces.Box` of one dimension, actions of such a one, or `Discrete`.
        horizon: Time steps of an episode, at most.
        seed: Any integer.
        dtype: Of observations, rewards and noise.

    Raises:
        InputError: `horizon` is below 1, or a space is another.
    """

    def __init__(
        self,
        make: Callable[[int], Environment],
        *,
        horizon: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._make = make
        with make(0) as first:
            self.observation_size = _size("observations", first.observation_space)
            action_size = _action_size(first.action_space)
        super().__init__(key_from_name(seed, "gymnasium/noise"), action_size, horizon, dtype, "cpu")
        self._key_reset = key_from_name(seed, "gymnasium/reset")

    def environments(self, start: int, count: int, episodes: int) -> GymnasiumEnvironments:
        """Return tasks start, ..., start + count - 1, with so many episodes of each."""
        numbers = torch.arange(start, start + count)
        return GymnasiumEnvironments(
            [[self._make(task) for _ in range(episodes)] for task in numbers.tolist()],
            lambda resets: random_bits(
                self._key_reset, numbers[:, None], torch.tensor(resets), torch.arange(episodes)
            ),
            self.dtype,
        )


class GymnasiumEnvironments:
    """Environments that take their steps one after the other, until their episodes end.

    Args:
        environments: Those of each task's episodes.
        seeds: Gives the seeds of all resets, (tasks, episodes), by how many there were before.
        dtype: Of observations and rewards.

    Raises:
        InputError: two of them are one.
    """

    def __init__(
        self,
        environments: list[list[Environment]],
        seeds: Callable[[int], Tensor],
        dtype: torch.dtype,
    ) -> None:
        self._all = [environment for of_task in environments for environment in of_task]
        if len({id(environment.unwrapped) for environment in self._all}) < len(self._all):
            raise InputError(
                "make gave one environment for several episodes, which would step in turn; make a "
                "new one at each call"
            )
        self._shape = (len(environments), len(environments[0]))
        self._seeds, self._dtype, self._resets = seeds, dtype, 0
        self._action_of = [_action_of(environment.action_space) for environment in self._all]
        self._seen: list[Any] = []
        self._ended: list[bool] = []

    def reset(self) -> Tensor:
        """Begin all episodes."""
        seeds = (self._seeds(self._resets) >> 32).flatten().tolist()  # of 31 bits, as some need
        self._resets += 1
        pairs = zip(self._all, seeds, strict=True)
        self._seen = [environment.reset(seed=seed)[0] for environment, seed in pairs]
        self._ended = [False] * len(self._all)
        return self._observations()

    def step(self, actions: Tensor) -> Outcome:
        """Take actions where the episodes have not ended."""
        rewards = [0.0] * len(self._all)
        for i, action in enumerate(actions.flatten(0, 1).double().cpu().numpy()):
            if self._ended[i]:
                continue
            taken = self._action_of[i](action)
            self._seen[i], reward, terminated, truncated, _ = self._all[i].step(taken)
            rewards[i], self._ended[i] = float(reward), bool(terminated or truncated)
        return Outcome(
            self._observations(),
            torch.tensor(rewards, dtype=self._dtype).view(self._shape),
            torch.tensor(self._ended).view(self._shape),
        )

    def close(self) -> None:
        """Close each of them."""
        for environment in self._all:
            environment.close()

    def _observations(self) -> Tensor:
        return torch.as_tensor(np.stack(self._seen), dtype=self._dtype).view(*self._shape, -1)


def _size(what: str, space: gymnasium.Space[Any], others: str = "") -> int:
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise InputError(
            f"the {what} of the environment are {space}; give a Box of one dimension{others}"
        )
    return int(space.shape[0])


def _action_size(space: gymnasium.Space[Any]) -> int:
    return int(space.n) if isinstance(space, Discrete) else _size("actions", space, " or Discrete")


def _action_of(space: gymnasium.Space[Any]) -> Callable[[Numbers], Any]:
    """Return the map from what a policy gives to an action of a space."""
    if isinstance(space, Discrete):
        return lambda given: space.start + given.argmax()
    assert isinstance(space, Box)
    low, high = space.low.astype(float), space.high.astype(float)
    is_range = space.bounded_below & space.bounded_above
    start, end = (np.where(is_range, bound, 0) for bound in (low, high))

    def taken(given: Numbers) -> Numbers:
        numbers = np.where(is_range, start + (given + 1) / 2 * (end - start), given)
        return np.clip(numbers, low, high).astype(space.dtype)

    return taken
