"""How far half-cheetahs run before and after gradient steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.core.rates import StepRates
from fewstep.report.figure import new_figure, save_figure
from fewstep.rl.environments import TaskEnvironments
from fewstep.rl.learner import PolicyLearner

_X = 17  # of the centre of mass, among the observations
_SECONDS = 0.01  # of a time step


def plot_courses(
    learner: PolicyLearner,
    tasks: TaskEnvironments,
    path: Path,
    *,
    inner_lrs: Sequence[float],
    num_steps: int,
    episodes: int,
    num_tasks: int = 4,
    shown: int = 5,
) -> None:
    """Draw the distance over time in some episodes of the first tasks, by gradient steps.

    Args:
        learner: A trained one.
        tasks: Of half-cheetahs.
        path: PNG file to write.
        inner_lrs: Inner rates of the steps.
        num_steps: Inner steps.
        episodes: Of each task, after each number of steps.
        num_tasks: Tasks, axes for each.
        shown: Episodes that are drawn.
    """
    rollouts = learner.roll_out(
        tasks,
        slice(0, num_tasks),
        num_steps=num_steps,
        inner_rate=StepRates(tuple(inner_lrs)),
        episodes=episodes,
    )
    seconds = _SECONDS * torch.arange(tasks.horizon)
    figure = new_figure(2.8 * num_tasks, 3.2)
    axes = figure.subplots(1, num_tasks, squeeze=False, sharex=True, sharey=True)[0]
    for task, axis in enumerate(axes):
        for step, found in enumerate(rollouts):
            steps = f"{step} step{'s' * (step != 1)}"
            for x in found.observations[task, :shown, :, _X].cpu():
                axis.plot(seconds, x, color=f"C{step}", alpha=0.7, linewidth=1, label=steps)
        returns = ", ".join(f"{found.returns[task]:.0f}" for found in rollouts)
        axis.set_title(f"task {task}, returns {returns}", fontsize=9)
        axis.set_xlabel("s")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("distance in m")
    handles, labels = axes[0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))  # one course for all
    figure.legend(
        by_label.values(), by_label.keys(), loc="outside lower center", ncols=num_steps + 1
    )
    save_figure(figure, path)
