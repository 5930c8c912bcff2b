"""One meta-gradient, fewstep against its peers: time.

    python benchmarks/meta_gradient.py [--out results/benchmarks/meta_gradient.json]

Each way has a process of its own, on the same tasks and parameters. First all must give the same
meta-gradient in float64 on two of the tasks, to 1e-9 of its largest entry. Then they take turns, so
that a slow moment of the machine meets all; the first gradient, in which JAX compiles and replay
records, is told apart. The share is that of the speed of a large product of matrices, which the
convolutions and products of the plain loop would reach in that time. Products are of float32 where
a way says nothing. Peers that are not installed (`pip install -e ".[benchmark]"`) are named and
left out. Memory is measured by memory.py.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch.utils.dlpack import from_dlpack
from torch.utils.flop_counter import FlopCounterMode

from fewstep.core.allocator import keep_freed_memory
from fewstep.core.precision import fp32_products
from fewstep.training.environment import command_line, environment
from fewstep.training.run_folder import write_json
from options import options_of
from peak import Memory
from peers import WAYS, Case, Gradient
from tables import Panel, plot, table_of

Order = Literal[1, 2]
Question = Literal["gradient", "flop", "speed", "memory", "first", "time"]
Name = Literal[
    "omniglot-5-way", "sinusoid", "omniglot-20-way", "mini-imagenet-5-way",
    "omniglot-5-way-32-tasks",
]  # fmt: skip
CASES: dict[Name, Case] = {
    "omniglot-5-way": Case("Omniglot 5-way 1-shot, Conv4-64, 8 tasks", 0, 2, tasks=8),
    "sinusoid": Case("sinusoid network, 25 tasks", 0, 2, tasks=25, size=0, chunk_size=25),
    "omniglot-20-way": Case("Omniglot 20-way 1-shot, Conv4-64, 8 tasks", 0, 2, tasks=8, ways=20),
    "mini-imagenet-5-way": Case(
        "mini-ImageNet 5-way 1-shot, Conv4-32, 4 tasks", 0, 2, tasks=4, channels=3, size=84,
        filters=32, chunk_size=4,
    ),
    "omniglot-5-way-32-tasks": Case("Omniglot 5-way 1-shot, Conv4-64, 32 tasks", 0, 2, tasks=32),
}  # fmt: skip
COMPARED_WITH = ("fewstep", "plain loop")


@dataclass(frozen=True)
class Turns:
    """Who takes turns, and how many."""

    ways: tuple[str, ...] = tuple(WAYS)
    """Which ways; among them "plain loop", whose gradients the others' are compared with, and
    "fewstep", whose times theirs are."""
    repeats: int = 7
    """Measured turns."""
    seconds: float = 20.0
    """A way that has taken as long in a row of the table takes no further turn, after two."""
    threads: int | None = None
    """Threads of PyTorch; its own choice if not given."""
    device: str = "cpu"
    """"cpu" or "cuda"; JAX takes its own choice."""


@dataclass(frozen=True)
class Options(Turns):
    """Compare one meta-gradient with the peers'."""

    cases: tuple[Name, ...] = tuple(CASES)
    """What to differentiate."""
    steps: tuple[int, ...] = (1, 5, 20)
    """Inner steps."""
    orders: tuple[Order, ...] = (2, 1)
    """Derivative orders."""
    out: Path | None = None
    """JSON file for the numbers, a figure beside it; tables of an earlier call stay."""


