"""What a policy's outputs say of its actions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot

from fewstep.core.errors import InputError

_LEAST_LOG_STD = math.log(1e-6)


class Distribution(Protocol):
    """Which actions outputs stand for, and how likely they are."""

    def output_size(self, action_size: int) -> int:
        """Return the numbers of an output for actions of so many numbers."""
        ...

    def act(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Draw actions.

        Args:
            outputs: (..., output_size).
            noise: Normal numbers, (..., action_size).

        Returns:
            (..., action_size).
        """
        ...

    def log_probability(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """Return log pi(action), (...), of actions, (..., action_size)."""
        ...

    def kl_divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """Return KL(old || new), (...), of two policies' outputs."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """Actions of real numbers, around a mean.

    action ~ N(mean, diag(std^2)); outputs are the means and then log std, of at least log 1e-6.
    """

    def output_size(self, action_size: int) -> int:
        """Return twice the size of an action."""
        return 2 * action_size

    def act(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Return mean + std * noise."""
        mean, log_std = self.mean_and_log_std(outputs)
        return mean + torch.exp(log_std) * noise

    def log_probability(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """Return the logarithm of a density, (...)."""
        mean, log_std = self.mean_and_log_std(outputs)
        z = (actions - mean) * torch.exp(-log_std)
        return -(0.5 * z.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def kl_divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """Return KL(old || new), (...)."""
        (mean, log_std), (new_mean, new_log_std) = map(self.mean_and_log_std, (old, new))
        ratio = torch.exp(2 * (log_std - new_log_std))
        z = (mean - new_mean) * torch.exp(-new_log_std)
        return (new_log_std - log_std + 0.5 * (ratio + z.square() - 1)).sum(-1)

    def mean_and_log_std(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Take outputs apart."""
        mean, log_std = outputs.chunk(2, -1)
        return mean, log_std.clamp_min(_LEAST_LOG_STD)


@dataclass(frozen=True)
class Categorical:
    """One of several actions, as a vector that is 1 at the one taken and 0 elsewhere.

    action ~ softmax(outputs), drawn as argmax(outputs + g), g of Gumbel's distribution.
    """

    def output_size(self, action_size: int) -> int:
        """Return how many actions there are.

        Raises:
            InputError: there is one, and nothing to choose.
        """
        if action_size < 2:
            raise InputError(
                f"Categorical() has {action_size} action to choose from; actions of numbers take "
                "Gaussian()"
            )
        return action_size

    def act(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Return argmax(outputs - log(-log Phi(noise))), Phi the normal distribution."""
        gumbel = -torch.log(-torch.special.log_ndtr(noise))
        taken = one_hot((outputs + gumbel).argmax(-1), outputs.shape[-1])
        return taken.to(outputs.dtype)

    def log_probability(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """Return the logarithm of a probability, (...)."""
        return (log_softmax(outputs, -1) * actions).sum(-1)

    def kl_divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """Return KL(old || new), (...)."""
        old, new = log_softmax(old, -1), log_softmax(new, -1)
        return (old.exp() * (old - new)).sum(-1)
