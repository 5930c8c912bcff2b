"""The half-cheetah and the ant of the MAML paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fewstep.rl.locomotion import Body, Goal, Numbers


@dataclass(frozen=True)
class HalfCheetah(Body):
    """A runner in a plane, with six motors; time steps of 0.01 s.

    reward = s v - 0.05 |a|^2 of directions s;  reward = -|v - v*| - 0.05 |a|^2 of v* in [0, 2] m/s

    It feels its positions without x (8) and its velocities (9).
    """

    name = "cheetah"
    file = "half_cheetah.xml"
    fastest = 2.0

    def feel(self, positions: Numbers, velocities: Numbers) -> Numbers:
        """Return positions and velocities."""
        return np.concatenate([positions[:, 1:], velocities], 1)

    def reward(self, towards: Tensor, actions: Tensor, goal: Goal) -> Tensor:
        """Return the reward."""
        return towards - 0.05 * actions.square().sum(-1)


@dataclass(frozen=True)
class Ant(Body):
    """A body on four legs, with eight motors; time steps of 0.02 s.

    reward = s v + 0.05 - 0.005 |a|^2 of directions s
    reward = 1 - |v - v*| + 0.05 - 0.005 |a|^2 of velocities v* in [0, 3] m/s

    It feels its positions (15), its velocities (14) and the rotation matrix of its torso (9). An
    episode ends where the torso is below 0.2 m or above 1 m.

    Deviation: the authors' ants feel the forces of contacts, too, and pay for them 0.0005 times
        their squares, cut off at 1.
    """

    name = "ant"
    file = "ant.xml"
    fastest = 3.0

    def prepared(self, spec: Any) -> Any:
        """Return Gymnasium's model with the time step and the contacts of the authors'."""
        spec.option.timestep = 0.02
        for geometry in spec.geoms:
            geometry.solref = [0.02, 1]
            geometry.solimp[:3] = [0.8, 0.8, 0.01]
        return spec

    def rest(self, model: Any) -> Numbers:
        """Return the positions on four feet."""
        positions: Numbers = model.numeric("init_qpos").data
        return positions

    def feel(self, positions: Numbers, velocities: Numbers) -> Numbers:
        """Return positions, velocities, and the rotation matrix of the torso."""
        return np.concatenate([positions, velocities, _rotations(positions[:, 3:7])], 1)

    def reward(self, towards: Tensor, actions: Tensor, goal: Goal) -> Tensor:
        """Return the reward."""
        alive = 1.05 if goal == "velocity" else 0.05
        return towards + alive - 0.005 * actions.square().sum(-1)

    def has_fallen(self, positions: Numbers) -> Numbers:
        """Return whose torso is too low or too high."""
        height = positions[:, 2]
        fallen: Numbers = ~((height >= 0.2) & (height <= 1))  # nor is it if it is not finite
        return fallen


BODIES: dict[str, Body] = {"half-cheetah": HalfCheetah(), "ant": Ant()}


def _rotations(quaternions: Numbers) -> Numbers:
    """Return the matrices of rotations, (..., 9), row by row."""
    norm = np.maximum(np.linalg.norm(quaternions, axis=1), 1e-12)
    w, x, y, z = quaternions.T / norm
    rows = (
        (w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z),
    )
    return np.stack([entry for row in rows for entry in row], 1)