class Process:
    """A way to compute a case's gradient, in a process of its own."""

    def __init__(self, case: Case, way: str, threads: int | None) -> None:
        self.failed: str | None = None
        processes = multiprocessing.get_context("spawn")
        self._pipe, theirs = processes.Pipe()
        self._process = processes.Process(
            target=serve, args=(case, way, threads, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, question: Question, case: Case | None = None) -> Any:
        """Return the answer; None once anything failed."""
        if self.failed is None:
            try:
                self._pipe.send((question, case))
                answer = self._pipe.recv()
            except (EOFError, BrokenPipeError, ConnectionResetError):
                answer = "the process was killed"
            if not isinstance(answer, str):
                return answer
            self.failed = answer
        return None

    def end(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


def serve(case: Case, way: str, threads: int | None, pipe: Connection) -> None:
    """Answer questions about the gradient."""
    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    # Of itself, PyTorch takes TF32 for convolutions on a GPU.
    with fp32_products("tf32" if WAYS[way].is_tf32 else "float32"):
        _answer(case, way, pipe)


def _answer(case: Case, way: str, pipe: Connection) -> None:
    gradient: Gradient | None = None
    try:
        while True:
            question, other = pipe.recv()
            if question == "flop":
                pipe.send(flop_of(other))
            elif question == "speed":
                pipe.send(flop_per_second(other.device))
            elif question == "gradient":
                exact = WAYS[way].build(other, torch.float64)()
                pipe.send(torch.cat([from_dlpack(g).flatten() for g in exact]))
            elif question == "memory":
                pipe.send(memory_of(case, way))
            elif gradient is None:  # "first"
                gradient = WAYS[way].build(case, torch.float32)
                started = time.perf_counter()
                _finish(gradient)
                pipe.send({"first_s": time.perf_counter() - started})
            else:  # "time"
                pipe.send(turn(gradient))
    except EOFError:
        return
    except Exception as error:  # the row says so, and the others go on
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0]}")


def turn(gradient: Gradient) -> float:
    """Return the seconds of a gradient, of as many as fit into a fifth of a second.

    The first is left out if it takes less than a second: threads of the process before spin for a
    while when they have nothing left to do.
    """
    time.sleep(0.3)
    started = time.perf_counter()
    _finish(gradient)
    if (seconds := time.perf_counter() - started) > 1:
        return seconds
    count, started = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - started < 0.2:
        _finish(gradient)
        count += 1
    return (time.perf_counter() - started) / count


def flop_per_second(device: str) -> float:
    """Return what a large product of float32 matrices reaches, the best of 10."""
    n = 8192 if device.startswith("cuda") else 2048
    a = torch.randn(n, n, device=device)
    return 2 * n**3 / min(turn(lambda: [a @ a]) for _ in range(10))


def flop_of(case: Case) -> int:
    """Return the arithmetic of the plain loop: products, convolutions and their derivatives."""
    one = replace(case, tasks=1, device="cpu")
    gradient = WAYS["plain loop"].build(one, torch.float32)
    with FlopCounterMode(display=False) as counter:
        gradient()
    total: int = counter.get_total_flops()
    return case.tasks * total


def memory_of(case: Case, way: str) -> dict[str, float]:
    """Return the most memory of a gradient, and of the first, which may compile or record."""
    gradient = WAYS[way].build(case, torch.float32)
    memory = Memory(case.device, WAYS[way].package)
    first = memory.most(lambda: _finish(gradient))["mib"]
    return memory.most(lambda: _finish(gradient)) | {"first_mib": first}


def _finish(gradient: Gradient) -> None:
    gradient()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def differences(cases: list[Case], ways: list[str], threads: int | None) -> list[dict[str, float]]:
    """Return how far each way is from the plain loop in each case, in float64 and with 2 tasks.

    What fails is said, and missing in the cases that it was not checked in.

    Raises:
        SystemExit: any is further than 1e-9 of the largest entry, or one of COMPARED_WITH fails.
    """
    small = [replace(case, tasks=2, chunk_size=2) for case in cases]
    exact: dict[str, list[Any]] = {}
    for way in ways:
        process = Process(small[0], way, threads)
        exact[way] = [
            process.ask("gradient", case) if WAYS[way].applies(case) else None for case in small
        ]
        process.end()
        if process.failed is not None:
            told = f"{way} failed in float64: {process.failed}"
            if way in COMPARED_WITH:
                raise SystemExit(told)
            print(told)
    found: list[dict[str, float]] = [{} for _ in cases]
    for i, reference in enumerate(exact.get("plain loop", ())):
        for way in ways:
            if exact[way][i] is not None:
                error = float((exact[way][i] - reference).abs().max() / reference.abs().max())
                if not error < 1e-9:
                    raise SystemExit(
                        f"{way} differs from the plain loop by {error:.1e}: {cases[i]}"
                    )
                found[i][way] = error
    return found


