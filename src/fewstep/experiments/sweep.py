"""Many runs, one after another or side by side, each resumable."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fewstep.core.errors import InputError
from fewstep.training.allocator import keep_freed_memory
from fewstep.training.build import Experiment, resolve_device
from fewstep.training.config import RunConfig, to_dict
from fewstep.training.evaluate import Checkpoint, evaluate_run, evaluation_file
from fewstep.training.files import locked
from fewstep.training.run_folder import RunFolder, command_line
from fewstep.training.trainer import Trainer


@dataclass(frozen=True)
class Test:
    """A test that every run of a sweep ends with.

    Args:
        checkpoint: Which checkpoint.
        statistics: What batch normalisation normalises by; None takes the run's.
    """

    checkpoint: Checkpoint = "best"
    statistics: Any = None

    @property
    def changes(self) -> tuple[str, ...]:
        """Return how it differs from the run's own test, for the file name."""
        return () if self.statistics is None else (f"statistics-{self.statistics}",)


def complete(
    path: Path, config: RunConfig, tests: tuple[Test, ...], console: Console
) -> list[dict[str, Any]] | None:
    """Train a run to its end from wherever it stands, and test it.

    Args:
        path: Folder of the run; need not exist.
        config: Its settings.
        tests: What to test; those done before are read.
        console: Where to print.

    Returns:
        What each test wrote, or None if training was interrupted.

    Raises:
        InputError: the folder holds a run with other settings, or what training raises.
    """
    path.mkdir(parents=True, exist_ok=True)
    config_dict = to_dict(config)
    with locked(path):
        if (path / "config.toml").exists():
            run = RunFolder.open(path)
            _check_same(path, run.settings(), config_dict)
        else:
            run = RunFolder.create(path, config_dict, command_line(), config.device)
        steps = config.algorithm.eval_steps
        files = [evaluation_file(run, "test", t.checkpoint, steps, t.changes) for t in tests]
        state = run.state()
        done = state is not None and state.iteration == config.iterations
        if not (done and all(file.exists() for file in files)):
            experiment = Experiment.build(config)
            if Trainer(experiment, run, console).train().iteration < config.iterations:
                return None
            for test, file in zip(tests, files, strict=True):
                if not file.exists():
                    evaluate_run(
                        experiment, run, split="test", checkpoint=test.checkpoint,
                        num_tasks=config.test_tasks, num_steps=steps,
                        statistics=test.statistics, changes=test.changes,
                    )  # fmt: skip
        return [json.loads(file.read_text()) for file in files]


def complete_all(
    plan: Mapping[Path, RunConfig], tests: tuple[Test, ...], workers: int, console: Console
) -> dict[Path, list[dict[str, Any]]]:
    """Complete many runs.

    Args:
        plan: Folders and settings.
        tests: As in `complete`.
        workers: How many at once; several share the processor's cores, a single-threaded process
            each, which uses them better than one run with many threads.
        console: Where to print.

    Returns:
        What each run's tests wrote; of interrupted runs nothing.
    """
    if workers < 1:
        raise InputError(f"workers={workers} must be at least 1 process")
    plan = {p: _resolved(config) for p, config in plan.items()}
    results: dict[Path, list[dict[str, Any]]] = {}
    if workers == 1:
        for number, (path, config) in enumerate(plan.items(), 1):
            console.print(f"run {number} of {len(plan)}: {path}", highlight=False, soft_wrap=True)
            found = complete(path, config, tests, console)
            if found is None:
                break
            results[path] = found
        return results
    context = multiprocessing.get_context("spawn")
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        ProcessPoolExecutor(workers, context, _single_threaded) as pool,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        bar = progress.add_task("runs", total=len(plan))
        jobs = {
            pool.submit(complete, path, config, tests, Console(quiet=True)): path
            for path, config in plan.items()
        }
        for job in as_completed(jobs):
            found = job.result()
            if found is None:
                pool.shutdown(cancel_futures=True)
                break
            results[jobs[job]] = found
            progress.advance(bar)
            console.print(f"done: {jobs[job]}", highlight=False, soft_wrap=True)
    return results


def _single_threaded() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()


def _resolved(config: RunConfig) -> RunConfig:
    return replace(config, device=resolve_device(config.device))


def _check_same(path: Path, held: dict[str, Any], asked: dict[str, Any]) -> None:
    for key in sorted(held.keys() | asked.keys()):
        there, here = held.get(key), asked.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            _check_same(path, there, here)
        elif there != here and key != "device":
            raise InputError(
                f"{path} holds a run with {key}={there!r}, but {key}={here!r} is asked for; "
                "choose another folder with --out"
            )
