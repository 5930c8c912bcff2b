"""Training and test of a policy that learns to adapt."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fewstep.core.errors import InputError
from fewstep.core.files import write_atomically
from fewstep.core.rates import StepRates
from fewstep.experiments.policy_settings import METHODS, PolicyRun
from fewstep.experiments.sweep import check_same
from fewstep.rl.learner import PolicyLearner
from fewstep.rl.returns import Returns
from fewstep.training.config import to_dict
from fewstep.training.display import bars
from fewstep.training.environment import command_line, environment
from fewstep.training.folders import locked, make_folder
from fewstep.training.run_folder import nan_for_null, write_json
from fewstep.training.trainer import TrainingStopped


@dataclass
class _Course:
    """What a run has seen so far, with the best parameters by validation."""

    training: list[list[float]]
    validation: list[list[float]]
    best: dict[str, Tensor]
    seconds: float
    updates: list[dict[str, float | None]] = field(default_factory=list)

    @property
    def rank(self) -> float:
        """The best return in validation so far."""
        returns = (row[1] for row in self.validation)
        return max((r for r in returns if math.isfinite(r)), default=-math.inf)


def train_policy(path: Path, run: PolicyRun, console: Console | None = None) -> dict[str, Any]:
    """Train a policy from wherever its run stands, and test the one that was best in validation.

    Every iteration is saved; a killed run goes on to the bit, and a finished one if it is to have
    more iterations, with the validation of its end among those that choose.

    Args:
        path: Folder of the run; need not exist.
        run: Its settings.
        console: Where to show progress; None for nowhere.

    Returns:
        What outcome.json holds.

    Raises:
        InputError: the folder holds a run with other settings or more iterations, what it has
            kept is not enough to go on, or another process has it.
        TrainingStopped: a loss was not finite; what was saved before is intact.
    """
    make_folder(path)
    with locked(path):
        if (outcome := _outcome(path, run)) is not None:
            return outcome
        learner = run.learner()
        course = _resume(path / "state.safetensors", run, learner)
        iterations = run.setting.iterations if METHODS[run.method].is_trained else 0
        with bars(console or Console(quiet=True)) as progress:
            bar = progress.add_task(
                path.name, total=iterations, completed=learner.iteration, rate=""
            )
            while learner.iteration < iterations:
                _iterate(run, learner, course, iterations)
                _save(path / "state.safetensors", run, learner, course)
                is_refused = course.updates[-1]["shrinks"] is None
                text = f"return {course.training[-1][-1]:.1f}" + ", no update" * is_refused
                progress.update(bar, completed=learner.iteration, rate=text)
            if course.best:
                learner.load_state_tensors(course.best)
            returns = evaluate_policy(run, learner)
        write_atomically(path / "policy.safetensors", save(_contiguous(learner.state_tensors())))
        found = _told(run, course, learner.iteration, returns)
        write_json(path / "outcome.json", found)
    return found


def _told(run: PolicyRun, course: _Course, best: int, returns: Returns) -> dict[str, Any]:
    """Return what outcome.json holds."""
    return {
        "run": to_dict(run),
        "environment": environment(command_line(), run.device),
        "seconds": course.seconds,
        "best": best,
        "training": course.training,
        "validation": course.validation,
        "updates": course.updates,
        "test": {
            "curve": returns.curve,
            "ci95": returns.curve_ci95,
            "of_tasks": [[round(r, 4) for r in row] for row in returns.of_tasks.tolist()],
        },
    }


def evaluate_policy(run: PolicyRun, learner: PolicyLearner) -> Returns:
    """Return what the test tasks gave after 0, 1, ... steps at the rates of the test."""
    return learner.evaluate(
        run.tasks("test"),
        run.setting.test_tasks,
        num_steps=0 if METHODS[run.method].shows_goal else run.setting.test_steps,
        inner_rate=StepRates(run.setting.test_lrs),
        episodes=run.setting.test_episodes,
    )


def told_by_policy(path: Path, run: PolicyRun) -> dict[str, Any] | None:
    """Return what the outcome.json of a finished run with these settings holds, if there is one."""
    try:
        return _outcome(path, run)
    except InputError:
        return None


def trained_policy(path: Path, run: PolicyRun) -> PolicyLearner:
    """Return the learner that a finished run has kept.

    Raises:
        InputError: it came without.
    """
    learner = run.learner()
    if not has_policy(path):
        raise InputError(f"{path} came without its policy.safetensors; train it in another folder")
    learner.load_state_tensors(load_file(path / "policy.safetensors"))
    return learner


def has_policy(path: Path) -> bool:
    """Whether a finished run has kept its policy, as not all do that come along with results."""
    return (path / "policy.safetensors").exists()


def _iterate(run: PolicyRun, learner: PolicyLearner, course: _Course, iterations: int) -> None:
    """Do one iteration, and a validation where one is due."""
    began = time.monotonic()
    tasks = run.setting.tasks
    try:
        metrics = learner.step(run.tasks("train"), learner.iteration * tasks, tasks)
    except FloatingPointError as error:
        rates = "--inner-lr and --test-lrs" if METHODS[run.method].num_steps else "--max-divergence"
        raise TrainingStopped(
            f"{run.method}, seed {run.seed}, iteration {learner.iteration + 1}: {error}; try a "
            f"smaller {rates}, in another folder"
        ) from error
    course.training.append(metrics.returns.curve)
    course.updates.append(asdict(metrics.update))
    if learner.iteration % run.setting.val_every == 0 or learner.iteration == iterations:
        returns = learner.evaluate(run.tasks("val"), run.setting.val_tasks)
        row = [float(learner.iteration), returns.curve[-1], returns.curve_ci95[-1]]
        if row[1] > course.rank:
            course.best = learner.state_tensors()
        course.validation.append(row)
    course.seconds += time.monotonic() - began


def _save(path: Path, run: PolicyRun, learner: PolicyLearner, course: _Course) -> None:
    tensors = {f"now.{name}": t for name, t in learner.state_tensors().items()}
    tensors |= {f"best.{name}": t for name, t in course.best.items()}
    told = {name: getattr(course, name) for name in ("training", "validation", "updates")}
    metadata = {
        "run": json.dumps(to_dict(run)),
        "course": json.dumps(told | {"seconds": course.seconds}),
    }
    write_atomically(path, save(_contiguous(tensors), metadata))


def _resume(path: Path, run: PolicyRun, learner: PolicyLearner) -> _Course:
    if not path.exists():
        if METHODS[run.method].is_trained and (path.parent / "outcome.json").exists():
            raise InputError(
                f"{path.parent} holds a finished run without its {path.name}, so it can't go on to "
                f"iterations={run.setting.iterations}; choose another folder with --out"
            )
        return _Course([], [], {}, 0.0)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise InputError(f"{path} is damaged ({error}); remove it to start anew") from error
    _check_same(path.parent, json.loads(metadata["run"]), run)
    parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor.to(run.device)
    learner.load_state_tensors(parts["now"])
    return _Course(best=parts["best"], **json.loads(metadata["course"]))


def _outcome(path: Path, run: PolicyRun) -> dict[str, Any] | None:
    """Return what a finished run wrote; None if there is none, or it is to go on."""
    try:
        found: dict[str, Any] = json.loads((path / "outcome.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path / 'outcome.json'} is damaged; remove it") from error
    _check_same(path, found["run"], run)
    found["validation"] = nan_for_null(found["validation"])
    found["test"]["of_tasks"] = nan_for_null(found["test"]["of_tasks"])
    return found if found["run"]["setting"]["iterations"] == run.setting.iterations else None


def _check_same(path: Path, held: dict[str, Any], run: PolicyRun) -> None:
    """Raise InputError unless a run has these settings; it may have fewer iterations."""
    iterations = max(held["setting"]["iterations"], run.setting.iterations)
    check_same(path, held | {"setting": held["setting"] | {"iterations": iterations}}, run)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
