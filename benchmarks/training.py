"""Around the meta-gradient: seconds to the first iteration, and the share of sampling tasks."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.core.allocator import keep_freed_memory
from fewstep.training.build import build_learner, build_problem
from fewstep.training.environment import command_line, environment
from fewstep.training.presets import preset
from fewstep.training.run_folder import write_json
from options import options_of


@dataclass(frozen=True)
class Options:
    """Measure runs with their default settings."""

    datasets: tuple[str, ...] = ("omniglot", "sinusoid")
    """Whose defaults to take; prepared beforehand."""
    recipe: str = "maml++"
    """The method; sinusoid has MAML's."""
    repeats: int = 5
    """Starts to take the median of, and the least iterations."""
    device: str = "cpu"
    """"cpu" or "cuda"."""
    out: Path | None = None
    """JSON file to write."""


def seconds_to_first_iteration(dataset: str, recipe: str, device: str) -> float:
    """Start a run as a user does and wait for the first line of its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = ["train", "--dataset", dataset, "--recipe", recipe, "--out", str(run)]
        arguments += ["--device", device]
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


def sampling_and_iteration(
    dataset: str, recipe: str, device: str, repeats: int
) -> tuple[float, float]:
    """Return the seconds of drawing an iteration's tasks, and of all of the iteration.

    Means after the first, as tasks may be drawn for many iterations at once.
    """
    config = replace(preset(dataset, recipe=recipe), device=device)
    problem = build_problem(config, device)
    learner = build_learner(config, problem.input_shape, problem.outputs)
    episodes = problem.episodes["train"]
    learner.step(episodes.batch(0, config.tasks))
    sampling, started, done = 0.0, time.perf_counter(), 0
    while done < repeats or time.perf_counter() - started < 10:
        done += 1
        before = time.perf_counter()
        batch = episodes.batch(done * config.tasks, config.tasks)
        sampling += time.perf_counter() - before
        learner.step(batch, check_finite=False)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return sampling / done, (time.perf_counter() - started) / done


def main() -> None:
    """Measure and print."""
    options = options_of(Options)
    keep_freed_memory()
    found: dict[str, Any] = {}
    for dataset in options.datasets:
        recipe = "maml" if dataset == "sinusoid" else options.recipe
        where = dataset, recipe, options.device
        starts = [seconds_to_first_iteration(*where) for _ in range(options.repeats)]
        sampling, iteration = sampling_and_iteration(*where, options.repeats)
        found[f"{dataset}, {recipe}"] = {
            "first_iteration_after_s": statistics.median(starts),
            "iteration_s": iteration,
            "sampling_share": sampling / iteration,
        }
    print(json.dumps(found, indent=2))
    if options.out is not None:
        write_json(
            options.out, found | {"environment": environment(command_line(), options.device)}
        )


if __name__ == "__main__":
    main()
