"""What policies give, and what they refuse."""

import pytest
import torch

from fewstep import InputError
from fewstep.rl import CategoricalPolicy, Gaussian, GaussianPolicy

pytestmark = pytest.mark.usefixtures("float64")


def test_outputs_are_means_and_one_deviation_for_all_observations():
    policy = GaussianPolicy(3, 2, hidden=(5,))
    with torch.no_grad():
        policy.log_std.copy_(torch.tensor([-1.0, 0.5]))
    x = torch.randn(6, 3)
    mean, log_std = Gaussian().mean_and_log_std(policy(x))
    torch.testing.assert_close(mean, policy.mean(x))
    assert log_std.tolist() == [[-1.0, 0.5]] * 6


def test_outputs_are_logits_of_each_action():
    assert CategoricalPolicy(3, 4, hidden=(5,))(torch.randn(6, 3)).shape == (6, 4)


@pytest.mark.parametrize("policy", [GaussianPolicy, CategoricalPolicy])
def test_layers_without_units_are_refused(policy):
    with pytest.raises(InputError, match=r"\[2, 0, 2\]"):
        policy(2, 2, hidden=(0,))
