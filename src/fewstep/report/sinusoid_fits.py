"""Sinusoid fits before and after adaptation, the figure of the MAML paper."""

from __future__ import annotations

from pathlib import Path

import torch

from fewstep.core.algorithm import Algorithm
from fewstep.core.errors import InputError
from fewstep.core.learner import MetaLearner
from fewstep.data.sinusoid import SinusoidEpisodes
from fewstep.report.figure import legend_below, new_figure, save_figure

STEPS = {0: ("C7", ":"), 1: ("C0", "--"), 5: ("C2", "-."), 10: ("C1", "-")}
_CURVES = 3  # test sinusoids, a column for each


def plot_sinusoid_fits(learner: MetaLearner, path: Path) -> None:
    """Draw fits before and after 1, 5 and 10 steps, from 5 points (above) and from 10 (below).

    Steps that the algorithm has no rates or rows for are left out.

    Args:
        learner: A trained sinusoid learner.
        path: PNG file to write.
    """
    figure = new_figure(4 * _CURVES, 6.5)
    axes = figure.subplots(2, _CURVES, sharex=True, squeeze=False)
    device = next(learner.module.parameters()).device
    drawn = {k: how for k, how in STEPS.items() if _takes(learner.algorithm, k)}
    line = torch.linspace(-5, 5, 200, device=device)[:, None]
    for row, shots in enumerate((5, 10)):
        episodes = SinusoidEpisodes("test", shots=shots, queries=1, device=device)
        batch = episodes.batch(0, _CURVES)
        amplitudes, phases = episodes.curve(0, _CURVES)
        for column in range(_CURVES):
            axis = axes[row][column]
            x, y = batch.x_support[column], batch.y_support[column]
            truth = amplitudes[column] * torch.sin(line - phases[column])
            axis.plot(line.cpu(), truth.cpu(), color="C3", linewidth=1.5, label="truth")
            for steps, (colour, style) in drawn.items():
                with torch.no_grad():
                    fit = learner.adapt(x, y, num_steps=steps)(line)
                axis.plot(line.cpu(), fit.cpu(), color=colour, linestyle=style, label=_steps(steps))
            axis.plot(x.cpu(), y.cpu(), "^", color="k", markersize=5, label="support")
            axis.set_title(f"task {column}, {shots} points", fontsize=9)
            axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("x")
    for first in axes[:, 0]:
        first.set_ylabel("y")
    legend_below(figure, axes[0][0])
    save_figure(figure, path)


def _takes(algorithm: Algorithm, steps: int) -> bool:
    try:
        algorithm.check_steps(steps)
    except InputError:
        return False
    return True


def _steps(steps: int) -> str:
    return "before" if steps == 0 else f"{steps} step{'s' if steps > 1 else ''}"
