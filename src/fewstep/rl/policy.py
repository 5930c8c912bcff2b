"""Policies: modules that say with which probability to act how."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fewstep.core.errors import InputError
from fewstep.models.context import Context
from fewstep.rl.distributions import Categorical, Gaussian


class GaussianPolicy(nn.Module):
    """Actions around a mean that a network gives, with a deviation that is learned.

    action ~ N(mean(observation), diag(exp(log_std))^2)

    The inner loop adapts both. Any other module with outputs of this kind will do.

    Args:
        observation_size: Numbers of an observation.
        action_size: Numbers of an action.
        hidden: Units of the hidden layers, with ReLU.
        context: Numbers of a learned vector beside each observation ("context.vector"), for an
            inner loop that adapts that alone; 0 for none.

    Raises:
        InputError: a size is below 1, or `context` below 0.

    Shapes: (examples, observation_size) to (examples, 2 action_size), the means and then the
        logarithms of the deviations, which are 1 at first.

    Reference: Finn, Abbeel and Levine, ICML 2017, arXiv:1703.03400, section 5.3, and its code for
        the initialisation, Glorot and Bengio's with biases of 0.
    """

    distribution = Gaussian()

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden: Sequence[int] = (100, 100),
        context: int = 0,
    ) -> None:
        super().__init__()
        self.context = _beside(context)
        self.mean = _network([observation_size + context, *hidden, action_size])
        self.log_std = nn.Parameter(torch.zeros(action_size))

    def forward(self, observations: Tensor) -> Tensor:
        """Return means and logarithms of deviations side by side."""
        mean = self.mean(self.context(observations))
        return torch.cat([mean, self.log_std.expand_as(mean)], -1)


class CategoricalPolicy(nn.Module):
    """One of several actions, by the logits that a network gives.

    action ~ softmax(logits(observation))

    Args:
        observation_size: Numbers of an observation.
        actions: How many there are.
        hidden: Units of the hidden layers, with ReLU.
        context: As in `GaussianPolicy`.

    Raises:
        InputError: a size is below 1, or `context` below 0.

    Shapes: (examples, observation_size) to (examples, actions).
    """

    distribution = Categorical()

    def __init__(
        self,
        observation_size: int,
        actions: int,
        hidden: Sequence[int] = (100, 100),
        context: int = 0,
    ) -> None:
        super().__init__()
        self.context = _beside(context)
        self.logits = _network([observation_size + context, *hidden, actions])

    def forward(self, observations: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.logits(self.context(observations))
        return logits


def _beside(context: int) -> nn.Module:
    """Return what puts a learned vector of so many numbers beside each observation."""
    return Context(context) if context else nn.Identity()


def _network(sizes: Sequence[int]) -> nn.Sequential:
    if min(sizes) < 1:
        raise InputError(f"layers of {sizes} units must have at least 1 each")
    layers: list[nn.Module] = []
    for size, next_size in pairwise(sizes):
        linear = nn.Linear(size, next_size)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
