"""How much better an action was than what could be expected."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.errors import InputError
from fewstep.rl.rollouts import Rollouts


def discounted_sums(values: Tensor, discount: float) -> Tensor:
    """Return sum_l discount^l values[t + l] for every time t, the last dimension."""
    sums = torch.zeros_like(values)
    total = torch.zeros_like(values[..., 0])
    for t in reversed(range(values.shape[-1])):
        total = values[..., t] + discount * total
        sums[..., t] = total
    return sums


def linear_baseline(rollouts: Rollouts, returns: Tensor) -> Tensor:
    """Fit the returns of each task by a linear function of observation and time.

    V(o, t) = w . (o, o^2, t/100, (t/100)^2, (t/100)^3, 1), |o| <= 10, by least squares with a ridge
    of 1e-5.

    Args:
        rollouts: The episodes.
        returns: What is to come from each time on, (tasks, episodes, time).

    Returns:
        V of every time, 0 after the end of an episode, (tasks, episodes, time).

    Raises:
        InputError: the episodes of a task have no more times than w has numbers, so that V would be
            what they gave, and what is left of it rounding errors.

    Reference: Duan et al., Benchmarking deep reinforcement learning, ICML 2016.
    """
    o = rollouts.observations.double().clamp(-10, 10)
    time = torch.arange(o.shape[2], dtype=o.dtype, device=o.device)[:, None] / 100
    times = torch.cat([time, time**2, time**3, torch.ones_like(time)], -1)
    features = torch.cat([o, o.square(), times.expand(*o.shape[:3], 4)], -1)
    features = features * rollouts.running[..., None]
    x, y = features.flatten(1, 2), returns.double().flatten(1, 2)[..., None]
    if x.shape[1] <= x.shape[2]:
        raise InputError(
            f"{o.shape[1]} episodes of {o.shape[2]} time steps are too few for the baseline, whose "
            f"{x.shape[2]} numbers would fit them whatever was done; take more, or longer ones"
        )
    ridge = 1e-5 * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    w: Tensor = torch.linalg.solve(x.mT @ x + ridge, x.mT @ y)
    return (x @ w).view_as(returns).to(returns.dtype)


def advantages(rollouts: Rollouts, *, discount: float, trace: float) -> Tensor:
    """Return generalised advantages above the linear baseline, of mean 0 and variance 1 per task.

    A[t] = sum_l (discount * trace)^l delta[t+l];  delta[t] = r[t] + discount V[t+1] - V[t]

    Args:
        rollouts: The episodes.
        discount: gamma.
        trace: lambda; with 1, A[t] is the discounted return less V[t].

    Returns:
        (tasks, episodes, time); 0 after the end of an episode.

    Reference: Schulman et al., High-dimensional continuous control using generalized advantage
        estimation, ICLR 2016, arXiv:1506.02438.
    """
    r, running = rollouts.rewards, rollouts.running
    v = linear_baseline(rollouts, discounted_sums(r, discount))
    v_next = torch.cat([v[..., 1:], torch.zeros_like(v[..., :1])], -1)
    a = discounted_sums(r + discount * v_next - v, discount * trace)
    count = running.sum((1, 2), keepdim=True)
    mean = (a * running).sum((1, 2), keepdim=True) / count
    variance = ((a - mean).square() * running).sum((1, 2), keepdim=True) / count
    return (a - mean) / (variance.sqrt() + 1e-8) * running
