"""Learning curves of runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.core.errors import InputError
from fewstep.report.figure import label_plainly, legend_below, new_figure, save_figure
from fewstep.training.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = list[dict[str, Any]]


def plot_runs(runs: Sequence[RunFolder], path: Path) -> None:
    """Draw training and validation curves of runs on shared axes.

    Training curves are running means over 2% of the run; validation shows the mean and its 95%
    interval over the validation tasks. Runs are named by their folders, from where these part;
    those without training metrics, as the results that come along, have the second alone.

    Args:
        runs: Runs of one kind of problem.
        path: PNG file to write.

    Raises:
        InputError: a run has logged nothing, or the runs report different metrics.
    """
    paths = [run.path.resolve() for run in runs]
    common = os.path.commonpath([path.parent for path in paths])
    series = {
        str(path.relative_to(common)): run.metrics() for path, run in zip(paths, runs, strict=True)
    }
    names = {name: _metric_name(lines, name) for name, lines in series.items()}
    if len(set(names.values())) > 1:
        raise InputError(
            "the runs report different metrics "
            f"({', '.join(f'{run}: {m}' for run, m in names.items())}); plot them apart"
        )
    metric = next(iter(names.values()))
    has_training = any("loss" in m for lines in series.values() for m in lines)
    figure = new_figure(11 if has_training else 6, 4.2)
    *rest, right = figure.subplots(1, 2 if has_training else 1, squeeze=False)[0]
    for number, (name, lines) in enumerate(series.items()):
        colour = f"C{number}"
        for left in rest:
            _draw_smoothed(left, lines, "loss", colour, name)
        _draw_validation(right, lines, metric, colour, name)
    training = "training, running mean over 2% of the run"
    for left in rest:
        left.set(xlabel="iteration", ylabel="query loss", title=training, yscale="log")
    percent = " (%)" if metric == "accuracy" else ""
    right.set(xlabel="iteration", ylabel=f"{metric}{percent}", title="validation, 95% interval")
    if metric == "loss":
        right.set_yscale("log")
    for axes in (*rest, right):
        axes.grid(alpha=0.3)
        if axes.get_yscale() == "log":
            label_plainly(axes.yaxis)
    columns = max(
        1, (120 if rest else 65) // (8 + max(map(len, series)))
    )  # a line has room for 120 characters
    legend_below(figure, right, columns)  # on no band
    save_figure(figure, path)


def _metric_name(lines: Series, run: str) -> str:
    for line in lines:
        for key in line:
            if key.startswith("val_") and key not in ("val_ci95", "val_tasks"):
                return key.removeprefix("val_")
    raise InputError(
        f"{run} has no validation in its metrics.jsonl, so there is nothing to plot; give a run "
        "that has its own"
    )


def has_validation(run: RunFolder) -> bool:
    """Tell whether there is anything to plot."""
    return any(key.startswith("val_") for line in run.metrics() for key in line)


def _draw_smoothed(axes: Axes, lines: Series, key: str, colour: str, name: str) -> None:
    points = [(m["iteration"], m[key]) for m in lines if key in m]
    if not points:
        return
    x, y = np.array(points).T
    window = max(1, len(y) // 50)
    smooth = np.convolve(y, np.ones(window) / window, mode="valid")
    axes.plot(x[window - 1 :], smooth, color=colour, label=name)


def _draw_validation(axes: Axes, lines: Series, metric: str, colour: str, name: str) -> None:
    key = f"val_{metric}"
    scale = 100 if metric == "accuracy" else 1
    points = [(m["iteration"], scale * m[key], scale * m["val_ci95"]) for m in lines if key in m]
    x, y, ci = np.array(points).T
    axes.plot(x, y, color=colour, marker="o", markersize=3, label=name)
    if len(x) == 1:  # no band has a width
        axes.errorbar(x, y, ci, color=colour, capsize=3)
    axes.fill_between(x, y - ci, y + ci, color=colour, alpha=0.2, linewidth=0)
