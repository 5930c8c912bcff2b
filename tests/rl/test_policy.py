"""Gaussian policies against torch.distributions."""

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from fewstep import InputError
from fewstep.rl import GaussianPolicy
from fewstep.rl.policy import kl_divergence as ours
from fewstep.rl.policy import log_probability, mean_and_log_std

pytestmark = pytest.mark.usefixtures("float64")


def distribution(outputs):
    mean, log_std = outputs.chunk(2, -1)
    return Independent(Normal(mean, log_std.exp()), 1)


def test_probability_and_divergence_are_those_of_normal_distributions():
    old, new, actions = torch.randn(5, 4, 6), torch.randn(5, 4, 6), torch.randn(5, 4, 3)
    torch.testing.assert_close(log_probability(old, actions), distribution(old).log_prob(actions))
    torch.testing.assert_close(ours(old, new), kl_divergence(distribution(old), distribution(new)))


def test_a_policy_is_no_way_from_itself_and_turns_there():
    old = torch.randn(7, 4)
    new = old.clone().requires_grad_()
    divergence = ours(old, new).sum()
    (slope,) = torch.autograd.grad(divergence, new)
    assert divergence.item() == 0
    assert slope.abs().max() < 1e-12


def test_outputs_are_means_and_one_deviation_for_all_observations():
    policy = GaussianPolicy(3, 2, hidden=(5,))
    with torch.no_grad():
        policy.log_std.copy_(torch.tensor([-1.0, 0.5]))
    x = torch.randn(6, 3)
    mean, log_std = mean_and_log_std(policy(x))
    torch.testing.assert_close(mean, policy.mean(x))
    assert log_std.tolist() == [[-1.0, 0.5]] * 6


def test_a_deviation_has_a_floor():
    mean, log_std = mean_and_log_std(torch.tensor([1.0, -100.0]))
    assert mean.item() == 1
    assert log_std.exp().item() == pytest.approx(1e-6)


def test_layers_without_units_are_refused():
    with pytest.raises(InputError, match=r"\[2, 0, 2\]"):
        GaussianPolicy(2, 2, hidden=(0,))
