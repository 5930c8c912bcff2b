"""Time and peak memory of an iteration before and after derivative-order annealing's epoch E."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fewstep import DerivativeAnnealing, MetaLearner, TaskBatch, maml_plus_plus
from fewstep.core.allocator import keep_freed_memory
from fewstep.models import Conv4
from fewstep.training.environment import command_line, environment
from fewstep.training.run_folder import write_json
from options import options_of
from peak import Memory


@dataclass(frozen=True)
class Options:
    """Measure MAML++ on random Omniglot-sized tasks; each phase has a process of its own."""

    ways: int = 20
    """Classes of a task."""
    tasks: int = 8
    """Tasks of an iteration."""
    filters: int = 64
    """Channels of every block."""
    repeats: int = 5
    """Iterations to take the median of."""
    out: Path | None = None
    """JSON file to write."""
    phase: int | None = None
    """Measure this derivative order only, in this process."""


def measure(options: Options) -> dict[str, float]:
    """Return the median seconds of an iteration and the peak memory it added, in MiB."""
    assert options.phase is not None
    keep_freed_memory()
    torch.manual_seed(0)
    algorithm = maml_plus_plus(5, num_epochs=100, version="reference_code")
    learner = MetaLearner(
        Conv4(1, options.ways, 28, filters=options.filters, activation="leaky-relu"),
        replace(algorithm, derivative_order=DerivativeAnnealing(50)),
        torch.nn.functional.cross_entropy,
    )
    learner.iteration = {1: 20 * 500, 2: 50 * 500}[options.phase]  # both after multi-step loss
    x = torch.randn(2, options.tasks, options.ways, 1, 28, 28)
    y = torch.arange(options.ways).expand(options.tasks, options.ways)
    batch = TaskBatch(x[0], y, x[1], y)
    seconds: list[float] = []

    def iterate() -> None:
        for _ in range(options.repeats + 1):
            started = time.perf_counter()
            learner.step(batch)
            seconds.append(time.perf_counter() - started)

    peak = Memory().most(iterate)["mib"]
    return {"seconds": statistics.median(seconds[1:]), "peak_mib": peak}


def main() -> None:
    """Measure both phases and print the ratio."""
    options = options_of(Options)
    if options.phase is not None:
        print(json.dumps(measure(options)))
        return
    found = {}
    for order in (1, 2):
        command = [sys.executable, __file__, *sys.argv[1:], "--phase", str(order)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[order] = json.loads(output.splitlines()[-1])
        print(f"order {order}: {found[order]['seconds']:.3f} s, {found[order]['peak_mib']:.0f} MiB")
    ratios = {key: found[2][key] / found[1][key] for key in found[1]}
    print(f"second to first order: {ratios['seconds']:.2f}x time, {ratios['peak_mib']:.2f}x memory")
    if options.out is not None:
        summary = {
            "environment": environment(command_line(), "cpu"),
            "ways": options.ways,
            "tasks": options.tasks,
            "filters": options.filters,
            "first_order": found[1],
            "second_order": found[2],
            "ratios": ratios,
        }
        write_json(options.out, summary)


if __name__ == "__main__":
    main()
