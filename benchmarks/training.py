"""Around the meta-gradient: seconds to the first iteration, and the share of sampling tasks."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from fewstep.training.allocator import keep_freed_memory
from fewstep.training.build import build_learner, build_problem
from fewstep.training.presets import preset
from fewstep.training.run_folder import command_line, environment, write_json


@dataclass(frozen=True)
class Options:
    """Measure runs with their default settings."""

    datasets: tuple[str, ...] = ("omniglot", "sinusoid")
    """Whose defaults to take; prepared beforehand."""
    recipe: str = "maml++"
    """The method; sinusoid has MAML's."""
    repeats: int = 5
    """Iterations, and starts, to take the median of."""
    out: Path | None = None
    """JSON file to write."""


def seconds_to_first_iteration(dataset: str, recipe: str) -> float:
    """Start a run as a user does and wait for the first line of its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = ["train", "--dataset", dataset, "--recipe", recipe, "--out", str(run)]
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "fewstep", *arguments], stdout=subprocess.DEVNULL
        )
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text()):
            if process.poll() is not None:
                raise SystemExit(f"fewstep {' '.join(arguments)} ended before its first iteration")
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        process.kill()
        process.wait()
    return seconds


def sampling_and_iteration(dataset: str, recipe: str, repeats: int) -> tuple[float, float]:
    """Return the median seconds of drawing an iteration's tasks, and of all of the iteration."""
    config = preset(dataset, recipe=recipe)
    problem = build_problem(config, "cpu")
    learner, episodes = build_learner(config, problem, "cpu"), problem.episodes["train"]
    sampling, all_of_it = [], []
    for i in range(repeats + 2):
        started = time.perf_counter()
        batch = episodes.batch(i * config.tasks, config.tasks)
        sampled = time.perf_counter()
        learner.step(batch)
        sampling.append(sampled - started)
        all_of_it.append(time.perf_counter() - started)
    return statistics.median(sampling[2:]), statistics.median(all_of_it[2:])


def main() -> None:
    """Measure and print."""
    options = tyro.cli(Options)
    keep_freed_memory()
    found: dict[str, Any] = {}
    for dataset in options.datasets:
        recipe = "maml" if dataset == "sinusoid" else options.recipe
        starts = [seconds_to_first_iteration(dataset, recipe) for _ in range(options.repeats)]
        sampling, iteration = sampling_and_iteration(dataset, recipe, options.repeats)
        found[f"{dataset}, {recipe}"] = {
            "first_iteration_after_s": statistics.median(starts),
            "iteration_s": iteration,
            "sampling_share": sampling / iteration,
        }
    print(json.dumps(found, indent=2))
    if options.out is not None:
        write_json(options.out, found | {"environment": environment(command_line(), "cpu")})


if __name__ == "__main__":
    main()
