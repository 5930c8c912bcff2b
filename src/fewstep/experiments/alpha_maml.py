"""Alpha MAML's figures: how rates move, and from which initial rates training gets anywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from fewstep.core.errors import InputError
from fewstep.data.omniglot import Omniglot
from fewstep.experiments.pool import each
from fewstep.report.figure import save_figure
from fewstep.training.build import Problem, build_learner, build_problem, resolve_device
from fewstep.training.config import (
    AlgorithmOptions,
    ClassificationOptions,
    Conv4Options,
    RunConfig,
)
from fewstep.training.files import write_atomically
from fewstep.training.presets import preset
from fewstep.training.run_folder import command_line, environment, write_json


@dataclass(frozen=True)
class Setting:
    """What the poster leaves open, chosen by us: one inner step, mean cross-entropy, SGD outside.

    The meta-loss is the mean over tasks.
    """

    dataset: Literal["omniglot", "glyphs"] = "omniglot"
    """Where the tasks come from."""
    ways: int = 20
    """Classes of a task; chance has a loss of log(ways)."""
    shots: int = 1
    """Support images of each class."""
    tasks: int = 2
    """Tasks of an iteration."""
    filters: int = 32
    """Channels of every block of the network."""
    seed: int = 0
    """Seed of the initial parameters and of the episodes, the same for all."""
    device: str = "cpu"
    """"cpu", "cuda", ...; "auto" takes a GPU where there is one."""

    def config(
        self, alpha: float, beta: float, eta_alpha: float | None, eta_beta: float | None
    ) -> RunConfig:
        """Return a run's settings; without both hyper-rates it is MAML."""
        is_alpha_maml = eta_alpha is not None or eta_beta is not None
        return replace(
            preset(self.dataset),
            recipe="alpha-maml" if is_alpha_maml else "maml",
            data=Omniglot() if self.dataset == "omniglot" else preset(self.dataset).data,
            episodes=ClassificationOptions(
                ways=self.ways, shots=self.shots, queries=1, eval_queries=1
            ),
            model=Conv4Options(filters=self.filters),
            algorithm=AlgorithmOptions(
                num_steps=1,
                eval_steps=1,
                inner_lr=alpha,
                learned_rates="no" if eta_alpha is None else "one",
                inner_hyper_lr=eta_alpha,
                outer="sgd",
                outer_lr=beta,
                outer_hyper_lr=eta_beta,
            ),
            tasks=self.tasks,
            seed=self.seed,
            device=self.device,
        )


@lru_cache(maxsize=1)
def _problem(config: RunConfig) -> Problem:
    return build_problem(config, config.device)


def train(
    path: Path, config: RunConfig, threshold: float, window: int, val_every: int
) -> dict[str, Any]:
    """Train until the running mean of the loss is below a threshold, or to the last iteration.

    Args:
        path: JSON file of the outcome; where it exists it is read, and nothing trained.
        config: Settings.
        threshold: Loss to reach; minus infinity trains to the end.
        window: Iterations of the running mean.
        val_every: Iterations between validations; 0 for none.

    Returns:
        Losses, rates, hypergradients, validation losses, the iteration at which the threshold was
        reached, and the one at which training broke off for a number that was not finite.
    """
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    shared = replace(config, algorithm=AlgorithmOptions(), recipe="maml")  # one problem for all
    problem = _problem(shared)
    learner = build_learner(config, problem, config.device)
    losses: list[float] = []
    rates: list[dict[str, float]] = []
    validation: list[tuple[int, float]] = []
    reached = broken = None
    for iteration in range(1, config.iterations + 1):
        try:
            metrics = learner.step(problem.episodes["train"].batch(
                (iteration - 1) * config.tasks, config.tasks
            ))  # fmt: skip
        except FloatingPointError:
            broken = iteration
            break
        losses.append(metrics.loss.item())
        rates.append({name: rate.item() for name, rate in learner.rates().items()})
        if iteration >= window and sum(losses[-window:]) / window < threshold:
            reached = iteration
            break
        if val_every and (iteration % val_every == 0 or iteration == 1):
            scores = learner.evaluate(problem.episodes["val"], config.val_tasks)
            validation.append((iteration, float(scores.loss[:, -1].mean())))
    outcome = {
        "inner_lr": config.algorithm.inner_lr,
        "outer_lr": config.algorithm.outer_lr,
        "inner_hyper_lr": config.algorithm.inner_hyper_lr,
        "outer_hyper_lr": config.algorithm.outer_hyper_lr,
        "reached": reached,
        "broken": broken,
        "losses": losses,
        "rates": rates,
        "validation": validation,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, outcome)
    return outcome


