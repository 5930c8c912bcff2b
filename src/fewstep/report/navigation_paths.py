"""The paths of points before and after gradient steps, the figure of the MAML paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.core.rates import StepRates
from fewstep.report.figure import new_figure, save_figure
from fewstep.rl.learner import PolicyLearner
from fewstep.rl.navigation import NavigationTasks


def plot_paths(
    learner: PolicyLearner,
    tasks: NavigationTasks,
    path: Path,
    *,
    inner_lrs: Sequence[float],
    num_steps: int,
    episodes: int,
    num_tasks: int = 4,
    shown: int = 5,
) -> None:
    """Draw the paths of some episodes of the first tasks, a row for each number of steps.

    Args:
        learner: A trained one.
        tasks: Where the tasks come from.
        path: PNG file to write.
        inner_lrs: Inner rates of the steps.
        num_steps: Inner steps.
        episodes: Of each task, after each number of steps.
        num_tasks: Tasks, a column for each.
        shown: Episodes that are drawn.
    """
    rollouts = learner.roll_out(
        tasks,
        slice(0, num_tasks),
        num_steps=num_steps,
        inner_rate=StepRates(tuple(inner_lrs)),
        episodes=episodes,
    )
    goals = tasks.goals(0, num_tasks).cpu()
    figure = new_figure(2.6 * num_tasks, 2.7 * (num_steps + 1))
    axes = figure.subplots(num_steps + 1, num_tasks, squeeze=False, sharex=True, sharey=True)
    for step, found in enumerate(rollouts):
        for task in range(num_tasks):
            axis = axes[step][task]
            for episode in range(min(shown, found.running.shape[1])):
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
    handles, labels = axes[0][0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))  # one path for all
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=3)
    save_figure(figure, path)
