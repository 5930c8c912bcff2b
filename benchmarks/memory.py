"""Peak memory of one second-order meta-gradient, fewstep and its peers.

    python benchmarks/memory.py [--out results/benchmarks/memory.json]

Against inner steps, and for 5 of them against tasks and the side of an image. `mib` is what a new
process holds at most during its second gradient, beyond what it held before the first: of what a
compiler or recorder needs once, only what it keeps. `first_mib` is the same of the first gradient,
with all that they need. `mib_of_files` are pages of libraries' files in `mib`, which the first
operation of a kind loads, whatever the size of its tensors. Memory does not depend on how busy the
machine is, so that it is measured apart from time; that all ways give the same gradient is checked
by meta_gradient.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fewstep.training.environment import command_line, environment
from fewstep.training.run_folder import write_json
from growth import Sizes
from growth import panels_of as panels_of_growth
from meta_gradient import CASES, Name, Process, say_missing
from options import options_of
from peers import WAYS, Case
from tables import Panel, plot


@dataclass(frozen=True)
class Options:
    """Compare the memory of a meta-gradient with the peers'."""

    cases: tuple[Name, ...] = (
        "omniglot-5-way", "omniglot-20-way", "mini-imagenet-5-way", "sinusoid"
    )  # fmt: skip
    """What to differentiate."""
    steps: tuple[int, ...] = (1, 5, 20)
    """Inner steps."""
    growth: Sizes = field(default_factory=Sizes)
    """More tasks and larger images."""
    ways: tuple[str, ...] = (
        "fewstep, replay", "fewstep, PyTorch's layers", "fewstep, checkpoints",
        "fewstep, least memory", "fewstep, compile", "plain loop", "higher", "torchopt",
        "parallel-metalearn", "JAX, matmul",
    )  # fmt: skip
    """Which ways."""
    threads: int | None = None
    """Threads of PyTorch; its own choice if not given."""
    device: str = "cpu"
    """"cpu" or "cuda"; JAX takes its own choice."""
    out: Path | None = None
    """JSON file for the numbers, a figure beside it; rows of an earlier call of the same commit
    stay."""


def main() -> None:
    """Measure every case, print the rows, and draw how they grow."""
    options = options_of(Options)
    about = environment(command_line(), options.device)
    rows: list[dict[str, Any]] = []
    if options.out is not None and options.out.exists():
        earlier = json.loads(options.out.read_text())
        if earlier["environment"]["commit"] == about["commit"]:
            rows = earlier["rows"]
    for case in cases_of(options):
        for way in options.ways:
            row = {
                "case": case.name, "tasks": case.tasks, "ways": case.ways, "pixels": case.size,
                "filters": case.filters, "steps": case.num_steps, "way": way,
            }  # fmt: skip
            is_there = any(row.items() <= found.items() for found in rows)
            if is_there or not WAYS[way].is_installed() or not WAYS[way].applies(case):
                continue
            rows.append(row | peak(way, case, options.threads))
            if options.out is not None:
                write_json(options.out, {"environment": about, "rows": rows})
    Console(width=160).print(table_of(rows))
    if options.out is not None:
        plot(panels_of(rows), "mib", "MiB", options.out.with_suffix(".png"))
    say_missing()


def cases_of(options: Options) -> list[Case]:
    """Return every case once: by steps, then those of growth, by the same name if they have one."""
    named = [replace(CASES[n], name=n, order=2, device=options.device) for n in options.cases]
    cases = [replace(case, num_steps=steps) for steps in options.steps for case in named]
    known = {replace(c, name="", num_steps=options.growth.steps): c.name for c in named}
    grown = [replace(c, name=known.get(c, "")) for c in options.growth.cases(options.device)]
    return list(dict.fromkeys(cases + grown))


def peak(way: str, case: Case, threads: int | None = None) -> dict[str, Any]:
    """Return the memory of a gradient of a new process, in MiB, or why it failed."""
    process = Process(case, way, threads)
    found: dict[str, Any] | None = process.ask("memory")
    process.end()
    return {"failed": process.failed} if found is None else found


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Return a table with a line for each row."""
    table = Table("case", "tasks", "pixels", "steps", "way", "MiB", "of files", "first gradient")
    for row in rows:
        about = [str(row[key]) for key in ("case", "tasks", "pixels", "steps", "way")]
        numbers = [f"{row[key]:.0f}" for key in ("mib", "mib_of_files", "first_mib") if key in row]
        table.add_row(*about, *(numbers or ["failed"]))
    return table


def panels_of(rows: list[dict[str, Any]]) -> list[Panel]:
    """Return a panel for each case against its steps, and those of growth."""
    names = dict.fromkeys(row["case"] for row in rows if row["case"])
    by_steps = [
        Panel(name, [row for row in rows if row["case"] == name], "steps", "inner steps")
        for name in names
    ]
    grown = [row for row in rows if row["ways"] == 5 and row["filters"] == 64 and row["pixels"]]
    steps = {row["steps"] for row in rows if not row["case"]}
    return by_steps + panels_of_growth([row for row in grown if row["steps"] in steps])


if __name__ == "__main__":
    main()
