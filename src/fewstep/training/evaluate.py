"""Scoring the checkpoint of a run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fewstep.core.errors import InputError
from fewstep.core.norm import Use
from fewstep.core.scores import Scores
from fewstep.data.views import Views, views_of
from fewstep.training.build import Experiment
from fewstep.training.classes_file import Classes, check_classes
from fewstep.training.config import RunConfig, to_dict
from fewstep.training.display import bars, counting
from fewstep.training.environment import command_line, environment
from fewstep.training.episode_options import Split
from fewstep.training.head import fitting_head
from fewstep.training.run_folder import Checkpoint, RunFolder, nan_for_null, write_json


@dataclass(frozen=True)
class Scoring:
    """How a run is scored; the default is its own test.

    Args:
        checkpoint: Which checkpoint; "ensemble" takes the mean of the outputs of all that are kept
            for their validation scores.
        statistics: What batch normalisation normalises by; None takes the run's.
        views: How to see each task besides; the outputs are the mean of all, after the last step
            alone.
        num_tasks: How many tasks; None takes the run's.
        episodes: How the episodes differ from the run's own, which whoever builds them sees to.
    """

    checkpoint: Checkpoint = "best"
    statistics: Use | None = None
    views: Views | None = None
    num_tasks: int | None = None
    episodes: Mapping[str, object] = field(default_factory=dict)

    @property
    def changes(self) -> list[str]:
        """Return a word for each difference from the run's own test, for the file name."""
        words = {
            **self.episodes,
            "statistics": self.statistics,
            "tasks": self.num_tasks,
            "views": self.views,
        }
        return [f"{name}-{value}" for name, value in words.items() if value is not None]


@dataclass(frozen=True)
class Evaluated:
    """Scores of a checkpoint, not yet in the run folder.

    Args:
        scores: The scores.
        file: Where to write them; None in all processes but the first.
        summary: What to write.
    """

    scores: Scores
    file: Path | None = None
    summary: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        """Write them, in the first process.

        Raises:
            InputError: the folder cannot be written, or the disk is full.
        """
        if self.file is not None:
            write_json(self.file, self.summary)


def evaluate_run(
    experiment: Experiment,
    run: RunFolder | None,
    console: Console,
    scoring: Scoring,
    *,
    split: Split,
    num_steps: int,
) -> Evaluated:
    """Score a checkpoint on a split.

    Of several processes, each scores its share of the tasks.

    Args:
        experiment: Its tester is given the checkpoint.
        run: Where the checkpoint is and the scores will go; None in all processes but the first.
        console: Where to show how far it is.
        scoring: How to score it.
        split: Where the tasks come from.
        num_steps: Inner steps.

    Raises:
        InputError: the run has no checkpoint, or the split had other classes when it began.
    """
    learner, config = experiment.tester, experiment.config
    num_tasks = config.test_tasks if scoring.num_tasks is None else scoring.num_tasks
    of_split: Classes = {s: names for s, names in experiment.problem.classes.items() if s == split}
    if run is not None:
        check_classes(run.path, of_split)
    kept = () if run is None else run.kept(scoring.checkpoint)
    states = [] if run is None else [run.load_checkpoint(each.name) for each in kept]
    states = [fitting_head(learner, state) for state in states]
    states = learner.ranks.broadcast(states)
    episodes = experiment.problem.episodes[split]
    started = time.perf_counter()
    own = learner.ranks.count(num_tasks)
    with bars(console) as progress, counting(progress, split, episodes, own) as counted:
        if scoring.checkpoint == "ensemble" or scoring.views is not None:
            evaluate: Callable[..., Scores] = partial(
                learner.evaluate_ensemble, states, views=views_of(scoring.views)
            )
        else:
            learner.load_state_tensors(states[0])
            evaluate = learner.evaluate
        scores = evaluate(counted, num_tasks, num_steps=num_steps, statistics=scoring.statistics)
    if run is None:
        return Evaluated(scores)
    summary = {
        "split": split,
        "checkpoint": scoring.checkpoint,
        "iterations": [each.iteration for each in kept],
        "views": scoring.views,
        **_origin(config, of_split),
        **scores.as_dict(),
        "evaluation_seconds": round(time.perf_counter() - started, 2),
        "training_seconds": _training_seconds(run),
        "environment": environment(command_line(), config.device),
    }
    file = evaluation_file(run, split, scoring.checkpoint, num_steps, scoring.changes)
    return Evaluated(scores, file, summary)


def _origin(config: RunConfig, classes: Classes) -> dict[str, Any]:
    """Return what the tasks follow from; a digest stands for the names of classes."""
    found: dict[str, Any] = {
        "seed": config.seed,
        "dataset": config.dataset,
        "data": to_dict(config.data),
        "episodes": to_dict(config.episodes),
    }
    if classes:
        found["classes"] = hashlib.sha256(json.dumps(classes).encode()).hexdigest()[:12]
    return found


def _training_seconds(run: RunFolder) -> float | None:
    """Return None where a run was copied without its metrics, or has damaged ones."""
    try:
        seconds = sum(m.get("seconds", 0) for m in run.metrics())
    except InputError:  # the scores are not to be lost to it
        return None
    return round(seconds, 1) if seconds else None


def read_scores(file: Path) -> dict[str, Any]:
    """Return what an evaluation file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON.
    """
    values: dict[str, Any] = json.loads(file.read_text())
    for name in ("mean", "ci95", "curve", "curve_ci95", "loss_curve", "per_task"):
        if name in values:
            values[name] = nan_for_null(values[name])
    return values


def is_scored(run: RunFolder, checkpoint: Checkpoint, file: Path) -> bool:
    """Whether a file has the scores of the checkpoint as it is now, not before more training.

    A damaged file has none, nor has one of a version that did not say of which they are.
    """
    try:
        iterations = json.loads(file.read_text())["iterations"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return bool(iterations == [each.iteration for each in run.kept(checkpoint)])


def evaluation_file(
    run: RunFolder,
    split: Split,
    checkpoint: Checkpoint,
    num_steps: int,
    changes: Sequence[str] = (),
) -> Path:
    """Return where `evaluate_run` writes the scores of such an evaluation."""
    words = ["evaluation", split, checkpoint, f"{num_steps}-steps", *changes]
    return run.path / f"{'-'.join(words)}.json"
