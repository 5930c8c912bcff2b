"""Half-cheetahs and ants: MAML's returns before and after gradient steps, and baselines'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from fewstep.experiments.policy_returns import Numbers, PolicyReturns
from fewstep.experiments.policy_settings import Setting
from fewstep.report.courses import plot_courses
from fewstep.rl.rollouts import Rollouts

PAPER: dict[str, Numbers] = {  # of the others there are figures alone
    "half-cheetah direction": {
        "MAML": (-50.69, 293.19, 313.48, 315.65),
        "context": (-40.49, -44.08, -38.27, -42.50),
    },
}


@dataclass(frozen=True)
class _Running(PolicyReturns):
    goal: Literal["direction", "velocity"] = "direction"
    """What tasks differ in: forward or backward, or how fast."""

    body: ClassVar[str]

    @property
    def problem(self) -> str:
        """One of PROBLEMS."""
        return f"{self.body} {self.goal}"

    @property
    def paper(self) -> Numbers:
        """The paper's returns after 0, 1, ... steps, by the method."""
        return PAPER.get(self.problem, {})

    def draw(self, title: str, rollouts: Sequence[Rollouts]) -> Path:
        """Draw how far some of them run."""
        from fewstep.rl.bodies import BODIES  # here: needs MuJoCo
        from fewstep.rl.locomotion import models

        picture, (model, _) = self.folder / "courses.png", models(BODIES[self.body])
        plot_courses(rollouts, title, picture, seconds=model.opt.timestep)
        return picture


@dataclass(frozen=True)
class MamlHalfCheetah(_Running):
    """The returns of half-cheetahs after 0 to 3 gradient steps, MAML against its baselines.

    A half-cheetah of MuJoCo is to run forward or backward, or at a given speed, which it learns by
    the rewards alone. Methods are those of maml-navigation.
    """

    setting: Setting = field(
        default_factory=lambda: Setting(
            iterations=300, tasks=40, max_divergence=0.02, horizon=200, test_episodes=20
        )
    )
    """What is learned, and how it is tested; defaults are those of the authors' policy that runs
    forward or backward. That for velocities had 10 episodes and 0.01 nats."""

    body = "half-cheetah"


@dataclass(frozen=True)
class MamlAnt(_Running):
    """The returns of ants after 0 to 3 gradient steps, MAML against its baselines.

    An ant of MuJoCo, on four legs, is to run forward or backward, or at a given speed, which it
    learns by the rewards alone. Methods are those of maml-navigation.
    """

    setting: Setting = field(
        default_factory=lambda: Setting(
            iterations=500, tasks=40, episodes=40, horizon=200, test_episodes=40
        )
    )
    """What is learned, and how it is tested; defaults are the paper's for ants that run forward or
    backward. Those for velocities had 20 episodes."""

    body = "ant"