def measure(case: Case, options: Turns) -> dict[str, dict[str, Any]]:
    """Return the seconds of every way that applies."""
    ways = [w for w in options.ways if WAYS[w].applies(case) and WAYS[w].is_installed()]
    processes, found = {}, {}
    for way in ways:
        processes[way] = Process(case, way, options.threads)
        found[way] = {"seconds": []} | (processes[way].ask("first") or {})
    for _ in range(options.repeats):
        for way in ways:
            seconds = found[way]["seconds"]
            wanted = len(seconds) < 2 or sum(seconds) < options.seconds
            if wanted and (s := processes[way].ask("time")) is not None:
                seconds.append(s)
    for way in ways:
        if (reason := processes[way].failed) is not None:
            found[way]["failed"] = reason
        processes[way].end()
    return found


def rows_of(cases: list[Case], options: Turns) -> list[dict[str, Any]]:
    """Return a row for each case and each way, after checking that all agree."""
    if missing := [way for way in COMPARED_WITH if way not in options.ways]:
        raise SystemExit(f"ways lack {', '.join(missing)}, to compare with; add them")
    process = Process(cases[0], "plain loop", options.threads)
    best = process.ask("speed", cases[0])
    flop = [process.ask("flop", case) for case in cases]
    process.end()
    installed = [way for way in options.ways if WAYS[way].is_installed()]
    errors = differences(cases, installed, options.threads)
    rows = []
    for case, error, work in zip(cases, errors, flop, strict=True):
        found = measure(case, replace(options, ways=tuple(error)))
        if (reason := found["fewstep"].get("failed")) is not None:
            raise SystemExit(f"fewstep failed in {case.name}, {case.num_steps} steps: {reason}")
        base = statistics.median(found["fewstep"]["seconds"])
        for way in installed:
            if way not in error and WAYS[way].applies(case):
                found[way] = {"failed": "not checked in float64"}
        for way, row in found.items():
            about = {"steps": case.num_steps, "order": case.order, "way": way}
            if "failed" not in row:
                median = statistics.median(row["seconds"])
                row |= {"median_s": median, "ratio": median / base, "difference": error[way]}
                row |= {"flop": work, "share_of_a_large_product": work / median / best}
            rows.append(about | row)
    return rows


def panels_of(tables: dict[str, dict[str, Any]]) -> list[Panel]:
    """Return a panel for each case, second order against inner steps."""
    rows = [row for table in tables.values() for row in table["rows"] if row["order"] == 2]
    cases = dict.fromkeys(row["case"] for row in rows)
    return [
        Panel(case, [row for row in rows if row["case"] == case], "steps", "inner steps")
        for case in cases
    ]


def main() -> None:
    """Measure every case, print a table of each, and draw how they grow."""
    options = options_of(Options)
    tables: dict[str, dict[str, Any]] = {}
    if options.out is not None and options.out.exists():
        tables = json.loads(options.out.read_text())
    for name in options.cases:
        for order in options.orders:
            case = replace(CASES[name], order=order, device=options.device)
            cases = [replace(case, num_steps=steps) for steps in options.steps]
            rows = [{"case": name} | row for row in rows_of(cases, options)]
            title = f"{CASES[name].name}, order {order}"
            Console(width=220).print(table_of(rows, title))
            if options.out is not None:
                about = environment(command_line(), options.device)
                tables[title] = {"environment": about, "rows": rows}
                write_json(options.out, tables)
                plot(panels_of(tables), "median_s", "seconds", options.out.with_suffix(".png"))
    say_missing()


def say_missing() -> None:
    """Name the packages of ways that could not be measured."""
    missing = sorted({w.package for w in WAYS.values() if not w.is_installed()})
    if missing:
        print(f"not installed, so not measured: {', '.join(missing)}")


if __name__ == "__main__":
    main()
