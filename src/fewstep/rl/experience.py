"""What episodes teach: actions, and how good they were."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fewstep.core.tasks import TaskBatch
from fewstep.rl.advantages import advantages
from fewstep.rl.distributions import Distribution
from fewstep.rl.rollouts import Rollouts


@dataclass(frozen=True)
class Experience:
    """Rollouts as examples to learn from, those of a task in one row.

    Args:
        observations: (tasks, examples, observation_size).
        actions: (tasks, examples, action_size).
        outputs: Of the policy that acted, (tasks, examples, output_size).
        advantages: (tasks, examples).
        weights: Of mean 1, and 0 for what came after the end of an episode, (tasks, examples).
    """

    observations: Tensor
    actions: Tensor
    outputs: Tensor
    advantages: Tensor
    weights: Tensor

    @classmethod
    def of(cls, rollouts: Rollouts, *, discount: float, trace: float) -> Experience:
        """Return what rollouts teach."""
        a = advantages(rollouts, discount=discount, trace=trace)
        running = rollouts.running.flatten(1)
        return cls(
            rollouts.observations.flatten(1, 2),
            rollouts.actions.flatten(1, 2),
            rollouts.outputs.flatten(1, 2),
            a.flatten(1),
            running / running.mean(1, keepdim=True),
        )

    def some(self, tasks: slice) -> Experience:
        """Return what some of the tasks teach."""
        return Experience(
            **{field.name: getattr(self, field.name)[tasks] for field in fields(self)}
        )

    def support(self) -> TaskBatch:
        """Return tasks whose support loss is that of the policy gradient."""
        x = self.observations
        y = torch.cat([self.actions, (self.weights * self.advantages)[..., None]], -1)
        return TaskBatch(x, y, x, y)


def policy_gradient_loss(distribution: Distribution, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return -mean(log pi(action) A), whose gradient is that of the expected return, negative.

    Args:
        distribution: What the outputs say.
        outputs: Of the policy, (examples, output_size).
        targets: Actions and, last, their weighted advantages A, (examples, action_size + 1).
    """
    log_probability = distribution.log_probability(outputs, targets[..., :-1])
    return -(log_probability * targets[..., -1]).mean()


def ratio_loss(distribution: Distribution, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return -mean(pi(action) / pi_acting(action) A), where pi is the policy that acted.

    Its gradient is that of `policy_gradient_loss`, its second derivative has -mean(grad log pi
    grad log pi^T A) besides: how often an action is taken changes, too.

    Args:
        distribution: As in `policy_gradient_loss`, as are the others.
        outputs: Of the policy.
        targets: Actions and advantages.

    Reference: Rothfuss et al., ProMP: Proximal meta-policy search, ICLR 2019, arXiv:1810.06784, its
        low variance curvature estimator.
    """
    log_probability = distribution.log_probability(outputs, targets[..., :-1])
    ratio = torch.exp(log_probability - log_probability.detach())
    return -(ratio * targets[..., -1]).mean()


SUPPORT_LOSSES = {"log probability": policy_gradient_loss, "ratio": ratio_loss}
