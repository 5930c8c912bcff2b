"""Scoring the checkpoint of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

from fewstep.core.errors import InputError
from fewstep.core.scores import Scores
from fewstep.training.build import Experiment
from fewstep.training.config import Split, to_dict
from fewstep.training.run_folder import RunFolder, command_line, environment, write_json


def evaluate_run(
    experiment: Experiment,
    run: RunFolder,
    *,
    split: Split,
    checkpoint: Literal["best", "last"],
    num_tasks: int,
    num_steps: int,
    changes: Sequence[str] = (),
) -> Scores:
    """Score a checkpoint on a split and write the scores into the run folder.

    Args:
        experiment: Its learner is given the checkpoint.
        run: Where the checkpoint is and the scores go.
        split: Where the tasks come from.
        checkpoint: Which checkpoint.
        num_tasks: How many tasks.
        num_steps: Inner steps.
        changes: How the episodes differ from the run's own, for the file name.

    Raises:
        InputError: the run has no checkpoint.
    """
    state = run.state()
    if state is None:
        raise InputError(f"{run.path} has no checkpoint yet; train it first")
    name, iteration = (
        (state.best, state.best_iteration)
        if checkpoint == "best"
        else (state.last, state.iteration)
    )
    learner = experiment.learner
    learner.load_state_tensors(run.load_checkpoint(name))
    started = time.perf_counter()
    scores = learner.evaluate(experiment.problem.episodes[split], num_tasks, num_steps=num_steps)
    summary: dict[str, Any] = {
        "split": split,
        "checkpoint": checkpoint,
        "iteration": iteration,
        "seed": experiment.config.seed,
        "episodes": to_dict(experiment.config.episodes),
        **scores.as_dict(),
        "evaluation_seconds": round(time.perf_counter() - started, 2),
        "training_seconds": round(sum(m.get("seconds", 0) for m in run.metrics()), 1),
        "environment": environment(command_line(), experiment.device),
    }
    words = ["evaluation", split, checkpoint, f"{num_steps}-steps", *changes]
    write_json(run.path / f"{'-'.join(words)}.json", summary)
    return scores
