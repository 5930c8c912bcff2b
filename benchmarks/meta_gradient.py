"""One meta-gradient, fewstep against its peers: time and peak memory.

    python benchmarks/meta_gradient.py [--out results/benchmarks/meta_gradient.json]

Each way has a process of its own, on the same tasks and parameters. First all must give the same
meta-gradient in float64, to 1e-9 of its largest entry. Then they take turns, so that a slow moment
of the machine meets all; the first turn is left out (JAX compiles in it). Memory is what a process
needs at most, beyond what it needs before the first gradient. Peers that are not installed
(`pip install -e ".[benchmark]"`) are named and left out.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fewstep.training.allocator import keep_freed_memory
from fewstep.training.run_folder import command_line, environment, write_json
from peers import WAYS, Case

Order = Literal[1, 2]
Name = Literal[
    "omniglot-5-way", "omniglot-5-way-32-tasks", "omniglot-20-way", "mini-imagenet-5-way",
    "sinusoid",
]  # fmt: skip
CASES: dict[Name, Case] = {
    "omniglot-5-way": Case("Omniglot 5-way 1-shot, Conv4-64, 8 tasks", 0, 2, tasks=8),
    "omniglot-5-way-32-tasks": Case("Omniglot 5-way 1-shot, Conv4-64, 32 tasks", 0, 2, tasks=32),
    "omniglot-20-way": Case("Omniglot 20-way 1-shot, Conv4-64, 8 tasks", 0, 2, tasks=8, ways=20),
    "mini-imagenet-5-way": Case(
        "mini-ImageNet 5-way 1-shot, Conv4-32, 4 tasks", 0, 2, tasks=4, channels=3, size=84,
        filters=32, chunk_size=4,
    ),
    "sinusoid": Case("sinusoid network, 25 tasks", 0, 2, tasks=25, size=0, chunk_size=25),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Compare one meta-gradient with the peers'."""

    cases: tuple[str, ...] = (
        "omniglot-5-way",
        "omniglot-20-way",
        "mini-imagenet-5-way",
        "sinusoid",
    )
    """Which of omniglot-5-way, omniglot-5-way-32-tasks, omniglot-20-way, mini-imagenet-5-way and
    sinusoid."""
    steps: tuple[int, ...] = (1, 5, 20)
    """Inner steps."""
    orders: tuple[Order, ...] = (2, 1)
    """Derivative orders."""
    ways: tuple[str, ...] = tuple(WAYS)
    """Which ways; "plain loop" is what the others are compared with."""
    repeats: int = 7
    """Measured turns."""
    threads: int | None = None
    """Threads of PyTorch; its own choice if not given."""
    device: str = "cpu"
    """"cpu" or "cuda"; JAX takes its own choice."""
    out: Path | None = None
    """JSON file for the numbers."""


def serve(case: Case, way: str, threads: int | None, pipe: Connection) -> None:
    """Compute gradients on request, in a process of its own."""
    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        gradient = WAYS[way].build(case, torch.float32)
        before = _peak(case.device)
        gradient()
        while True:
            match pipe.recv():
                case "time":
                    started = time.perf_counter()
                    gradient()
                    if torch.cuda.is_initialized():
                        torch.cuda.synchronize()
                    pipe.send(time.perf_counter() - started)
                case "memory":
                    pipe.send(_peak(case.device) - before)
                case "exact":
                    small = replace(case, tasks=2, chunk_size=2)
                    exact = WAYS[way].build(small, torch.float64)()
                    pipe.send(torch.cat([g.flatten() for g in exact]))
                case "end":
                    return
    except Exception as error:  # the row says so, and the others go on
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0]}")


def _peak(device: str) -> float:
    """Return the most memory this process had so far, in MiB: its own, or on the GPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(case: Case, options: Options) -> dict[str, dict[str, Any]]:
    """Return seconds, MiB and the difference from the plain loop, of every way that applies."""
    processes = multiprocessing.get_context("spawn")
    ways = [w for w in options.ways if WAYS[w].applies(case) and WAYS[w].is_installed()]
    pipes, found = {}, {way: {"seconds": []} for way in ways}
    failed: dict[str, str] = {}

    def ask(way: str, question: str) -> Any:
        if way in failed:
            return None
        try:
            pipes[way].send(question)
            answer = pipes[way].recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            answer = "the process was killed"
        if isinstance(answer, str):
            failed[way] = answer
            return None
        return answer

    for way in ways:
        pipes[way], theirs = processes.Pipe()
        processes.Process(
            target=serve, args=(case, way, options.threads, theirs), daemon=True
        ).start()
        theirs.close()
        found[way]["mib"] = ask(way, "memory")
    for _ in range(options.repeats):
        for way in ways:
            if (seconds := ask(way, "time")) is not None:
                found[way]["seconds"].append(seconds)
    exact = {way: ask(way, "exact") for way in ways}
    reference = exact.get("plain loop")
    for way in ways:
        if reference is not None and exact[way] is not None:
            difference = float((exact[way] - reference).abs().max() / reference.abs().max())
            assert difference < 1e-9, f"{way} differs from the plain loop by {difference:.1e}"
            found[way]["difference"] = difference
        if way in failed:
            found[way]["failed"] = failed[way]
        else:
            pipes[way].send("end")
    return found


def main() -> None:
    """Measure every case and print a table."""
    options = tyro.cli(Options)
    rows, console = [], Console(width=140)
    for name in options.cases:
        for order in options.orders:
            table = Table("way", title=f"{CASES[name].name}, order {order}")
            for k in options.steps:
                for column in (f"{k} steps: s", "min-max", "x", "MiB"):
                    table.add_column(column, justify="right")
            lines: dict[str, list[str]] = {way: [way] for way in options.ways}
            for k in options.steps:
                case = replace(CASES[name], num_steps=k, order=order, device=options.device)
                found = measure(case, options)
                base = statistics.median(found["fewstep"]["seconds"])
                for way, line in lines.items():
                    row = found.get(way)
                    if row is None or "failed" in row:
                        line += ["-" if row is None else "failed", "", "", ""]
                    else:
                        s = row["seconds"]
                        median = statistics.median(s)
                        row |= {"median_s": median, "ratio": median / base}
                        line += [
                            f"{median:.4f}", f"{min(s):.4f}-{max(s):.4f}", f"{median / base:.2f}",
                            f"{row['mib']:.0f}",
                        ]  # fmt: skip
                    if row is not None:
                        rows.append(
                            {"case": case.name, "steps": k, "order": order, "way": way} | row
                        )
            for line in lines.values():
                if any(cell not in ("-", "") for cell in line[1:]):
                    table.add_row(*line)
            console.print(table)
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                about = environment(command_line(), options.device)
                write_json(options.out, {"rows": rows, "environment": about})
    missing = sorted({w.package for w in WAYS.values() if not w.is_installed()})
    if missing:
        print(f"not installed, so not measured: {', '.join(missing)}")


if __name__ == "__main__":
    main()
