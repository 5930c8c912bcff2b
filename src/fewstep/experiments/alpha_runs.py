"""Short runs of MAML and Alpha MAML that differ in their learning rates."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from fewstep.core.learner import MetaLearner
from fewstep.experiments.sweep import check_equal, check_same
from fewstep.training.algorithm_options import AlgorithmOptions
from fewstep.training.build import Problem, build_learner, build_problem
from fewstep.training.config import RunConfig, to_dict
from fewstep.training.episode_options import ClassificationOptions
from fewstep.training.folders import make_folder
from fewstep.training.network_options import Conv4Options
from fewstep.training.presets import preset
from fewstep.training.run_folder import nan_for_null, write_json


@dataclass(frozen=True)
class Setting:
    """What the poster leaves open, chosen by us: one inner step, mean cross-entropy, SGD outside.

    The meta-loss is the mean over tasks.
    """

    dataset: Literal["omniglot", "glyphs"] = "omniglot"
    """Where the tasks come from."""
    ways: int = 20
    """Classes of a task; chance has a loss of log(ways)."""
    shots: int = 1
    """Support images of each class."""
    tasks: int = 2
    """Tasks of an iteration."""
    filters: int = 32
    """Channels of every block of the network."""
    seed: int = 0
    """Seed of the initial parameters and of the episodes, the same for all."""
    device: str = "cpu"
    """"cpu", "cuda", ...; "auto" takes a GPU where there is one."""

    def config(
        self, alpha: float, beta: float, eta_alpha: float | None, eta_beta: float | None
    ) -> RunConfig:
        """Return a run's settings; without both hyper-rates it is MAML."""
        is_alpha_maml = eta_alpha is not None or eta_beta is not None
        return replace(
            preset(self.dataset),
            recipe="alpha-maml" if is_alpha_maml else "maml",
            episodes=ClassificationOptions(
                ways=self.ways, shots=self.shots, queries=1, eval_queries=1
            ),
            model=Conv4Options(filters=self.filters),
            algorithm=AlgorithmOptions(
                num_steps=1,
                eval_steps=1,
                inner_lr=alpha,
                learned_rates="no" if eta_alpha is None else "one",
                inner_hyper_lr=eta_alpha,
                outer="sgd",
                outer_lr=beta,
                outer_hyper_lr=eta_beta,
            ),
            tasks=self.tasks,
            seed=self.seed,
            device=self.device,
        )


def numeral(rate: float) -> str:
    """Return all digits of a rate, so that no other has its name: 0.1, 10, 0.12345678."""
    return repr(rate).removesuffix(".0")


def check_all(configs: Iterable[RunConfig]) -> None:
    """Check the algorithm of each, before the first trains for hours.

    Raises:
        InputError: a part refuses its settings.
    """
    for config in configs:
        config.algorithm.build(config.iterations, config.epoch_length)


@lru_cache(maxsize=1)
def _problem(config: RunConfig) -> Problem:
    return build_problem(config, config.device)


def train(
    path: Path,
    config: RunConfig,
    *,
    threshold: float | None = None,
    window: int = 1,
    val_every: int = 0,
    is_tested: bool = False,
) -> dict[str, Any]:
    """Train until the running mean of the loss is below a threshold, or to the last iteration.

    Args:
        path: JSON file of the outcome; a whole one is read, and nothing trained.
        config: Settings.
        threshold: Loss to reach; None trains to the end.
        window: Iterations of the running mean.
        val_every: Iterations between validations; 0 for none.
        is_tested: Score the outcome on test tasks.

    Returns:
        Losses, rates, hypergradients, validation losses, test scores, the iteration at which the
        threshold was reached, and the one at which a number that was not finite broke it off.

    Raises:
        InputError: the file is of other settings.
    """
    how = {"threshold": threshold, "window": window, "val_every": val_every, "test": is_tested}
    if (kept := _kept(path, config, how)) is not None:
        return kept
    shared = replace(config, algorithm=AlgorithmOptions(), recipe="maml")  # one problem for all
    problem = _problem(shared)
    learner = build_learner(config, problem.input_shape, problem.outputs)
    course = _course(
        learner, problem, config, threshold=threshold, window=window, val_every=val_every
    )
    test = None
    if is_tested:
        test = learner.evaluate(problem.episodes["test"], config.test_tasks).as_dict()
    outcome = {
        "settings": to_dict(config),
        "how": how,
        "inner_lr": config.algorithm.inner_lr,
        "outer_lr": config.algorithm.outer_lr,
        **course,
        "test": test,
    }
    make_folder(path.parent)
    write_json(path, outcome)
    return outcome


def _course(
    learner: MetaLearner,
    problem: Problem,
    config: RunConfig,
    *,
    threshold: float | None,
    window: int,
    val_every: int,
) -> dict[str, Any]:
    """Train, and return what happened in each iteration and where it ended."""
    losses: list[float] = []
    rates: list[dict[str, float]] = []
    validation: list[tuple[int, float]] = []
    reached = broken = None
    for iteration in range(1, config.iterations + 1):
        try:
            metrics = learner.step(problem.episodes["train"].batch(
                (iteration - 1) * config.tasks, config.tasks
            ))  # fmt: skip
        except FloatingPointError:
            broken = iteration
            break
        losses.append(metrics.loss.item())
        found = learner.hypergradient_rates().items()
        rates.append({name: rate.item() for name, rate in found})
        mean = sum(losses[-window:]) / window
        if threshold is not None and iteration >= window and mean < threshold:
            reached = iteration
            break
        if val_every and (iteration % val_every == 0 or iteration == 1):
            episodes = problem.episodes["val"]
            scores = learner.evaluate(episodes, config.val_tasks, every_step=False)
            validation.append((iteration, float(scores.loss[:, -1].mean())))
    return {
        "reached": reached,
        "broken": broken,
        "losses": losses,
        "rates": rates,
        "validation": validation,
    }


def _kept(path: Path, config: RunConfig, how: dict[str, Any]) -> dict[str, Any] | None:
    """Return the outcome in a file; None if there is none, or half of one."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    held = found.get("how", {})
    for name, asked in how.items():
        check_equal(path, name, held.get(name), asked)
    check_same(path, found["settings"], config)
    found["validation"] = nan_for_null(found["validation"])
    if found["test"] is not None:
        found["test"]["mean"] = nan_for_null(found["test"]["mean"])
    return found
