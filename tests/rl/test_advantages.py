"""Advantages against loops over single episodes, with numpy's least squares."""

import numpy as np
import pytest
import torch

from fewstep.core.errors import InputError
from fewstep.rl.advantages import advantages, discounted_sums, linear_baseline
from fewstep.rl.rollouts import Rollouts

pytestmark = pytest.mark.usefixtures("float64")

TASKS, EPISODES, TIME = 2, 3, 7


@pytest.fixture
def rollouts():
    lengths = torch.tensor([[7, 4, 1], [2, 7, 7]])
    running = (torch.arange(TIME) < lengths[..., None]).double()
    on = running[..., None]
    return Rollouts(
        observations=20 * torch.randn(TASKS, EPISODES, TIME, 2) * on,  # some beyond the clamp
        actions=torch.randn(TASKS, EPISODES, TIME, 1) * on,
        outputs=torch.randn(TASKS, EPISODES, TIME, 2) * on,
        rewards=torch.randn(TASKS, EPISODES, TIME) * running,
        running=running,
    )


def episodes_of(rollouts, task):
    for episode in range(EPISODES):
        length = int(rollouts.running[task, episode].sum())
        yield (
            rollouts.observations[task, episode, :length].numpy(),
            rollouts.rewards[task, episode, :length].numpy(),
        )


def to_come(rewards, discount):
    return np.array(
        [sum(discount**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]
    )


def features(observations):
    o = np.clip(observations, -10, 10)
    t = np.arange(len(o))[:, None] / 100
    return np.concatenate([o, o**2, t, t**2, t**3, np.ones_like(t)], 1)


def by_hand(rollouts, task, discount, trace):
    """Return values and advantages of a task's episodes, one after the other."""
    episodes = list(episodes_of(rollouts, task))
    x = np.concatenate([features(o) for o, _ in episodes])
    y = np.concatenate([to_come(r, discount) for _, r in episodes])
    w = np.linalg.solve(x.T @ x + 1e-5 * np.eye(x.shape[1]), x.T @ y)
    values, found = [], []
    for o, r in episodes:
        v = features(o) @ w
        delta = r + discount * np.append(v[1:], 0) - v
        values.append(v)
        found.append(to_come(delta, discount * trace))
    every = np.concatenate(found)
    return values, [(a - every.mean()) / (every.std() + 1e-8) for a in found]


def test_sums_are_discounted_from_each_time_on():
    found = discounted_sums(torch.tensor([[1.0, 2.0, 4.0]]), 0.5)
    assert found.tolist() == [[3.0, 4.0, 4.0]]


@pytest.mark.parametrize("trace", [1.0, 0.9, 0.0])
def test_values_and_advantages_are_those_of_single_episodes(rollouts, trace):
    discount = 0.95
    returns = discounted_sums(rollouts.rewards, discount)
    v = linear_baseline(rollouts, returns)
    a = advantages(rollouts, discount=discount, trace=trace)
    for task in range(TASKS):
        values, found = by_hand(rollouts, task, discount, trace)
        for episode, (of_v, of_a) in enumerate(zip(values, found, strict=True)):
            length = len(of_v)
            np.testing.assert_allclose(v[task, episode, :length], of_v, atol=1e-7)
            np.testing.assert_allclose(a[task, episode, :length], of_a, atol=1e-7)
            assert not v[task, episode, length:].any()
            assert not a[task, episode, length:].any()


def test_tasks_do_not_see_each_other(rollouts):
    alone = Rollouts(*(t[1:] for t in vars(rollouts).values()))
    both = advantages(rollouts, discount=0.9, trace=1.0)
    torch.testing.assert_close(advantages(alone, discount=0.9, trace=1.0), both[1:])


def test_the_return_is_the_mean_over_the_episodes(rollouts):
    expected = [np.mean([r.sum() for _, r in episodes_of(rollouts, t)]) for t in range(TASKS)]
    assert rollouts.returns.tolist() == pytest.approx(expected)


def test_a_baseline_that_would_fit_anything_is_refused():
    """Of 2 observed numbers it has 8: from 9 times on something is left."""
    whole = Rollouts(
        observations=torch.randn(1, 1, 9, 2),
        actions=torch.randn(1, 1, 9, 1),
        outputs=torch.randn(1, 1, 9, 2),
        rewards=torch.randn(1, 1, 9),
        running=torch.ones(1, 1, 9),
    )
    assert advantages(whole, discount=0.9, trace=1.0).isfinite().all()
    short = Rollouts(**{name: each[:, :, :8] for name, each in vars(whole).items()})
    with pytest.raises(InputError, match=r"1 episodes of 8 time steps are too few .* whose 8 num"):
        advantages(short, discount=0.9, trace=1.0)
