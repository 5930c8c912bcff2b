"""From which initial rates MAML and Alpha MAML get anywhere, and how fast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from rich.console import Console

from fewstep.core.errors import InputError, check_some
from fewstep.experiments.alpha_runs import Setting, check_all, numeral, train
from fewstep.experiments.pool import each
from fewstep.experiments.write_up import write_up
from fewstep.report.figure import new_figure, save_figure
from fewstep.training.build import resolve_device
from fewstep.training.config import RunConfig

Grid = Sequence[Sequence[int | None]]
_Method = tuple[float | None, float | None, bool]  # eta_alpha, eta_beta, with guards


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
    hyper_lrs: tuple[str, ...] = ("0.01,0.01", "0.001,0.01", "0.01,0.001")
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
        for name in ("inner_lrs", "outer_lrs", "hyper_lrs"):
            check_some(name, getattr(self, name))
        if not math.isfinite(self.threshold):
            raise InputError(f"threshold={self.threshold} must be a finite number, such as 2.5")
        device = resolve_device(self.setting.device)
        methods = self._methods()
        jobs = self._cells(methods, device)
        check_all(config for _, config in jobs.values())
        until = partial(train, threshold=self.threshold, window=10)
        results = each(until, jobs, workers=self.workers, ray=self.ray, console=console)
        reached = {key: outcome["reached"] for key, outcome in results}
        grids = {
            name: [[reached[name, a, b] for b in self.outer_lrs] for a in self.inner_lrs]
            for name in methods
        }
        shares = {name: _compare(grid, grids["MAML"]) for name, grid in grids.items()}
        summary = {
            "inner_lrs": self.inner_lrs,
            "outer_lrs": self.outer_lrs,
            "iterations_to_threshold": grids,
            "shares": shares,
        }
        plot_grids(grids, self.inner_lrs, self.outer_lrs, self.iterations, self.out / "grid.png")
        table = _markdown(shares, self)
        numbers = "grid.json", summary
        write_up(self.out, device, console, numbers, table=table, pictures=["grid.png"])

    def _methods(self) -> dict[str, _Method]:
        methods: dict[str, _Method] = {"MAML": (None, None, False)}
        for a, b in map(_pair, self.hyper_lrs):
            methods[f"Alpha MAML, {_named(a, b)}"] = (a, b, False)
        if self.guarded:
            a, b = _pair(self.hyper_lrs[0])
            methods[f"Alpha MAML, guarded, {_named(a, b)}"] = (a, b, True)
        return methods

    def _cells(
        self, methods: Mapping[str, _Method], device: str
    ) -> dict[tuple[str, float, float], tuple[Path, RunConfig]]:
        """Return file and settings of each cell, by method, alpha and beta."""
        cells = {}
        for name, (eta_alpha, eta_beta, guarded) in methods.items():
            for alpha, beta in product(self.inner_lrs, self.outer_lrs):
                config = self.setting.config(alpha, beta, eta_alpha, eta_beta)
                config = replace(
                    config,
                    iterations=self.iterations,
                    device=device,
                    algorithm=replace(
                        config.algorithm, hyper_step="multiplicative" if guarded else "additive"
                    ),
                )
                rates = f"{numeral(alpha)}-{numeral(beta)}-{eta_alpha}-{eta_beta}"
                file = f"{rates}{'-guarded' * guarded}.json"
                cells[name, alpha, beta] = (self.out / "cells" / file, config)
        return cells


def _pair(text: str) -> tuple[float, float]:
    try:
        eta_alpha, eta_beta = map(float, text.split(","))
    except ValueError:
        raise InputError(
            f"hyper_lrs {text!r} must be two numbers, eta_alpha,eta_beta, such as 0.01,0.1"
        ) from None
    return eta_alpha, eta_beta


def _named(eta_alpha: float, eta_beta: float) -> str:
    return f"eta_alpha={numeral(eta_alpha)}, eta_beta={numeral(eta_beta)}"


def _compare(grid: Grid, maml: Grid) -> dict[str, float]:
    """Count cells that reach the threshold, and those faster or slower than MAML's, or neither."""
    pairs = [
        (math.inf if own is None else own, math.inf if base is None else base)
        for row, base_row in zip(grid, maml, strict=True)
        for own, base in zip(row, base_row, strict=True)
    ]
    return {
        "cells": len(pairs),
        "reached": sum(own < math.inf for own, _ in pairs),
        "faster": sum(own < base for own, base in pairs),
        "equal": sum(own == base < math.inf for own, base in pairs),
        "slower": sum(own > base for own, base in pairs),
        "neither": sum(own == base == math.inf for own, base in pairs),
    }


def _markdown(shares: Mapping[str, Mapping[str, float]], options: AlphaSensitivity) -> str:
    s = options.setting
    lines = [
        f"{s.dataset} {s.ways}-way {s.shots}-shot, Conv4-{s.filters}, 1 step, SGD outside, mean",
        f"over {s.tasks} tasks; cells that reach a training loss of {options.threshold:g} within",
        f"{options.iterations} iterations, and iterations compared with MAML from the same rates.",
        "",
        "| method | reached | faster than MAML | equal | slower | neither reaches it |",
        "|---|---|---|---|---|---|",
    ]
    for name, n in shares.items():
        reached = f"{n['reached']} of {n['cells']} ({100 * n['reached'] / n['cells']:.0f}%)"
        counts = " | ".join(str(n[key]) for key in ("faster", "equal", "slower", "neither"))
        lines.append(f"| {name} | {reached} | {counts} |")
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
    columns = min(3, math.ceil(math.sqrt(len(grids))))
    rows = -(-len(grids) // columns)
    figure = new_figure(4.6 * columns, 4.2 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes[len(grids) :]:
        ax.set_axis_off()
    for ax, (name, grid) in zip(axes, grids.items(), strict=False):
        values = np.array([[np.nan if v is None else v for v in row] for row in grid], dtype=float)
        image = ax.imshow(values, origin="lower", vmin=0, vmax=iterations, cmap="viridis_r")
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = "white" if value > iterations / 2 else "black"
                ax.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=7)
        ax.set_xticks(range(len(outer_lrs)), [numeral(b) for b in outer_lrs], rotation=45)
        ax.set_yticks(range(len(inner_lrs)), [numeral(a) for a in inner_lrs])
        ax.set(xlabel="initial beta (outer rate)", ylabel="initial alpha (inner rate)")
        ax.set_title(name.replace(", eta_alpha", "\neta_alpha"), fontsize=10)
    figure.colorbar(image, ax=axes.tolist(), label="iterations to the threshold")
    save_figure(figure, path)
