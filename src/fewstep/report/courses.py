"""How far bodies run before and after gradient steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.report.figure import legend_below, new_figure, save_figure
from fewstep.rl.rollouts import Rollouts

_SHOWN = 5  # episodes


def plot_courses(rollouts: Sequence[Rollouts], title: str, path: Path, *, seconds: float) -> None:
    """Draw the distance over time in some episodes, until they end, axes for each task.

    Args:
        rollouts: Those after 0, 1, ... steps; observations end with the centre of mass, of which x
            is the first, and do not show the goal.
        title: Of the figure.
        path: PNG file to write.
        seconds: Of a time step.
    """
    num_tasks, _, horizon = rollouts[0].rewards.shape
    times = seconds * torch.arange(horizon)
    figure = new_figure(2.8 * num_tasks, 3.2)
    axes = figure.subplots(1, num_tasks, squeeze=False, sharex=True, sharey=True)[0]
    for task, axis in enumerate(axes):
        for step, found in enumerate(rollouts):
            steps = f"{step} step{'s' * (step != 1)}"
            courses = found.observations[task, :_SHOWN, :, -3]
            is_on = found.running[task, :_SHOWN] > 0
            for x in courses.where(is_on, torch.nan).cpu():
                axis.plot(times, x, color=f"C{step}", alpha=0.7, linewidth=1, label=steps)
        returns = ", ".join(f"{round(float(found.returns[task]))}" for found in rollouts)
        axis.set_title(f"task {task}, returns {returns}", fontsize=9)
        axis.set_xlabel("s")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("distance in m")
    figure.suptitle(title, fontsize=10)
    legend_below(figure, axes[0])
    save_figure(figure, path)
