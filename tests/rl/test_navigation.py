"""2D navigation against a point walked by hand."""

import math

import pytest
import torch

from fewstep import InputError
from fewstep.rl import NavigationTasks
from fewstep.rl.navigation import Navigation


def test_a_point_walks_as_by_hand():
    goal = (0.25, -0.1)
    environment = Navigation(torch.tensor([goal], dtype=torch.float64), episodes=1)
    assert environment.reset().tolist() == [[[0, 0]]]
    x = y = 0.0
    for action in [(1.0, -0.5), (0.3, 0.2), (5.0, -7.0)]:
        found = environment.step(torch.tensor([[action]], dtype=torch.float64))
        x += 0.1 * min(max(action[0], -1), 1)
        y += 0.1 * min(max(action[1], -1), 1)
        assert found.observations[0, 0].tolist() == pytest.approx([x, y])
        assert found.rewards.item() == pytest.approx(-math.dist((x, y), goal))
        assert not found.ended.item()


def test_an_episode_ends_at_the_goal_in_both_coordinates():
    goals = torch.tensor([[0.1, 0.105], [0.1, 0.115]], dtype=torch.float64)
    environment = Navigation(goals, episodes=2)
    environment.reset()
    found = environment.step(torch.ones(2, 2, 2, dtype=torch.float64))
    assert found.ended.tolist() == [[True, True], [False, False]]


def test_a_reset_puts_the_points_back():
    environment = Navigation(torch.zeros(1, 2), episodes=1)
    environment.step(torch.ones(1, 1, 2))
    assert not environment.reset().any()


def test_goals_fill_the_square():
    goals = NavigationTasks("train").goals(0, 20_000)
    assert goals.min() >= -0.5
    assert goals.max() < 0.5
    assert goals.mean(0).tolist() == pytest.approx([0, 0], abs=0.01)
    assert goals.var(0).tolist() == pytest.approx([1 / 12, 1 / 12], rel=0.02)
    # What a point that stays where it is gets in 100 steps; the paper's, before a step, is -40.4.
    assert 100 * goals.norm(dim=1).mean() == pytest.approx(38.3, abs=0.3)


def test_a_task_is_the_same_in_any_batch():
    tasks = NavigationTasks("train", seed=3)
    assert torch.equal(tasks.goals(0, 6)[2:5], tasks.goals(2, 3))
    whole, part = tasks.noise(0, 6, 4, step=1), tasks.noise(2, 3, 4, step=1)
    assert torch.equal(whole[:, 2:5], part)
    assert torch.equal(tasks.noise(0, 2, 4, step=1)[:, :, :3], tasks.noise(0, 2, 3, step=1))


@pytest.mark.parametrize("other", [{"split": "test"}, {"seed": 1}])
def test_splits_and_seeds_have_other_tasks(other):
    here = NavigationTasks("train")
    there = NavigationTasks(**{"split": "train"} | other)
    assert not torch.isclose(here.goals(0, 8), there.goals(0, 8)).any()
    assert not torch.isclose(here.noise(0, 2, 2, 0), there.noise(0, 2, 2, 0)).any()


def test_noise_is_another_for_each_step_and_time():
    tasks = NavigationTasks("train", horizon=50, dtype=torch.float64)
    drawn = torch.cat([tasks.noise(0, 10, 20, step).flatten() for step in (0, 1)])
    assert len(drawn.unique()) == len(drawn)
    assert drawn.mean() == pytest.approx(0, abs=0.02)
    assert drawn.var() == pytest.approx(1, rel=0.02)


def test_the_goal_can_be_shown():
    tasks = NavigationTasks("train", shows_goal=True)
    seen = tasks.environments(4, 3, episodes=2).reset()
    assert seen.shape == (3, 2, tasks.observation_size)
    assert torch.equal(seen[:, 1, 2:], tasks.goals(4, 3))


def test_no_horizon_is_refused():
    with pytest.raises(InputError, match="horizon=0"):
        NavigationTasks("train", horizon=0)
