"""Distributions of actions against torch.distributions."""

import pytest
import torch
from torch.distributions import Categorical as OneOf
from torch.distributions import Independent, Normal, kl_divergence

from fewstep import InputError
from fewstep.rl import Categorical, Gaussian

pytestmark = pytest.mark.usefixtures("float64")


def normal(outputs):
    mean, log_std = outputs.chunk(2, -1)
    return Independent(Normal(mean, log_std.exp()), 1)


def one_of(logits):
    return OneOf(logits=logits)


def test_of_gaussians_all_is_as_of_normal_distributions():
    says, old, new = Gaussian(), torch.randn(5, 4, 6), torch.randn(5, 4, 6)
    noise = torch.randn(5, 4, 3)
    actions = says.act(old, noise)
    torch.testing.assert_close(actions, normal(old).mean + normal(old).stddev * noise)
    torch.testing.assert_close(says.log_probability(new, actions), normal(new).log_prob(actions))
    expected = kl_divergence(normal(old), normal(new))
    torch.testing.assert_close(says.kl_divergence(old, new), expected)


def test_of_one_of_several_all_is_as_of_categorical_distributions():
    says, old, new = Categorical(), torch.randn(5, 4, 3), torch.randn(5, 4, 3)
    actions = says.act(old, torch.randn(5, 4, 3))
    assert torch.equal(actions.sum(-1), torch.ones(5, 4))
    expected = one_of(new).log_prob(actions.argmax(-1))
    torch.testing.assert_close(says.log_probability(new, actions), expected)
    torch.testing.assert_close(
        says.kl_divergence(old, new), kl_divergence(one_of(old), one_of(new))
    )


def test_one_of_several_is_taken_as_often_as_it_should():
    torch.manual_seed(0)
    logits = torch.tensor([0.3, -1.2, 1.0, 0.0])
    actions = Categorical().act(logits.expand(200_000, 4), torch.randn(200_000, 4))
    torch.testing.assert_close(actions.mean(0), logits.softmax(0), atol=4e-3, rtol=0)


def test_the_largest_noise_draws_an_action_in_float32():
    noise = torch.tensor([[5.8, -5.8, 5.8], [-5.8, 5.8, -5.8]], dtype=torch.float32)
    actions = Categorical().act(torch.tensor([[0.0, 0.0, 0.1]], dtype=torch.float32), noise)
    assert actions.tolist() == [[0, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("says", [Gaussian(), Categorical()])
def test_a_policy_is_no_way_from_itself_and_turns_there(says):
    old = torch.randn(7, 4)
    new = old.clone().requires_grad_()
    divergence = says.kl_divergence(old, new).sum()
    (slope,) = torch.autograd.grad(divergence, new)
    assert divergence.item() == pytest.approx(0, abs=1e-14)
    assert slope.abs().max() < 1e-12


def test_a_deviation_has_a_floor():
    mean, log_std = Gaussian().mean_and_log_std(torch.tensor([1.0, -100.0]))
    assert mean.item() == 1
    assert log_std.exp().item() == pytest.approx(1e-6)


def test_one_action_is_no_choice():
    with pytest.raises(InputError, match=r"Categorical\(\) has 1 action to choose from"):
        Categorical().output_size(1)
