"""The paths of points before and after gradient steps, the figure of the MAML paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fewstep.report.figure import legend_below, new_figure, save_figure
from fewstep.rl.rollouts import Rollouts

_SHOWN = 5  # episodes


def plot_paths(rollouts: Sequence[Rollouts], goals: Tensor, title: str, path: Path) -> None:
    """Draw the paths of some episodes, a row for each number of steps, a column for each task.

    Args:
        rollouts: Those after 0, 1, ... steps.
        goals: (tasks, 2).
        title: Of the figure.
        path: PNG file to write.
    """
    figure = new_figure(2.6 * len(goals), 2.7 * len(rollouts))
    axes = figure.subplots(len(rollouts), len(goals), squeeze=False, sharex=True, sharey=True)
    for step, found in enumerate(rollouts):
        for task in range(len(goals)):
            axis = axes[step][task]
            for episode in range(min(_SHOWN, found.running.shape[1])):
                length = int(found.running[task, episode].sum())
                x, y = found.observations[task, episode, :length, :2].cpu().T
                axis.plot(x, y, color="C0", alpha=0.6, linewidth=1, label="path")
            axis.plot(*goals[task], "*", color="C3", markersize=12, linestyle="", label="goal")
            axis.plot(0, 0, "o", color="k", markersize=4, linestyle="", label="start")
            steps = f"{step} step{'s' * (step != 1)}"
            axis.set_title(f"{steps}, return {found.returns[task]:.1f}", fontsize=9)
            axis.set(xlim=(-0.8, 0.8), ylim=(-0.8, 0.8), aspect="equal")
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("x")
    for first in axes[:, 0]:
        first.set_ylabel("y")
    figure.suptitle(title, fontsize=10)
    legend_below(figure, axes[0][0])
    save_figure(figure, path)
