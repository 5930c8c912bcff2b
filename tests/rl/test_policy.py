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
def test_layers_begin_as_those_of_the_authors(policy):
    """Weights are uniform up to sqrt(6 / (inputs + outputs)), biases 0."""
    layers = [m for m in policy(20, 6).modules() if isinstance(m, torch.nn.Linear)]
    for layer, sizes in zip(layers, [(20, 100), (100, 100), (100, 6)], strict=True):
        bound = (6 / sum(sizes)) ** 0.5
        assert bound >= layer.weight.abs().max() > 0.97 * bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.07)
        assert not layer.bias.any()


@pytest.mark.parametrize("policy", [GaussianPolicy, CategoricalPolicy])
def test_layers_without_units_are_refused(policy):
    with pytest.raises(InputError, match=r"\[2, 0, 2\]"):
        policy(2, 2, hidden=(0,))


@pytest.mark.parametrize(
    ("policy", "network"), [(GaussianPolicy, "mean"), (CategoricalPolicy, "logits")]
)
def test_a_context_is_beside_every_observation(policy, network):
    with_it = policy(3, 2, hidden=(5,), context=4)
    x = torch.randn(6, 3)
    assert not with_it.context.vector.any()
    with torch.no_grad():
        with_it.context.vector.copy_(torch.arange(4.0))
    beside = torch.tensor([0.0, 1, 2, 3]).expand(6, 4)
    expected = getattr(with_it, network)(torch.cat([x, beside], 1))
    torch.testing.assert_close(with_it(x)[:, :2], expected)
    assert with_it(torch.randn(7, 6, 3)).shape[:2] == (7, 6)
    assert "context.vector" not in policy(3, 2).state_dict()
    with pytest.raises(InputError, match="size=-1"):
        policy(3, 2, context=-1)