@dataclass(frozen=True)
class AlphaSensitivity:
    """Heat maps of iterations to a training loss over a grid of initial rates.

    A cell is the first iteration at which the mean training loss of the last 10 iterations is
    below the threshold; blank where that does not happen.
    """

    setting: Setting = field(default_factory=Setting)
    """What is learned."""
    inner_lrs: tuple[float, ...] = (0.001, 0.00464, 0.0215, 0.1, 0.464, 2.15, 10.0)
    """Initial alpha."""
    outer_lrs: tuple[float, ...] = (0.001, 0.00464, 0.0215, 0.1, 0.464, 2.15, 10.0)
    """Initial beta."""
    hyper_lrs: tuple[str, ...] = ("0.01,0.01", "0.1,0.01", "0.01,0.1", "0.1,0.1")
    """Pairs eta_alpha,eta_beta of Alpha MAML; 0 leaves a rate as it is."""
    guarded: bool = False
    """Also run Alpha MAML with guards, at the first pair."""
    iterations: int = 500
    """Most iterations of a cell."""
    threshold: float = 2.5
    """Training loss to reach."""
    workers: int = 1
    """Cells at once, a single-threaded process each."""
    ray: bool = False
    """Send the cells to a Ray cluster instead."""
    out: Path = Path("runs/alpha-sensitivity")
    """Folder of the outcomes, the table and the figure; a second call goes on where one stopped."""

    def run(self, console: Console) -> None:
        """Train every cell that is not trained yet; write the figure and the table."""
        methods = {"MAML": (None, None, False)} | {
            f"Alpha MAML, eta_alpha={a:g}, eta_beta={b:g}": (a, b, False)
            for a, b in map(_pair, self.hyper_lrs)
        }
        if self.guarded:
            a, b = _pair(self.hyper_lrs[0])
            methods[f"Alpha MAML, guarded, eta_alpha={a:g}, eta_beta={b:g}"] = (a, b, True)
        device = resolve_device(self.setting.device)
        jobs = {}
        for name, (eta_alpha, eta_beta, guarded) in methods.items():
            for alpha in self.inner_lrs:
                for beta in self.outer_lrs:
                    config = self.setting.config(alpha, beta, eta_alpha, eta_beta)
                    config = replace(
                        config,
                        iterations=self.iterations,
                        device=device,
                        algorithm=replace(
                            config.algorithm,
                            hyper_step="multiplicative" if guarded else "additive",
                        ),
                    )
                    file = f"{alpha:g}-{beta:g}-{eta_alpha}-{eta_beta}{'-guarded' * guarded}.json"
                    path = self.out / "cells" / file
                    jobs[name, alpha, beta] = (path, config, self.threshold, 10, 0)
        results = each(train, jobs, workers=self.workers, ray=self.ray, console=console)
        reached = {key: outcome["reached"] for key, outcome in results}
        grids = {
            name: [[reached[name, a, b] for b in self.outer_lrs] for a in self.inner_lrs]
            for name in methods
        }
        shares = {name: _compare(grid, grids["MAML"]) for name, grid in grids.items()}
        summary = {
            "command": command_line(),
            "environment": environment(command_line(), device),
            "inner_lrs": self.inner_lrs,
            "outer_lrs": self.outer_lrs,
            "iterations_to_threshold": grids,
            "shares": shares,
        }
        write_json(self.out / "grid.json", summary)
        table = _markdown(shares, self)
        write_atomically(self.out / "table.md", table.encode())
        plot_grids(grids, self.inner_lrs, self.outer_lrs, self.iterations, self.out / "grid.png")
        console.print(table, highlight=False, markup=False)
        console.print(f"wrote table.md, grid.json and grid.png in {self.out}", highlight=False)


Grid = Sequence[Sequence[int | None]]


def _pair(text: str) -> tuple[float, float]:
    try:
        eta_alpha, eta_beta = map(float, text.split(","))
    except ValueError:
        raise InputError(
            f"hyper_lrs {text!r} must be two numbers, eta_alpha,eta_beta, such as 0.01,0.1"
        ) from None
    return eta_alpha, eta_beta


def _compare(grid: Grid, maml: Grid) -> dict[str, float]:
    """Count cells that reach the threshold, and those faster or slower than MAML's."""
    pairs = [
        (math.inf if own is None else own, math.inf if base is None else base)
        for row, base_row in zip(grid, maml, strict=True)
        for own, base in zip(row, base_row, strict=True)
    ]
    return {
        "cells": len(pairs),
        "reached": sum(own < math.inf for own, _ in pairs),
        "faster": sum(own < base for own, base in pairs),
        "equal": sum(own == base for own, base in pairs),
        "slower": sum(own > base for own, base in pairs),
    }


def _markdown(shares: Mapping[str, Mapping[str, float]], options: AlphaSensitivity) -> str:
    s = options.setting
    lines = [
        f"{s.dataset} {s.ways}-way {s.shots}-shot, Conv4-{s.filters}, 1 step, SGD outside, mean",
        f"over {s.tasks} tasks; cells that reach a training loss of {options.threshold:g} within",
        f"{options.iterations} iterations, and iterations compared with MAML from the same rates.",
        "",
        "| method | reached | faster than MAML | equal | slower |",
        "|---|---|---|---|---|",
    ]
    for name, n in shares.items():
        reached = f"{n['reached']} of {n['cells']} ({100 * n['reached'] / n['cells']:.0f}%)"
        lines.append(f"| {name} | {reached} | {n['faster']} | {n['equal']} | {n['slower']} |")
    return "\n".join(lines) + "\n"


