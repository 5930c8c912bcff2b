"""How the time of one meta-gradient grows with the tasks and with the side of an image.

    python benchmarks/growth.py [--out results/benchmarks/growth.json]

Second order, Conv4-64 on 5-way 1-shot tasks of grey images, 5 inner steps: 2 to 32 tasks of 28x28
pixels, and 2 tasks of 28x28 to 84x84. Growth with the steps is in meta_gradient.py, whose processes
and checks these are; that of memory in memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fewstep.training.environment import command_line, environment
from fewstep.training.run_folder import write_json
from meta_gradient import Turns, rows_of, say_missing
from options import options_of
from peers import Case
from tables import Panel, plot, table_of


@dataclass(frozen=True)
class Sizes:
    """What to differentiate."""

    tasks: tuple[int, ...] = (2, 8, 32)
    """Tasks of 28x28 pixels."""
    pixels: tuple[int, ...] = (28, 56, 84)
    """Sides of an image, in `tasks[0]` tasks."""
    steps: int = 5
    """Inner steps."""

    def cases(self, device: str) -> list[Case]:
        """Return those of more and more tasks, then those of larger and larger images."""
        first = Case("", self.steps, 2, tasks=self.tasks[0], device=device)
        larger = [replace(first, size=side) for side in self.pixels if side != first.size]
        return [replace(first, tasks=tasks) for tasks in self.tasks] + larger


@dataclass(frozen=True)
class Options(Turns, Sizes):
    """Compare how the time of one meta-gradient grows with the peers'."""

    out: Path | None = None
    """JSON file for the numbers, a figure beside it."""


def main() -> None:
    """Measure every case, print both tables, and draw them."""
    options = options_of(Options)
    rows: list[dict[str, Any]] = []
    for case in options.cases(options.device):
        about = {"tasks": case.tasks, "pixels": case.size}
        rows += [about | row for row in rows_of([case], options)]
    panels = panels_of(rows)
    name = f"Conv4-64, 5-way 1-shot, {options.steps} steps"
    for panel in panels:
        Console(width=220).print(table_of(panel.rows, name, panel.by))
    if options.out is not None:
        about = environment(command_line(), options.device)
        write_json(options.out, {"case": name, "environment": about, "rows": rows})
        plot(panels, "median_s", "seconds", options.out.with_suffix(".png"))
    say_missing()


def panels_of(rows: list[dict[str, Any]]) -> list[Panel]:
    """Return a panel against the tasks and one against the side of an image."""
    side, tasks = (min(row[key] for row in rows) for key in ("pixels", "tasks"))
    by_tasks = [row for row in rows if row["pixels"] == side]
    by_pixels = [row for row in rows if row["tasks"] == tasks]
    return [
        Panel(f"{side}x{side} pixels", by_tasks, "tasks", "tasks"),
        Panel(f"{tasks} tasks", by_pixels, "pixels", "side of an image in pixels"),
    ]


if __name__ == "__main__":
    main()
