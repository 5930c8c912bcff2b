"""Half-cheetahs that run, of the MAML paper; needs `pip install -e ".[locomotion]"`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

import mujoco
import mujoco.rollout
import numpy as np
import torch
from torch import Tensor

from fewstep.core.errors import check_name
from fewstep.data.counter_random import key_from_name, random_normal, random_uniform
from fewstep.rl.environments import DrawnNoise, Outcome

Goal = Literal["direction", "velocity"]


class HalfCheetah:
    """Half-cheetahs that step side by side, each from the state it is in alone.

    reward = s v - 0.05 |a|^2 of directions s;  reward = -|v - v*| - 0.05 |a|^2 of velocities v*

    with v the velocity of the centre of mass along x, in m/s, after the step, and a the action, cut
    off at -1 and 1. No episode ends before its time.

    Args:
        goal: What `goals` are.
        goals: (tasks,).
        starts: Gives the noise of the next reset, (tasks, episodes, 18).
        episodes: Cheetahs of each task.
        shows_goal: Observe the goal, too.

    Shapes: observations are positions without x (8), velocities (9), the centre of mass (3) and, if
        shown, the goal, (tasks, episodes, 20 or 21); actions are (tasks, episodes, 6).
    """

    def __init__(
        self,
        goal: Goal,
        goals: Tensor,
        starts: Callable[[], Tensor],
        episodes: int,
        *,
        shows_goal: bool = False,
    ) -> None:
        self.goal, self.shows_goal = goal, shows_goal
        self.goals = goals[:, None].expand(-1, episodes)
        self._starts = starts
        self._model = _model()
        self._data = [mujoco.MjData(self._model)]
        self._simulate = mujoco.rollout.Rollout(nthread=0).rollout
        self._states = np.zeros(0)

    def reset(self) -> Tensor:
        """Put all of them near rest."""
        noise = self._starts().flatten(0, 1).double().cpu().numpy()
        nq, nv = self._model.nq, self._model.nv
        self._states = np.zeros((len(noise), 1 + nq + nv))
        self._states[:, 1 : 1 + nq] = self._model.qpos0 + 0.01 * noise[:, :nq]
        self._states[:, 1 + nq :] = 0.1 * noise[:, nq:]
        _, sensors = self._simulated(np.zeros((len(noise), 1, self._model.nu)))
        return self._observe(sensors[:, 0])

    def close(self) -> None:
        """Do nothing: there is nothing to free."""

    def step(self, actions: Tensor) -> Outcome:
        """Take one time step of 0.01 s."""
        a = actions.clamp(-1, 1)
        controls = a.flatten(0, 1).double().cpu().numpy()
        # Sensors are of the state before a step: those of the new one come with another.
        states, sensors = self._simulated(np.repeat(controls[:, None], 2, 1))
        self._states = np.ascontiguousarray(states[:, 0])
        velocity = torch.from_numpy(sensors[:, 1, 3]).view(self.goals.shape).to(self.goals)
        towards = velocity * self.goals
        if self.goal == "velocity":
            towards = -(velocity - self.goals).abs()
        rewards = towards - 0.05 * a.square().sum(-1)
        ended = torch.zeros_like(rewards, dtype=torch.bool)
        return Outcome(self._observe(sensors[:, 1]), rewards, ended)

    def _simulated(self, controls: np.ndarray[Any, Any]) -> tuple[Any, Any]:
        """Return states after each control, and what the sensors said before it."""
        found: tuple[Any, Any] = self._simulate(self._model, self._data, self._states, controls)
        return found

    def _observe(self, sensors: np.ndarray[Any, Any]) -> Tensor:
        seen = torch.from_numpy(np.concatenate([self._states[:, 2:], sensors[:, :3]], 1))
        seen = seen.view(*self.goals.shape, -1).to(self.goals)
        return torch.cat([seen, self.goals[..., None]], -1) if self.shows_goal else seen


class HalfCheetahTasks(DrawnNoise):
    """Tasks of running; task i is a pure function of (seed, split, i), its noise too.

    s = -1 or 1, each as likely, of directions;  v* ~ U[0, 2] of velocities

    Args:
        split: Name of the split, which separates its tasks from other splits'.
        goal: "direction", to run forward or backward, or "velocity", to run so fast.
        seed: Any integer.
        horizon: Time steps of an episode, of 0.01 s.
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
        super().__init__(key_from_name(seed, f"{split}/cheetah/noise"), 6, horizon, dtype, device)
        self.goal: Goal = goal
        self.shows_goal = shows_goal
        self.observation_size = 21 if shows_goal else 20
        self._key_goal = key_from_name(seed, f"{split}/cheetah/{goal}")
        self._key_start = key_from_name(seed, f"{split}/cheetah/start")

    def goals(self, start: int, count: int) -> Tensor:
        """Return s, or v*, of tasks start, ..., start + count - 1, (count,)."""
        tasks = torch.arange(start, start + count, device=self.device)
        u = random_uniform(self._key_goal, tasks)
        goals = 2 * u if self.goal == "velocity" else torch.where(u < 0.5, -1.0, 1.0)
        return goals.to(self.dtype)

    def environments(self, start: int, count: int, episodes: int) -> HalfCheetah:
        """Return tasks start, ..., start + count - 1, with so many episodes of each."""
        tasks, episode, entry = (
            torch.arange(n, m, device=self.device)
            for n, m in ((start, start + count), (0, episodes), (0, 18))
        )
        resets = 0

        def starts() -> Tensor:
            nonlocal resets
            reset, resets = torch.tensor(resets, device=self.device), resets + 1
            return random_normal(
                self._key_start, tasks[:, None, None], reset, episode[:, None], entry
            )

        return HalfCheetah(
            self.goal, self.goals(start, count), starts, episodes, shows_goal=self.shows_goal
        )


@cache
def _model() -> Any:
    """Return the half-cheetah that comes with Gymnasium, its centre of mass sensed."""
    text = (files("gymnasium") / "envs/mujoco/assets/half_cheetah.xml").read_text()
    spec = mujoco.MjSpec.from_string(text)
    for kind in (mujoco.mjtSensor.mjSENS_SUBTREECOM, mujoco.mjtSensor.mjSENS_SUBTREELINVEL):
        spec.add_sensor(type=kind, objtype=mujoco.mjtObj.mjOBJ_BODY, objname="torso")
    with warnings.catch_warnings():  # of attributes that the file has and MuJoCo is to drop
        warnings.simplefilter("ignore")
        return spec.compile()
