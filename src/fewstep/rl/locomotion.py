"""Bodies of MuJoCo that run, side by side; needs `pip install -e ".[locomotion]"`."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar, Literal, get_args

import mujoco
import mujoco.rollout
import numpy as np
import torch
from torch import Tensor

from fewstep.core.errors import check_name
from fewstep.data.counter_random import key_from_name, random_normal, random_uniform
from fewstep.rl.environments import DrawnNoise, Outcome

Goal = Literal["direction", "velocity"]
Numbers = np.ndarray[Any, Any]


class Body(ABC):
    """What runs: a model, what it feels of itself, and what its velocity is not rewarded for."""

    name: ClassVar[str]
    """Of its random numbers."""
    file: ClassVar[str]
    """Of its model, among Gymnasium's."""
    fastest: ClassVar[float]
    """Velocities to run at are up to this, in m/s."""

    def prepared(self, spec: Any) -> Any:
        """Return Gymnasium's model with what is other in the paper's: as it is."""
        return spec

    def rest(self, model: Any) -> Numbers:
        """Return the positions that episodes begin near, (positions,): those of the model."""
        positions: Numbers = model.qpos0
        return positions

    @abstractmethod
    def feel(self, positions: Numbers, velocities: Numbers) -> Numbers:
        """Return what is observed beside the centre of mass, each (episodes, ...)."""

    @abstractmethod
    def reward(self, towards: Tensor, actions: Tensor, goal: Goal) -> Tensor:
        """Return the reward of s v, or -|v - v*|, (tasks, episodes), and actions within bounds."""

    def has_fallen(self, positions: Numbers) -> Numbers:
        """Return which episodes are over, (episodes,): none before its time."""
        return np.zeros(len(positions), dtype=bool)


class Runners:
    """Bodies that step side by side, each from the state it is in alone.

    v is the velocity of the centre of mass along x, in m/s, after the step, and a the action, cut
    off at -1 and 1; a direction s is rewarded by s v, a velocity v* by -|v - v*|.

    Args:
        body: What runs.
        goal: What `goals` are.
        goals: (tasks,).
        starts: Gives the noise of the next reset, (tasks, episodes, positions and velocities).
        episodes: Bodies of each task.
        shows_goal: Observe the goal, too.

    Shapes: observations are what the body feels, the centre of mass (3) and, if shown, the goal;
        the last dimension of actions is of its motors.
    """

    def __init__(
        self,
        body: Body,
        goal: Goal,
        goals: Tensor,
        starts: Callable[[], Tensor],
        episodes: int,
        *,
        shows_goal: bool = False,
    ) -> None:
        self.body, self.goal, self.shows_goal = body, goal, shows_goal
        self.goals = goals[:, None].expand(-1, episodes)
        self._starts = starts
        self._model, self._sensing = models(body)
        self._data = [mujoco.MjData(self._model)]
        self._simulate = mujoco.rollout.Rollout(nthread=0).rollout
        self._states: Numbers = np.zeros(0)

    def reset(self) -> Tensor:
        """Put all of them near rest."""
        noise = self._starts().flatten(0, 1).double().cpu().numpy()
        nq = self._model.nq
        self._states = np.zeros((len(noise), 1 + nq + self._model.nv))
        self._states[:, 1 : 1 + nq] = self.body.rest(self._model) + 0.01 * noise[:, :nq]
        self._states[:, 1 + nq :] = 0.1 * noise[:, nq:]
        return self._observe(self._sensed(np.zeros((len(noise), self._model.nu))))

    def close(self) -> None:
        """Do nothing: there is nothing to free."""

    def step(self, actions: Tensor) -> Outcome:
        """Take one time step."""
        a = actions.clamp(-1, 1)
        controls = a.flatten(0, 1).double().cpu().numpy()
        states, _ = self._simulate(self._model, self._data, self._states, controls[:, None])
        self._states = np.ascontiguousarray(states[:, 0])
        sensors = self._sensed(controls)
        velocity = torch.from_numpy(sensors[:, 3]).view(self.goals.shape).to(self.goals)
        towards = velocity * self.goals
        if self.goal == "velocity":
            towards = -(velocity - self.goals).abs()
        fallen = torch.from_numpy(self.body.has_fallen(self._positions())).view(self.goals.shape)
        reward = self.body.reward(towards, a, self.goal)
        return Outcome(self._observe(sensors), reward, fallen.to(self.goals.device))

    def _positions(self) -> Numbers:
        return self._states[:, 1 : 1 + self._model.nq]

    def _sensed(self, controls: Numbers) -> Numbers:
        """Return centres of mass and their velocities; sensors are of the state before a step."""
        found: Numbers
        _, found = self._simulate(self._sensing, self._data, self._states, controls[:, None])
        return found[:, 0]

    def _observe(self, sensors: Numbers) -> Tensor:
        felt = self.body.feel(self._positions(), self._states[:, 1 + self._model.nq :])
        seen = torch.from_numpy(np.concatenate([felt, sensors[:, :3]], 1))
        seen = seen.view(*self.goals.shape, -1).to(self.goals)
        return torch.cat([seen, self.goals[..., None]], -1) if self.shows_goal else seen


