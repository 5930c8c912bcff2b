"""Which policies there are to train: problems, methods, settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from fewstep.core.adapted import AdaptedParameters
from fewstep.core.errors import InputError, check_at_least
from fewstep.core.rates import ConstantRate
from fewstep.rl.environments import TaskEnvironments
from fewstep.rl.learner import PolicyLearner
from fewstep.rl.navigation import NavigationTasks
from fewstep.rl.policy import GaussianPolicy
from fewstep.rl.trust_region import TrustRegion


@dataclass(frozen=True)
class Method:
    """How a policy is trained.

    Args:
        num_steps: Inner steps in training; 0 trains one policy for all tasks.
        derivative_order: Of the meta-gradient.
        shows_goal: The policy sees where it should go.
        is_trained: Else it stays as it was drawn.
        support_loss: Whose second derivatives the meta-gradient takes.
        context: Numbers of a vector beside the observation, which then is all that steps adapt; the
            paper does not say how many it has.
    """

    num_steps: int = 1
    derivative_order: Literal[1, 2] = 2
    shows_goal: bool = False
    is_trained: bool = True
    support_loss: Literal["log probability", "ratio"] = "log probability"
    context: int = 0


METHODS = {
    "MAML": Method(),
    "MAML with ratios": Method(support_loss="ratio"),
    "first-order MAML": Method(derivative_order=1),
    "context": Method(context=5),
    "pretrained": Method(num_steps=0),
    "random": Method(num_steps=0, is_trained=False),
    "oracle": Method(num_steps=0, shows_goal=True),
}


def _running(
    split: str, body: str, goal: Literal["direction", "velocity"], **kwargs: Any
) -> TaskEnvironments:
    try:
        from fewstep.rl.bodies import BODIES
        from fewstep.rl.locomotion import RunningTasks
    except ModuleNotFoundError as error:
        raise InputError(
            f"half-cheetahs and ants need {error.name}, which is not installed: "
            'pip install -e ".[locomotion]"'
        ) from error
    return RunningTasks(BODIES[body], split, goal, **kwargs)


PROBLEMS: dict[str, Callable[..., TaskEnvironments]] = {
    "navigation": NavigationTasks,
    "half-cheetah direction": partial(_running, body="half-cheetah", goal="direction"),
    "half-cheetah velocity": partial(_running, body="half-cheetah", goal="velocity"),
    "ant direction": partial(_running, body="ant", goal="direction"),
    "ant velocity": partial(_running, body="ant", goal="velocity"),
}


@dataclass(frozen=True)
class Setting:
    """What is learned, and how it is tested."""

    iterations: int = 100
    """Outer updates of a run."""
    tasks: int = 20
    """Tasks of an iteration."""
    episodes: int = 20
    """Episodes of a task, before the step and after it."""
    inner_lr: float = 0.1
    """Inner rate in training and validation; the test has rates of its own, below."""
    max_divergence: float = 0.01
    """How far adapted policies may move in an iteration, in nats."""
    hidden: tuple[int, ...] = (100, 100)
    """Units of the policy's hidden layers."""
    horizon: int = 100
    """Time steps of an episode, at most."""
    val_every: int = 10
    """Iterations between validations, which choose the policy that is tested."""
    val_tasks: int = 40
    """Tasks of a validation."""
    test_tasks: int = 600
    """Tasks of the test."""
    test_episodes: int = 40
    """Episodes of a test task after each number of steps."""
    test_lrs: tuple[float, ...] = (0.1, 0.05)
    """Inner rates of the test's steps, the last repeated."""
    test_steps: int = 3
    """Inner steps of the test."""

    def __post_init__(self) -> None:
        check_at_least(0, iterations=self.iterations, test_steps=self.test_steps)
        check_at_least(
            1, tasks=self.tasks, val_every=self.val_every, test_episodes=self.test_episodes
        )
        check_at_least(2, val_tasks=self.val_tasks, test_tasks=self.test_tasks)
        if not (self.test_lrs and all(0 <= rate < math.inf for rate in self.test_lrs)):
            raise InputError(
                f"test_lrs={self.test_lrs} must be finite rates, one or more, none negative"
            )


@dataclass(frozen=True)
class PolicyRun:
    """A run: a problem, a method, and the seed of its policy and training tasks."""

    problem: str = "navigation"
    method: str = "MAML"
    seed: int = 0
    setting: Setting = field(default_factory=Setting)
    device: str = "cpu"

    def learner(self) -> PolicyLearner:
        """Return what is trained, as it is at the start."""
        method, setting = METHODS[self.method], self.setting
        torch.manual_seed(self.seed)
        sizes = self.tasks("train")
        policy = GaussianPolicy(
            sizes.observation_size, sizes.action_size, setting.hidden, method.context
        )
        return PolicyLearner(
            policy.to(self.device),
            method.num_steps,
            ConstantRate(setting.inner_lr),
            derivative_order=method.derivative_order,
            adapted=AdaptedParameters(("context.*",)) if method.context else None,
            outer=TrustRegion(setting.max_divergence),
            support_loss=method.support_loss,
            episodes=setting.episodes,
        )

    def tasks(self, split: str) -> TaskEnvironments:
        """Return the tasks of a split; validation and test are the same for all seeds."""
        return PROBLEMS[self.problem](
            split,
            seed=self.seed if split == "train" else 0,
            horizon=self.setting.horizon,
            shows_goal=METHODS[self.method].shows_goal,
            device=self.device,
        )
