"""Episodes that a policy went through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.errors import InputError
from fewstep.rl.distributions import Distribution
from fewstep.rl.environments import Environments, Outcome


@dataclass(frozen=True)
class Rollouts:
    """What happened in the episodes of several tasks; after the end of an episode all is zero.

    Args:
        observations: (tasks, episodes, time, observation_size).
        actions: (tasks, episodes, time, action_size).
        outputs: What the policy gave, (tasks, episodes, time, output_size).
        rewards: (tasks, episodes, time).
        running: 1 until an episode has ended, then 0, (tasks, episodes, time).
    """

    observations: Tensor
    actions: Tensor
    outputs: Tensor
    rewards: Tensor
    running: Tensor

    @property
    def returns(self) -> Tensor:
        """Sum of the rewards of an episode, mean over the episodes of a task, (tasks,)."""
        return self.rewards.sum(-1).mean(-1)


def roll_out(
    policy: Callable[[Tensor], Tensor],
    distribution: Distribution,
    environments: Environments,
    noise: Tensor,
) -> Rollouts:
    """Run all episodes to their ends, side by side.

    Args:
        policy: Maps observations, (tasks, episodes, observation_size), to outputs of each task's
            policy, (tasks, episodes, output_size).
        distribution: What the outputs say.
        environments: Where to act.
        noise: Normal numbers, (time, tasks, episodes, action_size).

    Raises:
        InputError: the outputs are not as many as the actions need, or rewards or ends of episodes
            are not one of each.
    """
    expected = distribution.output_size(noise.shape[-1])
    observations = environments.reset()
    running = observations.new_ones(observations.shape[:2])
    steps = []
    for of_time in noise:
        outputs = policy(observations)
        if outputs.shape[-1] != expected:
            raise InputError(
                f"the policy has {outputs.shape[-1]} outputs, but {distribution} of actions of "
                f"size {noise.shape[-1]} takes {expected}; give a policy of that size, or another "
                "distribution"
            )
        actions = distribution.act(outputs, of_time)
        found = environments.step(actions)
        _check(found, running.shape)
        is_on = running > 0
        seen = [torch.where(is_on[..., None], x, 0) for x in (observations, actions, outputs)]
        steps.append((*seen, torch.where(is_on, found.rewards, 0), running))
        observations = found.observations
        running = running * ~found.ended
    return Rollouts(*(torch.stack(parts, 2) for parts in zip(*steps, strict=True)))


def _check(found: Outcome, shape: torch.Size) -> None:
    for name in ("rewards", "ended"):
        value: Tensor = getattr(found, name)
        if value.shape != shape or (value.dtype == torch.bool) != (name == "ended"):
            raise InputError(
                f"the environments' step gave {name} of {value.dtype}, {tuple(value.shape)}; give "
                f"{'bool' if name == 'ended' else 'numbers'}, {tuple(shape)}, (tasks, episodes)"
            )
