"""Bodies side by side against MuJoCo's own steps of one after the other."""

import mujoco
import numpy as np
import pytest
import torch

from fewstep import InputError
from fewstep.rl import GaussianPolicy, PolicyLearner, TrustRegion
from fewstep.rl.bodies import BODIES
from fewstep.rl.locomotion import RunningTasks, models

CHEETAH, ANT = BODIES.values()


def tasks(goal="direction", split="train", body=CHEETAH, **kwargs):
    return RunningTasks(body, split, goal, **{"horizon": 30, "dtype": torch.float64} | kwargs)


def centre_of_mass(data):
    """Return position and velocity of the centre of mass, from those of the bodies."""
    model = data.model
    masses = model.body_mass[1:]
    velocities = []
    for body in range(1, model.nbody):
        jacobian = np.zeros((3, model.nv))
        mujoco.mj_jacBodyCom(model, data, jacobian, None, body)
        velocities.append(jacobian @ data.qvel)
    return (masses @ data.xipos[1:] / masses.sum(), masses @ np.array(velocities) / masses.sum())


def felt(body, data):
    if body is CHEETAH:
        return [data.qpos[1:], data.qvel]
    return [data.qpos, data.qvel, data.body("torso").xmat]


def rewarded(body, goal, v, s, a):
    if body is CHEETAH:
        return (s * v if goal == "direction" else -abs(v - s)) - 0.05 * (a @ a)
    return (s * v if goal == "direction" else 1 - abs(v - s)) + 0.05 - 0.005 * (a @ a)


@pytest.mark.parametrize("goal", ["direction", "velocity"])
@pytest.mark.parametrize("body", [CHEETAH, ANT], ids=list(BODIES))
def test_episodes_are_those_of_single_steps(body, goal):
    """State, centre of mass and reward at each time, with actions of which some are cut off."""
    source = tasks(goal, body=body)
    environments = source.environments(2, 3, episodes=2)
    observations = environments.reset()
    assert observations.shape == (3, 2, source.observation_size)
    goals, (model, _) = source.goals(2, 3).tolist(), models(body)
    singles = {}
    for task in range(3):
        for episode in range(2):
            data = singles[task, episode] = mujoco.MjData(model)
            state = environments._states[2 * task + episode]
            data.qpos[:], data.qvel[:] = np.split(state[1:], [model.nq])
            mujoco.mj_forward(model, data)
    generator = torch.Generator().manual_seed(0)
    for _ in range(source.horizon):
        for at, data in singles.items():
            seen = [*felt(body, data), centre_of_mass(data)[0]]
            np.testing.assert_allclose(observations[at], np.concatenate(seen), atol=1e-7)
        actions = torch.randn(3, 2, model.nu, generator=generator, dtype=torch.float64)
        found = environments.step(1.5 * actions)
        observations = found.observations
        for (task, episode), data in singles.items():
            data.ctrl[:] = (1.5 * actions[task, episode]).clamp(-1, 1)
            mujoco.mj_step(model, data)
            mujoco.mj_forward(model, data)
            reward = rewarded(body, goal, centre_of_mass(data)[1][0], goals[task], data.ctrl)
            assert found.rewards[task, episode].item() == pytest.approx(reward, abs=1e-7)
            is_low = body is ANT and not 0.2 <= data.qpos[2] <= 1
            assert found.ended[task, episode].item() == is_low


def test_an_ant_that_falls_or_jumps_is_done():
    heights = torch.tensor([0.1, 0.19, 0.21, 0.55, 0.99, 1.01, torch.nan])
    positions = np.zeros((7, 15))
    positions[:, 2] = heights
    assert ANT.has_fallen(positions).tolist() == [True, True, False, False, False, True, True]
    assert not CHEETAH.has_fallen(positions).any()
    environments = tasks(body=ANT, horizon=200).environments(0, 2, episodes=3)
    environments.reset()
    environments._states[4, 3] = 1.5
    ended = environments.step(torch.zeros(2, 3, 8)).ended
    assert ended.tolist() == [[False] * 3, [False, True, False]]


def test_time_steps_are_those_of_the_paper():
    assert [models(body)[0].opt.timestep for body in (CHEETAH, ANT)] == [0.01, 0.02]
    assert RunningTasks(ANT, "train").horizon == 200


