"""How time and memory of one meta-gradient grow with the tasks and with the side of an image.

    python benchmarks/growth.py [--out results/benchmarks/growth.json]

Second order, Conv4-64 on 5-way 1-shot tasks of grey images, 5 inner steps: 2 to 32 tasks of 28x28
pixels, and 2 tasks of 28x28 to 84x84. Growth with the steps is in meta_gradient.py, whose processes
and checks these are.
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
class Options(Turns):
    """Compare how one meta-gradient grows with the peers'."""

    tasks: tuple[int, ...] = (2, 8, 32)
    """Tasks of 28x28 pixels."""
    pixels: tuple[int, ...] = (28, 56, 84)
    """Sides of an image, in `tasks[0]` tasks."""
    steps: int = 5
    """Inner steps."""
    out: Path | None = None
    """JSON file for the numbers, a figure beside it."""


def main() -> None:
    """Measure every case, print both tables, and draw them."""
    options = options_of(Options)
    first = Case("", options.steps, 2, tasks=options.tasks[0], device=options.device)
    larger = [replace(first, size=side) for side in options.pixels if side != first.size]
    cases = [replace(first, tasks=tasks) for tasks in options.tasks] + larger
    rows: list[dict[str, Any]] = []
    for case in cases:
        about = {"tasks": case.tasks, "pixels": case.size}
        rows += [about | row for row in rows_of([case], options)]
    by_tasks = [row for row in rows if row["pixels"] == first.size]
    by_pixels = [row for row in rows if row["tasks"] == first.tasks]
    name = f"Conv4-{first.filters}, {first.ways}-way 1-shot, {options.steps} steps"
    for found, by in ((by_tasks, "tasks"), (by_pixels, "pixels")):
        Console(width=220).print(table_of(found, name, by))
    if options.out is not None:
        about = environment(command_line(), options.device)
        write_json(options.out, {"case": name, "environment": about, "rows": rows})
        panels = [
            Panel(f"{first.size}x{first.size} pixels", by_tasks, "tasks", "tasks"),
            Panel(f"{first.tasks} tasks", by_pixels, "pixels", "side of an image in pixels"),
        ]
        plot(panels, options.out.with_suffix(".png"))
    say_missing()


if __name__ == "__main__":
    main()
