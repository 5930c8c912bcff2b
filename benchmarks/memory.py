"""Peak memory of one second-order meta-gradient against inner steps, fewstep and its peers.

    python benchmarks/memory.py [--out results/benchmarks/memory.json]

Memory is what a process needs at most during its first gradient, beyond what it needs before. It
does not depend on how busy the machine is, so that this is measured apart from time; that all ways
give the same is checked by meta_gradient.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from fewstep.training.environment import command_line, environment
from fewstep.training.run_folder import write_json
from meta_gradient import CASES, Name, Process
from options import options_of
from peers import WAYS, Case


@dataclass(frozen=True)
class Options:
    """Compare the memory of a meta-gradient with the peers'."""

    cases: tuple[Name, ...] = ("omniglot-5-way", "omniglot-20-way", "mini-imagenet-5-way")
    """What to differentiate."""
    steps: tuple[int, ...] = (1, 20)
    """Inner steps."""
    ways: tuple[str, ...] = (
        "fewstep, least memory", "fewstep, checkpoints", "plain loop", "higher", "torchopt",
    )  # fmt: skip
    """Which ways."""
    out: Path | None = None
    """JSON file for the numbers."""


def main() -> None:
    """Measure every case and print a table of each."""
    options = options_of(Options)
    ways = [way for way in options.ways if WAYS[way].is_installed()]
    rows: list[dict[str, Any]] = []
    for name in options.cases:
        columns = [f"{k} step{'s' * (k > 1)}: MiB (of files)" for k in options.steps]
        table = Table("way", *columns, title=CASES[name].name)
        for way in track(ways, name, transient=True):
            cells = []
            for num_steps in options.steps:
                found = peak(way, replace(CASES[name], num_steps=num_steps, order=2))
                cells.append(f"{found['mib']:.0f} ({found['mib_of_files']:.0f})")
                rows.append({"case": name, "way": way, "steps": num_steps} | found)
            table.add_row(way, *cells)
        Console().print(table)
    if options.out is not None:
        write_json(options.out, {"environment": environment(command_line(), "cpu"), "rows": rows})


def peak(way: str, case: Case) -> dict[str, float]:
    """Return the memory of the first gradient of a new process, in MiB.

    Raises:
        SystemExit: it failed.
    """
    process = Process(case, way, threads=None)
    found: dict[str, float] | None = process.ask("first")
    process.end()
    if found is None:
        raise SystemExit(f"{way} failed: {process.failed}")
    return {key: found[key] for key in ("mib", "mib_of_files")}


if __name__ == "__main__":
    main()