def test_an_ant_stands_as_the_authors_has_it():
    model, _ = models(ANT)
    seen = tasks(body=ANT).environments(0, 10, episodes=40).reset()
    expected = [0, 0, 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1]
    np.testing.assert_allclose(seen[..., :15].mean((0, 1)), expected, atol=2e-3)
    assert seen[..., :15].std((0, 1)).numpy() == pytest.approx(0.01, rel=0.15)
    assert seen[..., 15:29].std((0, 1)).numpy() == pytest.approx(0.1, rel=0.15)
    np.testing.assert_allclose(seen[..., 29:38].mean((0, 1)), np.eye(3).ravel(), atol=2e-3)
    assert model.actuator_gear[:, 0].tolist() == [150] * 8
    assert model.geom_solimp[:, :3].tolist() == [[0.8, 0.8, 0.01]] * model.ngeom


def test_an_episode_does_not_depend_on_the_others():
    source = tasks()
    policy = GaussianPolicy(20, 6, hidden=(6,)).double()
    learner = PolicyLearner(policy, num_steps=1, episodes=3)
    whole = learner.roll_out(source, slice(0, 4))
    alone = learner.roll_out(source, slice(2, 3))
    for here, there in zip(whole, alone, strict=True):
        torch.testing.assert_close(here.observations[2:3], there.observations)
        torch.testing.assert_close(here.rewards[2:3], there.rewards)
    again = learner.roll_out(source, slice(0, 4))
    assert all(
        torch.equal(a.observations, b.observations) for a, b in zip(whole, again, strict=True)
    )


def test_episodes_begin_near_rest_each_elsewhere():
    environments = tasks().environments(0, 50, episodes=40)
    first, second = environments.reset(), environments.reset()
    assert len(torch.cat([first, second]).flatten(0, 1).unique(dim=0)) == 2 * 50 * 40
    positions, velocities = first[..., :8], first[..., 8:17]
    assert positions.std().item() == pytest.approx(0.01, rel=0.02)
    assert velocities.std().item() == pytest.approx(0.1, rel=0.02)
    assert positions.mean().item() == pytest.approx(0, abs=1e-3)
    part = tasks().environments(20, 3, episodes=5).reset()
    assert torch.equal(part, first[20:23, :5])


def test_goals_are_as_likely_as_the_paper_says():
    directions = tasks().goals(0, 10_000)
    assert directions.unique().tolist() == [-1, 1]
    assert directions.mean().item() == pytest.approx(0, abs=0.03)
    for body, fastest in ((CHEETAH, 2), (ANT, 3)):
        velocities = tasks("velocity", body=body).goals(0, 10_000) / fastest
        assert 0 <= velocities.min() < 0.01 < 0.99 < velocities.max() < 1
        assert velocities.mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(tasks().goals(3, 4), directions[3:7])


@pytest.mark.parametrize("other", [{"split": "test"}, {"seed": 1}])
def test_splits_and_seeds_have_other_tasks(other):
    here, there = tasks("velocity"), tasks("velocity", **other)
    assert not torch.isclose(here.goals(0, 8), there.goals(0, 8)).any()
    assert not torch.isclose(here.noise(0, 2, 2, 0), there.noise(0, 2, 2, 0)).any()
    starts = [each.environments(0, 2, 2).reset()[..., :17] for each in (here, there)]
    assert not torch.isclose(*starts).any()


@pytest.mark.parametrize(("body", "size"), [(CHEETAH, 21), (ANT, 42)])
def test_the_goal_can_be_shown(body, size):
    source = tasks("velocity", body=body, shows_goal=True)
    seen = source.environments(4, 3, episodes=2).reset()
    assert seen.shape == (3, 2, source.observation_size) == (3, 2, size)
    assert torch.equal(seen[:, 1, -1], source.goals(4, 3))


def test_a_policy_learns_to_run_where_it_is_told():
    """In some iterations an oracle's return grows by far more than its interval."""
    torch.manual_seed(0)
    source = tasks(dtype=torch.float32, shows_goal=True)
    policy = GaussianPolicy(21, 6, hidden=(16,))
    learner = PolicyLearner(policy, 0, outer=TrustRegion(0.1), episodes=4)
    test = tasks(split="test", dtype=torch.float32, shows_goal=True)
    before = learner.evaluate(test, 40)
    for i in range(25):
        learner.step(source, 10 * i, 10)
    after = learner.evaluate(test, 40)
    assert after.curve[0] > before.curve[0] + 3 * before.curve_ci95[0]


def test_mistakes_are_told():
    with pytest.raises(InputError, match="unknown goal 'directoin'; did you mean 'direction'"):
        tasks("directoin")
    with pytest.raises(InputError, match="horizon=0 must be at least 1"):
        tasks(horizon=0)
