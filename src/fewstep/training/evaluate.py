"""Scoring the checkpoint of a run."""

from __future__ import annotations

import time
from typing import Any, Literal

from fewstep.core.errors import InputError
from fewstep.core.learner import MetaLearner
from fewstep.core.scores import Scores
from fewstep.training.build import Problem
from fewstep.training.config import RunConfig, Split
from fewstep.training.run_folder import RunFolder, environment, write_json


def evaluate_run(
    config: RunConfig,
    run: RunFolder,
    problem: Problem,
    learner: MetaLearner,
    *,
    split: Split,
    checkpoint: Literal["best", "last"],
    num_tasks: int,
    num_steps: int,
    command: str,
    device: str,
) -> Scores:
    """Score a checkpoint on a split and write the scores into the run folder.

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
    learner.load_state_tensors(run.load_checkpoint(name))
    started = time.perf_counter()
    scores = learner.evaluate(problem.episodes[split], num_tasks, num_steps=num_steps)
    summary: dict[str, Any] = {
        "split": split,
        "checkpoint": checkpoint,
        "iteration": iteration,
        "seed": config.seed,
        **scores.as_dict(),
        "evaluation_seconds": round(time.perf_counter() - started, 2),
        "training_seconds": round(sum(m.get("seconds", 0) for m in run.metrics()), 1),
        "environment": environment(command, device),
    }
    write_json(run.path / f"evaluation-{split}-{checkpoint}-{num_steps}-steps.json", summary)
    return scores
