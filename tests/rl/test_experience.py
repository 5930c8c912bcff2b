"""What episodes of unlike lengths teach, against a loop over what happened in them."""

import pytest
import torch

from fewstep.rl import Gaussian
from fewstep.rl.advantages import advantages
from fewstep.rl.experience import Experience, policy_gradient_loss
from fewstep.rl.rollouts import Rollouts

pytestmark = pytest.mark.usefixtures("float64")

TASKS, EPISODES, TIME = 2, 2, 5


def test_what_came_after_the_end_of_an_episode_does_not_count():
    lengths = torch.tensor([[5, 2], [1, 3]])
    running = (torch.arange(TIME) < lengths[..., None]).double()
    sizes = {"observations": 2, "actions": 1, "outputs": 2}
    parts = {n: torch.randn(TASKS, EPISODES, TIME, d) for n, d in sizes.items()}
    rewards = torch.randn(TASKS, EPISODES, TIME) * running
    rollouts = Rollouts(**parts, rewards=rewards, running=running)
    a = advantages(rollouts, discount=0.9, trace=1.0)
    experience = Experience.of(rollouts, discount=0.9, trace=1.0)
    new = torch.randn(TASKS, EPISODES * TIME, 2)
    tasks = experience.support()
    for j in range(TASKS):
        terms = [
            Gaussian().log_probability(new[j, e * TIME + t], parts["actions"][j, e, t]) * a[j, e, t]
            for e in range(EPISODES)
            for t in range(lengths[j, e])
        ]
        loss = policy_gradient_loss(Gaussian(), new[j], tasks.y_support[j])
        torch.testing.assert_close(loss, -torch.stack(terms).mean())
        seen = tasks.x_support[j].view(EPISODES, TIME, 2)
        assert torch.equal(seen, parts["observations"][j])
    assert torch.equal(experience.weights.mean(1), torch.ones(TASKS))
