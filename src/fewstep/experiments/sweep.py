"""Many runs, one after another or side by side, each resumable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fewstep.core.errors import InputError
from fewstep.core.ranks import ALONE, Ranks
from fewstep.experiments.pool import check_alone, each
from fewstep.training.build import Experiment
from fewstep.training.config import RunConfig, to_dict
from fewstep.training.display import say
from fewstep.training.evaluate import (
    Scoring,
    evaluate_run,
    evaluation_file,
    is_scored,
    read_scores,
)
from fewstep.training.folders import locked, make_folder
from fewstep.training.initial import initial_of
from fewstep.training.run_folder import RunFolder
from fewstep.training.same_settings import differences
from fewstep.training.trainer import Trainer


def complete(
    path: Path,
    config: RunConfig,
    tests: tuple[Scoring, ...],
    console: Console | None = None,
    ranks: Ranks = ALONE,
) -> list[dict[str, Any]] | None:
    """Train a run to its end from wherever it stands, and test it.

    Args:
        path: Folder of the run; need not exist.
        config: Its settings.
        tests: What to test; those done before, on the same checkpoint, are read.
        console: Where to print; None for nowhere.
        ranks: The processes that share it, of which the first keeps the folder.

    Returns:
        What each test wrote, or None if training was interrupted.

    Raises:
        InputError: the folder holds a run with other settings, or what training raises.
    """
    console = console or Console(quiet=True)
    steps = config.algorithm.eval_steps
    with _opened(path, config) if ranks.is_first else nullcontext() as run:

        def missing() -> list[Scoring]:
            if run is None:
                return ranks.broadcast([])
            return ranks.broadcast(
                [t for t in tests if not is_scored(run, t.checkpoint, _file(run, t, steps))]
            )

        state = ranks.broadcast(None if run is None else run.state())
        if state is None or state.iteration < config.iterations or missing():
            initial = initial_of(config) if state is None else None
            experiment = Experiment.build(config, ranks, initial)
            if not Trainer(experiment, run, console).train()[1]:
                return None
            for test in missing():
                evaluate_run(experiment, run, console, test, split="test", num_steps=steps).save()
        return ranks.broadcast(
            [] if run is None else [read_scores(_file(run, t, steps)) for t in tests]
        )


def finished(
    path: Path, config: RunConfig, tests: tuple[Scoring, ...]
) -> list[dict[str, Any]] | None:
    """Return what each test wrote, where a run with these settings is trained and tested."""
    if not (path / "config.toml").exists():
        return None
    run = RunFolder.open(path)
    state = run.state()
    if state is None or state.iteration < config.iterations:
        return None
    files = [_file(run, test, config.algorithm.eval_steps) for test in tests]
    is_whole = all(map(partial(is_scored, run), [test.checkpoint for test in tests], files))
    if not is_whole or any(_unlike(path, run.settings(), config)):
        return None
    return [read_scores(file) for file in files]


@contextmanager
def _opened(path: Path, config: RunConfig) -> Iterator[RunFolder]:
    """Hold the folder of a run that may be new, or have been begun with the same settings."""
    make_folder(path)
    with locked(path):
        if (path / "config.toml").exists():
            run = RunFolder.open(path)
            _check_begun(run, config)
            if run.state() is None:
                run.save_settings(to_dict(config))
        else:
            run = RunFolder.create(path, to_dict(config))
        yield run


def _check_begun(run: RunFolder, config: RunConfig) -> None:
    """Check that a run has these settings, if it has come to train."""
    if run.state() is not None:
        check_same(run.path, run.settings(), config)


def _file(run: RunFolder, test: Scoring, steps: int) -> Path:
    return evaluation_file(run, "test", test.checkpoint, steps, test.changes)


def complete_all(
    plan: Mapping[Path, RunConfig],
    tests: tuple[Scoring, ...],
    console: Console,
    *,
    workers: int,
    ray: bool = False,
    ranks: Ranks = ALONE,
) -> dict[Path, list[dict[str, Any]]]:
    """Complete many runs.

    Args:
        plan: Folders and settings.
        tests: As in `complete`.
        console: Where to print.
        workers: How many at once.
        ray: Send them to a Ray cluster.
        ranks: The processes that share every run, one run after another.

    Returns:
        What each run's tests wrote; of interrupted runs nothing.
    """
    check_plan(plan)
    if ranks.size == 1:
        check_alone(len(plan))
    runs: Iterator[tuple[Path, list[dict[str, Any]] | None]]
    if workers == 1 and not ray:
        runs = ((p, complete(p, config, tests, console, ranks)) for p, config in plan.items())
    else:
        jobs = {path: (path, config, tests) for path, config in plan.items()}
        runs = each(complete, jobs, workers=workers, ray=ray, console=console)
    results: dict[Path, list[dict[str, Any]]] = {}
    for path, found in runs:
        if found is None:
            break
        results[path] = found
        say(console, f"done: {path} ({len(results)} of {len(plan)})")
    if len(results) < len(plan):
        say(console, f"{len(results)} of {len(plan)} runs are done; the same command goes on")
    return results


def check_plan(plan: Mapping[Path, RunConfig]) -> None:
    """Check, before any of them is trained, that the folders of runs hold no others.

    Raises:
        InputError: one holds a run with other settings.
    """
    for path, config in plan.items():
        if (path / "config.toml").exists():
            _check_begun(RunFolder.open(path), config)


def check_same(path: Path, held: dict[str, Any], asked: Any) -> None:
    """Raise InputError unless a run's file holds these settings; what it lacks is the default."""
    for name, there, here in _unlike(path, held, asked):
        check_equal(path, name, there, here)


def _unlike(path: Path, held: dict[str, Any], asked: Any) -> Iterator[tuple[str, object, object]]:
    for name, there, here in differences(held, asked):
        if name == "initial" and _is_neighbour(path, there, here):
            continue  # of a sweep whose folder was moved, or is written otherwise
        yield name, there, here


def _is_neighbour(path: Path, there: object, here: object) -> bool:
    """Whether both lead to the same run in a folder around a run, moved since or not."""
    if there is None or here is None:
        return False
    held, asked = Path(str(there)), Path(str(here))
    return held.name == asked.name and asked.absolute().parent in path.absolute().parents


def check_equal(path: Path, name: str, there: object, here: object) -> None:
    """Raise InputError unless a run has what is asked for."""
    if there != here:
        raise InputError(
            f"{path} holds a run with {name}={there!r}, but {name}={here!r} is asked for; "
            "choose another folder with --out"
        )