def plot_grids(
    grids: Mapping[str, Grid],
    inner_lrs: Sequence[float],
    outer_lrs: Sequence[float],
    iterations: int,
    path: Path,
) -> None:
    """Draw heat maps of iterations over initial rates; blank where the threshold is not reached.

    Args:
        grids: By method; a row for each inner rate, a column for each outer rate.
        inner_lrs: Initial alpha.
        outer_lrs: Initial beta.
        iterations: End of the colour scale.
        path: PNG file to write.
    """
    columns = min(3, len(grids))
    rows = -(-len(grids) // columns)
    figure = Figure(figsize=(4.6 * columns, 4.2 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).flatten()
    for ax in axes[len(grids) :]:
        ax.set_axis_off()
    for ax, (name, grid) in zip(axes, grids.items(), strict=False):
        values = np.array([[np.nan if v is None else v for v in row] for row in grid], dtype=float)
        image = ax.imshow(values, origin="lower", vmin=0, vmax=iterations, cmap="viridis_r")
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = "white" if value > iterations / 2 else "black"
                ax.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=7)
        ax.set_xticks(range(len(outer_lrs)), [f"{b:.2g}" for b in outer_lrs], rotation=45)
        ax.set_yticks(range(len(inner_lrs)), [f"{a:.2g}" for a in inner_lrs])
        ax.set(xlabel="initial beta (outer rate)", ylabel="initial alpha (inner rate)")
        ax.set_title(name.replace(", eta_alpha", "\neta_alpha"), fontsize=10)
    figure.colorbar(image, ax=axes.tolist(), label="iterations to the threshold")
    save_figure(figure, path)


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
    hyper_lrs: tuple[float, ...] = (0.001, 0.01, 0.1)
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
        middle = self.hyper_lrs[len(self.hyper_lrs) // 2]
        maml = ("MAML", None, None)
        columns = {
            "tuned": (self.tuned, [maml, ("Alpha MAML", middle, middle)]),
            "untuned, eta_beta varies": (
                self.untuned,
                [maml, *((f"eta_beta={eta:g}", middle, eta) for eta in self.hyper_lrs)],
            ),
            "untuned, eta_alpha varies": (
                self.untuned,
                [maml, *((f"eta_alpha={eta:g}", eta, middle) for eta in self.hyper_lrs)],
            ),
        }
        device = resolve_device(self.setting.device)
        jobs = {}
        for column, ((alpha, beta), curves) in columns.items():
            for label, eta_alpha, eta_beta in curves:
                config = replace(
                    self.setting.config(alpha, beta, eta_alpha, eta_beta),
                    iterations=self.iterations,
                    val_tasks=self.val_tasks,
                    device=device,
                )
                path = self.out / "curves" / f"{alpha:g}-{beta:g}-{eta_alpha}-{eta_beta}.json"
                jobs[column, label] = (path, config, -math.inf, 1, self.val_every)
        outcomes = dict(each(train, jobs, workers=self.workers, ray=self.ray, console=console))
        write_json(
            self.out / "summary.json",
            {
                "command": command_line(),
                "environment": environment(command_line(), device),
                "curves": {
                    f"{column}: {label}": _summary(o) for (column, label), o in outcomes.items()
                },
            },
        )
        plot_convergence(outcomes, self.out / "convergence.png")
        console.print(f"wrote summary.json and convergence.png in {self.out}", highlight=False)


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
    figure = Figure(figsize=(4.4 * len(columns), 10), layout="constrained")
    axes = figure.subplots(4, len(columns), squeeze=False, sharex=True)
    for (column, label), outcome in outcomes.items():
        ax = axes[:, columns.index(column)]
        style = {"label": label, "color": "black" if label == "MAML" else None}
        iterations = range(1, len(outcome["losses"]) + 1)
        for row, name in ((0, "inner_lr"), (1, "outer_lr")):
            course = [rates.get(name, outcome[name]) for rates in outcome["rates"]]
            ax[row].plot(iterations, course, **style)
        window = 10
        smooth = np.convolve(outcome["losses"], np.ones(window) / window, mode="valid")
        ax[2].plot(range(window, window + len(smooth)), smooth, **style)
        if outcome["validation"]:
            ax[3].plot(*zip(*outcome["validation"], strict=True), **style)
    for j, column in enumerate(columns):
        axes[0, j].set_title(column)
        axes[0, j].legend(fontsize=8)
        axes[3, j].set_xlabel("iteration")
    names = ("alpha, inner rate", "beta, outer rate", "training loss", "validation loss")
    for i, name in enumerate(names):
        axes[i, 0].set_ylabel(name)
        for ax in axes[i]:
            ax.grid(alpha=0.3)
    save_figure(figure, path)