class RunningTasks(DrawnNoise):
    """Tasks of running; task i is a pure function of (seed, split, i), its noise too.

    s = -1 or 1, each as likely, of directions;  v* ~ U[0, fastest] of velocities

    Args:
        body: What runs.
        split: Name of the split, which separates its tasks from other splits'.
        goal: "direction", to run forward or backward, or "velocity", to run so fast.
        seed: Any integer.
        horizon: Time steps of an episode, at most.
        shows_goal: Observe the goal, too, as the paper's oracle does.
        dtype: Of observations, rewards and noise; MuJoCo simulates in float64.
        device: Of observations, rewards and noise; MuJoCo simulates on the CPU.

    Raises:
        InputError: `horizon` is below 1, or `goal` is another.

    Deviation: the physics are today's MuJoCo, of the same model.

    Reference: Finn, Abbeel and Levine, ICML 2017, arXiv:1703.03400, section 5.3, and its code for
        observations, rewards and starts.
    """

    def __init__(
        self,
        body: Body,
        split: str,
        goal: Goal = "direction",
        *,
        seed: int = 0,
        horizon: int = 200,
        shows_goal: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check_name("goal", goal, get_args(Goal))
        model, _ = models(body)
        key = key_from_name(seed, f"{split}/{body.name}/noise")
        super().__init__(key, model.nu, horizon, dtype, device)
        self.body = body
        self.goal: Goal = goal
        self.shows_goal = shows_goal
        felt = body.feel(np.zeros((1, model.nq)), np.zeros((1, model.nv)))
        self.observation_size = felt.shape[1] + 3 + shows_goal
        self._start_size = model.nq + model.nv
        self._key_goal = key_from_name(seed, f"{split}/{body.name}/{goal}")
        self._key_start = key_from_name(seed, f"{split}/{body.name}/start")

    def goals(self, start: int, count: int) -> Tensor:
        """Return s, or v*, of tasks start, ..., start + count - 1, (count,)."""
        tasks = torch.arange(start, start + count, device=self.device)
        u = random_uniform(self._key_goal, tasks)
        is_velocity = self.goal == "velocity"
        goals = self.body.fastest * u if is_velocity else torch.where(u < 0.5, -1.0, 1.0)
        return goals.to(self.dtype)

    def environments(self, start: int, count: int, episodes: int) -> Runners:
        """Return tasks start, ..., start + count - 1, with so many episodes of each."""
        tasks, episode, entry = (
            torch.arange(n, m, device=self.device)
            for n, m in ((start, start + count), (0, episodes), (0, self._start_size))
        )
        resets = 0

        def starts() -> Tensor:
            nonlocal resets
            reset, resets = torch.tensor(resets, device=self.device), resets + 1
            return random_normal(
                self._key_start, tasks[:, None, None], reset, episode[:, None], entry
            )

        return Runners(
            self.body,
            self.goal,
            self.goals(start, count),
            starts,
            episodes,
            shows_goal=self.shows_goal,
        )


@cache
def models(body: Body) -> tuple[Any, Any]:
    """Return the model that comes with Gymnasium, its centre of mass sensed, to run and to sense.

    The one to sense evaluates the forces of a state once, whatever the integrator.
    """
    text = (files("gymnasium") / "envs/mujoco/assets" / body.file).read_text()
    spec = body.prepared(mujoco.MjSpec.from_string(text))
    for kind in (mujoco.mjtSensor.mjSENS_SUBTREECOM, mujoco.mjtSensor.mjSENS_SUBTREELINVEL):
        spec.add_sensor(type=kind, objtype=mujoco.mjtObj.mjOBJ_BODY, objname="torso")
    with warnings.catch_warnings():  # of attributes that the file has and MuJoCo is to drop
        warnings.simplefilter("ignore")
        to_run = spec.compile()
        spec.option.integrator = mujoco.mjtIntegrator.mjINT_EULER
        return to_run, spec.compile()
