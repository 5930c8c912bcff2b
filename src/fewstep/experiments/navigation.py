"""2D navigation: MAML's returns before and after gradient steps, against the paper's baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.experiments.policy_returns import SHOWN_TASKS, Numbers, PolicyReturns
from fewstep.report.navigation_paths import plot_paths
from fewstep.rl.navigation import NavigationTasks
from fewstep.rl.rollouts import Rollouts


@dataclass(frozen=True)
class MamlNavigation(PolicyReturns):
    """The returns of 2D navigation after 0 to 3 gradient steps, MAML against its baselines.

    A policy walks a point to a goal that it learns of by the rewards alone. It is trained to be
    good after one step, by a trust region; baselines are the same without a step ("pretrained"),
    without training ("random"), and one that sees the goal ("oracle").
    """

    @property
    def problem(self) -> str:
        """One of PROBLEMS."""
        return "navigation"

    @property
    def paper(self) -> Numbers:
        """The paper's returns after 0, 1, ... steps, by the method."""
        return {
            "MAML": (-40.41, -11.68, -3.33, -3.23),
            "context": (-42.42, -13.90, -5.17, -3.18),
        }

    def draw(self, title: str, rollouts: Sequence[Rollouts]) -> Path:
        """Draw the paths of some points."""
        picture = self.folder / "paths.png"
        plot_paths(rollouts, NavigationTasks("test").goals(0, SHOWN_TASKS), title, picture)
        return picture
