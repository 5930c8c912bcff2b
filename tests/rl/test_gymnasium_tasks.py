"""Tasks of Gymnasium environments, against the same tasks of ours, and on a pendulum."""

import gymnasium
import numpy as np
import pytest
import torch

from fewstep import ConstantRate, InputError
from fewstep.rl import (
    Categorical,
    CategoricalPolicy,
    GaussianPolicy,
    NavigationTasks,
    PolicyLearner,
    TrustRegion,
)
from fewstep.rl.gymnasium_tasks import GymnasiumTasks

HORIZON = 12


class Point(gymnasium.Env):
    """2D navigation, as a Gymnasium environment."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-0.1, 0.1, (2,), np.float64)

    def __init__(self, goal):
        self.goal = goal

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.has_ended = np.zeros(2), False
        return self.position, {}

    def step(self, action):
        assert self.action_space.contains(action)
        assert not self.has_ended  # many an environment refuses
        self.position = self.position + action
        away = self.position - self.goal
        self.has_ended = bool((abs(away) < 0.01).all())
        return self.position, -np.linalg.norm(away), self.has_ended, False, {}


@pytest.fixture
def ours():
    """Return tasks whose goals are near, so that some episodes end at them."""
    tasks = NavigationTasks("train", horizon=HORIZON, dtype=torch.float64)
    far = tasks.goals
    tasks.goals = lambda start, count: 0.1 * far(start, count)
    return tasks


@pytest.fixture
def theirs(ours):
    tasks = GymnasiumTasks(
        lambda task: Point(ours.goals(task, 1)[0].numpy()), horizon=HORIZON, dtype=torch.float64
    )
    tasks.noise = ours.noise
    return tasks


@pytest.mark.usefixtures("float64")
def test_episodes_are_those_of_the_same_tasks_of_ours(ours, theirs):
    assert (theirs.observation_size, theirs.action_size) == (2, 2)
    learner = PolicyLearner(GaussianPolicy(2, 2, hidden=(6,)), 2, ConstantRate(0.3), episodes=40)
    pairs = zip(
        learner.roll_out(ours, slice(3, 6)), learner.roll_out(theirs, slice(3, 6)), strict=True
    )
    ends = 0
    for here, there in pairs:
        ends += int((here.running[..., -1] == 0).sum())
        for name in ("observations", "actions", "rewards", "running"):
            torch.testing.assert_close(getattr(there, name), getattr(here, name))
    assert ends > 0  # else what comes after an end was not compared


def pendulum(task):
    """Return a pendulum of another length for each task."""
    environment = gymnasium.make("Pendulum-v1")
    environment.unwrapped.l = 0.5 + 0.1 * task
    return environment


def test_a_policy_trains_on_pendulums_and_a_task_is_always_the_same():
    tasks = GymnasiumTasks(pendulum, horizon=8)
    learner = PolicyLearner(GaussianPolicy(3, 1, hidden=(6,)), 1, ConstantRate(0.1), episodes=4)
    update = learner.step(tasks, 0, 3).update
    assert update.loss < update.loss_before
    whole, again = (learner.evaluate(tasks, 3).of_tasks for _ in range(2))
    assert torch.equal(whole, again)
    alone = learner.roll_out(tasks, slice(2, 3))
    torch.testing.assert_close(torch.stack([r.returns for r in alone], 1), whole[2:])
    first, second = alone[0].observations[0, :, 0], alone[1].observations[0, :, 0]
    starts = torch.cat([first, second])
    assert len(starts.unique(dim=0)) == len(starts)  # a pendulum starts at random: each elsewhere


def test_every_environment_is_closed():
    is_open = []

    class Door(Point):
        def __init__(self, task):
            super().__init__(np.ones(2))
            is_open.append(self)

        def close(self):
            is_open.remove(self)

    learner = PolicyLearner(GaussianPolicy(2, 2, hidden=(4,)), 1, episodes=2)
    tasks = GymnasiumTasks(Door, horizon=5)
    learner.step(tasks, 0, 3)
    learner.evaluate(tasks, 3)
    assert not is_open
    tasks.environments(0, 2, 2)
    assert len(is_open) == 4


def test_an_environment_of_several_episodes_is_refused():
    one = pendulum(0)
    for make in (lambda task: one, lambda task: gymnasium.wrappers.FlattenObservation(one)):
        with pytest.raises(InputError, match="make gave one environment for several episodes"):
            GymnasiumTasks(make, horizon=3).environments(0, 2, 1)
    GymnasiumTasks(lambda task: one, horizon=3).environments(0, 1, 1)


def test_seeds_have_other_noise_and_other_starts():
    here, there = (GymnasiumTasks(pendulum, horizon=2, seed=seed) for seed in (0, 1))
    assert not torch.isclose(here.noise(0, 2, 3, 0), there.noise(0, 2, 3, 0)).any()
    starts = [tasks.environments(0, 2, 3).reset() for tasks in (here, there)]
    assert not torch.isclose(starts[0], starts[1]).all(-1).any()


def test_an_episode_that_its_environment_cuts_off_has_ended():
    tasks = GymnasiumTasks(lambda _: gymnasium.wrappers.TimeLimit(Point(np.ones(2)), 5), horizon=8)
    learner = PolicyLearner(GaussianPolicy(2, 2), episodes=2)
    (rollouts,) = learner.roll_out(tasks, slice(0, 1), num_steps=0)
    assert rollouts.running[0].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]] * 2
    assert not rollouts.rewards[0, :, 5:].any()


def test_actions_without_bounds_are_taken_as_they_are():
    class Free(Point):
        action_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)

    tasks = GymnasiumTasks(lambda _: Free(np.ones(2)), horizon=1, dtype=torch.float64)
    environments = tasks.environments(0, 1, episodes=1)
    environments.reset()
    found = environments.step(torch.tensor([[[7.0, -3.0]]], dtype=torch.float64))
    assert found.observations.tolist() == [[[7.0, -3.0]]]


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ([0.5, 0.5, 0.5, 0.5], [3.5, 0.5, 0.5, 0.5]),
        ([-1.0, -3.0, 3.0, -9.0], [2.0, -2.0, 1.0, -9.0]),
        ([1.5, 7.0, -7.0, 9.0], [4.0, 7.0, -7.0, 9.0]),
    ],
)
def test_each_number_of_an_action_has_its_own_bounds(given, taken):
    """On both sides, below, above, on none."""

    class Half(Point):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
        action_space = gymnasium.spaces.Box(
            np.array([2, -2, -np.inf, -np.inf]), np.array([4, np.inf, 1, np.inf]), dtype=np.float64
        )

        def reset(self, *, seed=None, options=None):
            return np.zeros(4), {}

        def step(self, action):
            assert self.action_space.contains(action)
            return action, 0.0, False, False, {}

    tasks = GymnasiumTasks(lambda _: Half(np.ones(2)), horizon=1, dtype=torch.float64)
    environments = tasks.environments(0, 1, episodes=1)
    environments.reset()
    found = environments.step(torch.tensor([[given]], dtype=torch.float64))
    assert found.observations.tolist() == [[taken]]


class Switch(Point):
    """The reward is which of three actions, numbered from 5, was taken."""

    action_space = gymnasium.spaces.Discrete(3, start=5)

    def step(self, action):
        assert self.action_space.contains(action)
        return self.position, float(action), False, False, {}


def test_actions_of_a_kind_are_the_one_taken():
    tasks = GymnasiumTasks(lambda _: Switch(np.ones(2)), horizon=4)
    assert tasks.action_size == 3
    learner = PolicyLearner(CategoricalPolicy(2, 3), episodes=30)
    (rollouts,) = learner.roll_out(tasks, slice(0, 1), num_steps=0)
    assert torch.equal(rollouts.rewards, 5.0 + rollouts.actions.argmax(-1))
    assert rollouts.rewards.unique().tolist() == [5, 6, 7]


def test_a_policy_of_few_kinds_of_actions_learns_to_balance():
    def pole(task):
        environment = gymnasium.make("CartPole-v1")
        environment.unwrapped.gravity = 8.0 + task % 4
        return environment

    torch.manual_seed(0)
    tasks = GymnasiumTasks(pole, horizon=40)
    policy = CategoricalPolicy(4, 2, hidden=(8,))
    learner = PolicyLearner(policy, outer=TrustRegion(0.05), episodes=5)
    before = learner.evaluate(tasks, 10)
    for i in range(8):
        learner.step(tasks, 100 + 5 * i, 5)
    after = learner.evaluate(tasks, 10)
    for step in (0, 1):
        assert after.curve[step] > before.curve[step] + 3 * before.curve_ci95[step]


def test_outputs_of_another_size_are_refused():
    tasks = GymnasiumTasks(lambda _: Switch(np.ones(2)), horizon=4)
    told = r"the policy has 6 outputs, but Categorical\(\) of actions of size 3 takes 3"
    with pytest.raises(InputError, match=told):
        PolicyLearner(GaussianPolicy(2, 3), distribution=Categorical()).evaluate(tasks)


@pytest.mark.parametrize("name", ["observation_space", "action_space"])
def test_other_spaces_are_refused(name):
    environment = Point(np.ones(2))
    setattr(environment, name, gymnasium.spaces.MultiBinary(3))
    with pytest.raises(InputError, match=r"MultiBinary\(3\); give a Box of one dimension"):
        GymnasiumTasks(lambda _: environment, horizon=5)
