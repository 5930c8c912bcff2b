"""2D navigation, the first reinforcement learning problem of the MAML paper."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.data.counter_random import key_from_name, random_uniform
from fewstep.rl.environments import DrawnNoise, Outcome


class Navigation:
    """Points that walk from the origin to goals that they cannot see.

    position <- position + 0.1 clip(action, -1, 1);  reward = -|position - goal|

    An episode ends where both coordinates are within 0.01 of the goal.

    Args:
        goals: (tasks, 2).
        episodes: Points of each task.
        shows_goal: Observe the goal, too.

    Shapes: observations are positions, (tasks, episodes, 2), with the goal behind them if shown;
        actions are (tasks, episodes, 2).
    """

    def __init__(self, goals: Tensor, episodes: int, *, shows_goal: bool = False) -> None:
        self.goals = goals[:, None].expand(-1, episodes, 2)
        self.shows_goal = shows_goal
        self.positions = torch.zeros_like(self.goals)

    def reset(self) -> Tensor:
        """Put all points at the origin."""
        self.positions = torch.zeros_like(self.goals)
        return self._observe()

    def close(self) -> None:
        """Do nothing: there is nothing to free."""

    def step(self, actions: Tensor) -> Outcome:
        """Move the points."""
        self.positions = self.positions + 0.1 * actions.clamp(-1, 1)
        away = self.positions - self.goals
        return Outcome(self._observe(), -away.norm(dim=-1), (away.abs() < 0.01).all(-1))

    def _observe(self) -> Tensor:
        return torch.cat([self.positions, self.goals], -1) if self.shows_goal else self.positions


class NavigationTasks(DrawnNoise):
    """Tasks of 2D navigation; task i is a pure function of (seed, split, i), its noise too.

    goal ~ U[-0.5, 0.5]^2

    Args:
        split: Name of the split, which separates its tasks from other splits'.
        seed: Any integer.
        horizon: Time steps of an episode, at most.
        shows_goal: Observe the goal, too, as the paper's oracle does.
        dtype: Of observations, rewards and noise.
        device: Where the episodes run.

    Raises:
        InputError: `horizon` is below 1.

    Deviation: the reward is the negative distance, as in the authors' code, which the paper's
        returns agree with (a point that stays where it is has -38); its text has the square.

    Reference: Finn, Abbeel and Levine, ICML 2017, arXiv:1703.03400, section 5.3.
    """

    def __init__(
        self,
        split: str,
        *,
        seed: int = 0,
        horizon: int = 100,
        shows_goal: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(key_from_name(seed, f"{split}/noise"), 2, horizon, dtype, device)
        self.shows_goal = shows_goal
        self.observation_size = 4 if shows_goal else 2
        self._key_goal = key_from_name(seed, f"{split}/goal")

    def goals(self, start: int, count: int) -> Tensor:
        """Return the goals of tasks start, ..., start + count - 1, (count, 2)."""
        task = torch.arange(start, start + count, device=self.device)
        u = random_uniform(self._key_goal, task[:, None], torch.arange(2, device=self.device))
        return (u - 0.5).to(self.dtype)

    def environments(self, start: int, count: int, episodes: int) -> Navigation:
        """Return tasks start, ..., start + count - 1, with so many episodes of each."""
        return Navigation(self.goals(start, count), episodes, shows_goal=self.shows_goal)
