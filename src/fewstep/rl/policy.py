"""Gaussian policies: modules that say with which probability to act how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fewstep.core.errors import InputError

_LEAST_LOG_STD = math.log(1e-6)


class GaussianPolicy(nn.Module):
    """Actions around a mean that a network gives, with a deviation that is learned.

    action ~ N(mean(observation), diag(exp(log_std))^2)

    The inner loop adapts both. Any other module with outputs of this kind will do.

    Args:
        observation_size: Numbers of an observation.
        action_size: Numbers of an action.
        hidden: Units of the hidden layers, with ReLU.

    Raises:
        InputError: a size is below 1.

    Shapes: (examples, observation_size) to (examples, 2 action_size), the means and then the
        logarithms of the deviations, which are 1 at first.

    Deviation: PyTorch's initialisation of the weights.

    Reference: Finn, Abbeel and Levine, ICML 2017, arXiv:1703.03400, section 5.3.
    """

    def __init__(
        self, observation_size: int, action_size: int, hidden: Sequence[int] = (100, 100)
    ) -> None:
        super().__init__()
        sizes = [observation_size, *hidden, action_size]
        if min(sizes) < 1:
            raise InputError(f"layers of {sizes} units must have at least 1 each")
        layers: list[nn.Module] = []
        for size, next_size in pairwise(sizes):
            layers += [nn.Linear(size, next_size), nn.ReLU()]
        self.mean = nn.Sequential(*layers[:-1])
        self.log_std = nn.Parameter(torch.zeros(action_size))

    def forward(self, observations: Tensor) -> Tensor:
        """Return means and logarithms of deviations side by side."""
        mean = self.mean(observations)
        return torch.cat([mean, self.log_std.expand_as(mean)], -1)


def mean_and_log_std(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Take a policy's outputs, (..., 2 action_size), apart."""
    mean, log_std = outputs.chunk(2, -1)
    return mean, log_std.clamp_min(_LEAST_LOG_STD)


def log_probability(outputs: Tensor, actions: Tensor) -> Tensor:
    """Return log pi(action), a density.

    Args:
        outputs: (..., 2 action_size).
        actions: (..., action_size).

    Returns:
        (...).
    """
    mean, log_std = mean_and_log_std(outputs)
    z = (actions - mean) * torch.exp(-log_std)
    return -(0.5 * z.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def kl_divergence(old: Tensor, new: Tensor) -> Tensor:
    """Return KL(old || new) of two policies' outputs, each (..., 2 action_size); (...)."""
    (mean, log_std), (new_mean, new_log_std) = mean_and_log_std(old), mean_and_log_std(new)
    ratio = torch.exp(2 * (log_std - new_log_std))
    z = (mean - new_mean) * torch.exp(-new_log_std)
    return (new_log_std - log_std + 0.5 * (ratio + z.square() - 1)).sum(-1)
