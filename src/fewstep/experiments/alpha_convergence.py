"""How alpha, beta and the losses move, MAML against Alpha MAML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fewstep.core.errors import check_some
from fewstep.experiments.alpha_runs import Setting, check_all, numeral, train
from fewstep.experiments.pool import each
from fewstep.experiments.write_up import write_up
from fewstep.report.figure import new_figure, save_figure
from fewstep.training.build import resolve_device


@dataclass(frozen=True)
class AlphaConvergence:
    """The course of alpha, beta, training and validation loss, MAML against Alpha MAML.

    Columns: tuned initial rates; untuned with several eta_beta; untuned with several eta_alpha.
    """

    setting: Setting = field(default_factory=Setting)
    """What is learned."""
    tuned: tuple[float, float] = (0.464, 0.464)
    """alpha and beta at the start of the first column."""
    untuned: tuple[float, float] = (0.01, 0.01)
    """alpha and beta at the start of the others."""
    hyper_lrs: tuple[float, ...] = (0.001, 0.003, 0.01)
    """Hyper-rates to vary; the other is the middle one."""
    iterations: int = 500
    """Outer updates."""
    val_every: int = 25
    """Iterations between validations."""
    val_tasks: int = 50
    """Tasks of a validation."""
    workers: int = 1
    """Runs at once, a single-threaded process each."""
    ray: bool = False
    """Send the runs to a Ray cluster instead."""
    out: Path = Path("runs/alpha-convergence")
    """Folder of the outcomes and the figure; a second call goes on where one stopped."""

    def run(self, console: Console) -> None:
        """Train what is not trained yet; draw the figure."""
        check_some("hyper_lrs", self.hyper_lrs)
        middle = self.hyper_lrs[len(self.hyper_lrs) // 2]
        maml = ("MAML", None, None)
        columns = {
            "tuned": (self.tuned, [maml, ("Alpha MAML", middle, middle)]),
            "untuned, eta_beta varies": (
                self.untuned,
                [maml, *((f"eta_beta={numeral(eta)}", middle, eta) for eta in self.hyper_lrs)],
            ),
            "untuned, eta_alpha varies": (
                self.untuned,
                [maml, *((f"eta_alpha={numeral(eta)}", eta, middle) for eta in self.hyper_lrs)],
            ),
        }
        device = resolve_device(self.setting.device)
        files, jobs = {}, {}
        for column, ((alpha, beta), curves) in columns.items():
            for label, eta_alpha, eta_beta in curves:
                config = replace(
                    self.setting.config(alpha, beta, eta_alpha, eta_beta),
                    iterations=self.iterations,
                    val_tasks=self.val_tasks,
                    device=device,
                )
                file = f"{numeral(alpha)}-{numeral(beta)}-{eta_alpha}-{eta_beta}.json"
                files[column, label] = file  # some curves are in several columns
                jobs[file] = (self.out / "curves" / file, config)
        check_all(config for _, config in jobs.values())
        validated = partial(train, val_every=self.val_every)
        found = dict(each(validated, jobs, workers=self.workers, ray=self.ray, console=console))
        outcomes = {key: found[file] for key, file in files.items()}
        ends = {f"{column}: {label}": _summary(o) for (column, label), o in outcomes.items()}
        plot_convergence(outcomes, self.out / "convergence.png")
        numbers = "summary.json", {"curves": ends}
        write_up(self.out, device, console, numbers, pictures=["convergence.png"])


def _summary(outcome: Mapping[str, Any]) -> dict[str, Any]:
    last = outcome["losses"][-25:]
    return {
        "iterations": len(outcome["losses"]),
        "broken": outcome["broken"],
        "training_loss": sum(last) / len(last) if last else None,
        "validation_loss": outcome["validation"][-1][1] if outcome["validation"] else None,
        "rates": outcome["rates"][-1] if outcome["rates"] else {},
    }


def plot_convergence(outcomes: Mapping[tuple[str, str], Mapping[str, Any]], path: Path) -> None:
    """Draw alpha, beta, training and validation loss (rows) of every column.

    Args:
        outcomes: What `train` returned, by column and label.
        path: PNG file to write.
    """
    columns = list(dict.fromkeys(column for column, _ in outcomes))
    figure = new_figure(4.4 * len(columns), 10)
    axes = figure.subplots(4, len(columns), squeeze=False, sharex=True)
    met: Counter[str] = Counter()
    for (column, label), outcome in outcomes.items():
        ax = axes[:, columns.index(column)]
        color = "black" if label == "MAML" else f"C{met[column]}"  # the same in all rows
        met[column] += 1
        style = {"label": label, "color": color}
        iterations = range(1, len(outcome["losses"]) + 1)
        for row, name in ((0, "inner_lr"), (1, "outer_lr")):
            course = [rates.get(name, outcome[name]) for rates in outcome["rates"]]
            ax[row].plot(iterations, course, **style)
        losses, window = outcome["losses"], 10
        if len(losses) >= window:  # of a run that broke before, there is no running mean
            smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
            ax[2].plot(range(window, len(losses) + 1), smooth, **style)
        if outcome["validation"]:
            ax[3].plot(*zip(*outcome["validation"], strict=True), **style)
    for j, column in enumerate(columns):
        axes[0, j].set_title(column)
        axes[0, j].legend(fontsize=8)
        axes[3, j].set_xlabel("iteration")
    names = (
        "alpha, inner rate",
        "beta, outer rate",
        "training loss, mean of 10",
        "validation loss",
    )
    for i, name in enumerate(names):
        axes[i, 0].set_ylabel(name)
        for ax in axes[i]:
            ax.grid(alpha=0.3)
    save_figure(figure, path)
