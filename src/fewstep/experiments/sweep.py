"""Many runs, one after another or side by side, each resumable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fewstep.core.errors import InputError
from fewstep.experiments.pool import each
from fewstep.training.build import Experiment
from fewstep.training.config import RunConfig, to_dict
from fewstep.training.evaluate import Checkpoint, evaluate_run, evaluation_file, is_scored
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
    path: Path, config: RunConfig, tests: tuple[Test, ...], console: Console | None = None
) -> list[dict[str, Any]] | None:
    """Train a run to its end from wherever it stands, and test it.

    Args:
        path: Folder of the run; need not exist.
        config: Its settings.
        tests: What to test; those done before, on the same checkpoint, are read.
        console: Where to print; None for nowhere.

    Returns:
        What each test wrote, or None if training was interrupted.

    Raises:
        InputError: the folder holds a run with other settings, or what training raises.
    """
    path.mkdir(parents=True, exist_ok=True)
    console = console or Console(quiet=True)
    with locked(path):
        if (path / "config.toml").exists():
            run = RunFolder.open(path)
            _check_same(path, run.settings(), config)
        else:
            run = RunFolder.create(path, to_dict(config), command_line(), config.device)
        steps = config.algorithm.eval_steps
        files = [evaluation_file(run, "test", t.checkpoint, steps, t.changes) for t in tests]

        def missing() -> list[Test]:
            pairs = zip(tests, files, strict=True)
            return [t for t, file in pairs if not is_scored(run, t.checkpoint, file)]

        state = run.state()
        done = state is not None and state.iteration == config.iterations
        if not done or missing():
            experiment = Experiment.build(config)
            if Trainer(experiment, run, console).train().iteration < config.iterations:
                return None
            for test in missing():
                evaluate_run(
                    experiment, run, console, split="test", checkpoint=test.checkpoint,
                    num_tasks=config.test_tasks, num_steps=steps,
                    statistics=test.statistics, changes=test.changes,
                )  # fmt: skip
        return [json.loads(file.read_text()) for file in files]


def complete_all(
    plan: Mapping[Path, RunConfig],
    tests: tuple[Test, ...],
    console: Console,
    *,
    workers: int,
    ray: bool = False,
) -> dict[Path, list[dict[str, Any]]]:
    """Complete many runs.

    Args:
        plan: Folders and settings.
        tests: As in `complete`.
        console: Where to print.
        workers: How many at once.
        ray: Send them to a Ray cluster.

    Returns:
        What each run's tests wrote; of interrupted runs nothing.
    """
    alone = workers == 1 and not ray
    own = (console,) if alone else ()  # a console does not travel to other processes
    jobs = {path: (path, config, tests, *own) for path, config in plan.items()}
    results: dict[Path, list[dict[str, Any]]] = {}
    for path, found in each(
        complete, jobs, workers=workers, ray=ray, console=Console(quiet=True) if alone else console
    ):
        if found is None:
            break
        results[path] = found
        console.print(f"done: {path} ({len(results)} of {len(plan)})", highlight=False)
    return results


# Settings that say how to compute, and change no result but rounding.
_HOW = ("device", "chunk_size", "checkpoint_every", "memory_budget", "replay", "compile")


def _check_same(path: Path, held: dict[str, Any], asked: Any) -> None:
    """Raise InputError unless a run's file holds these settings; what it lacks is the default."""
    settings, default = to_dict(asked), to_dict(type(asked)())
    for key in sorted(held.keys() | settings.keys()):
        if is_dataclass(part := getattr(asked, key, None)):
            _check_same(path, held.get(key, {}), part)
            continue
        there, here = held.get(key, default.get(key)), settings.get(key)
        if there != here and key not in _HOW:
            raise InputError(
                f"{path} holds a run with {key}={there!r}, but {key}={here!r} is asked for; "
                "choose another folder with --out"
            )
