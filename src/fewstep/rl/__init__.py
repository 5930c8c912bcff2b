"""Reinforcement learning: policies that adapt to a task by gradients of their own episodes."""

from fewstep.rl.distributions import Categorical, Distribution, Gaussian
from fewstep.rl.environments import Environments, TaskEnvironments
from fewstep.rl.learner import PolicyLearner
from fewstep.rl.navigation import NavigationTasks
from fewstep.rl.policy import CategoricalPolicy, GaussianPolicy
from fewstep.rl.returns import Returns
from fewstep.rl.trust_region import TrustRegion

__all__ = [
    "Categorical",
    "CategoricalPolicy",
    "Distribution",
    "Environments",
    "Gaussian",
    "GaussianPolicy",
    "NavigationTasks",
    "PolicyLearner",
    "Returns",
    "TaskEnvironments",
    "TrustRegion",
]
