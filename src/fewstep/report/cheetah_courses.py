"""How far half-cheetahs run before and after gradient steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.report.figure import legend_below, new_figure, save_figure
from fewstep.rl.rollouts import Rollouts

_X = 17  # of the centre of mass, among the observations
_SECONDS = 0.01  # of a time step
_SHOWN = 5  # episodes


def plot_courses(rollouts: Sequence[Rollouts], title: str, path: Path) -> None:
    """Draw the distance over time in some episodes of half-cheetahs, axes for each task.

    Args:
        rollouts: Those after 0, 1, ... steps.
        title: Of the figure.
        path: PNG file to write.
    """
    num_tasks, _, horizon = rollouts[0].rewards.shape
    seconds = _SECONDS * torch.arange(horizon)
    figure = new_figure(2.8 * num_tasks, 3.2)
    axes = figure.subplots(1, num_tasks, squeeze=False, sharex=True, sharey=True)[0]
    for task, axis in enumerate(axes):
        for step, found in enumerate(rollouts):
            steps = f"{step} step{'s' * (step != 1)}"
            for x in found.observations[task, :_SHOWN, :, _X].cpu():
                axis.plot(seconds, x, color=f"C{step}", alpha=0.7, linewidth=1, label=steps)
        returns = ", ".join(f"{round(float(found.returns[task]))}" for found in rollouts)
        axis.set_title(f"task {task}, returns {returns}", fontsize=9)
        axis.set_xlabel("s")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("distance in m")
    figure.suptitle(title, fontsize=10)
    legend_below(figure, axes[0])
    save_figure(figure, path)
