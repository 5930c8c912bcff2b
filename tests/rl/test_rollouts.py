"""What environments give is checked, and what comes after an end is nothing."""

import pytest
import torch

from fewstep import InputError
from fewstep.rl.distributions import Gaussian
from fewstep.rl.environments import Outcome
from fewstep.rl.rollouts import roll_out

NAN = float("nan")


class Scripted:
    """One task of two episodes, the second of which ends after its first step."""

    def __init__(self, ended=torch.bool, rewards=(1, 2)):
        self._ended, self._rewards = ended, rewards

    def reset(self):
        return torch.zeros(1, 2, 3)

    def step(self, actions):
        observations = torch.tensor([[[0.0] * 3, [NAN] * 3]])
        rewards = torch.tensor([[1.0, 2.0]]).view(self._rewards)
        return Outcome(observations, rewards, torch.tensor([[0, 1]]).to(self._ended))

    def close(self):
        pass


class Bad(Scripted):
    def step(self, actions):
        found = super().step(actions)
        again, self._rewards_now = getattr(self, "_rewards_now", 2.0), NAN
        return found._replace(rewards=torch.tensor([[1.0, again]]))


def policy(observations):
    return observations @ torch.ones(3, 2)


def test_what_is_not_finite_after_an_end_is_nothing():
    found = roll_out(policy, Gaussian(), Bad(), torch.randn(4, 1, 2, 1))
    assert all(part.isfinite().all() for part in vars(found).values())
    assert found.running.tolist() == [[[1, 1, 1, 1], [1, 0, 0, 0]]]
    assert found.returns.tolist() == [3.0]  # the mean of 4 and 2


@pytest.mark.parametrize(
    ("environments", "told"),
    [
        (Scripted(ended=torch.int64), r"gave ended of torch.int64, \(1, 2\); give bool, \(1, 2\)"),
        (Scripted(rewards=(1, 2, 1)), r"gave rewards of torch.float32, \(1, 2, 1\); give numbers"),
    ],
)
def test_another_outcome_is_refused(environments, told):
    with pytest.raises(InputError, match=told):
        roll_out(policy, Gaussian(), environments, torch.randn(4, 1, 2, 1))
