"""What to do about unknown learning rates, on one budget of iterations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fewstep.core.errors import InputError, check_at_least, check_names
from fewstep.core.scores import mean_and_ci95
from fewstep.experiments.alpha_runs import Setting, train
from fewstep.experiments.pool import each
from fewstep.experiments.seeds import folder_name
from fewstep.experiments.write_up import write_up
from fewstep.training.build import resolve_device
from fewstep.training.config import RunConfig

CHANGES: dict[str, dict[str, Any]] = {
    "MAML": {},
    "random search": {},
    "Meta-SGD": {"learned_rates": "element"},
    "LSLR": {"learned_rates": "tensor"},
    "Alpha MAML": {"learned_rates": "one", "inner_hyper_lr": 0.01, "outer_hyper_lr": 0.01},
    "Alpha MAML, guarded": {
        "learned_rates": "one", "inner_hyper_lr": 0.1, "outer_hyper_lr": 0.1,
        "hyper_step": "multiplicative",
    },
    "Alpha MAML, sign": {
        "learned_rates": "one", "inner_hyper_lr": 0.02, "outer_hyper_lr": 0.02,
        "hyper_step": "sign",
    },
}  # fmt: skip


@dataclass(frozen=True)
class AlphaComparison:
    """Test accuracy of several remedies for unknown learning rates, at one budget of iterations.

    Each seed draws an initial alpha and beta, log-uniformly within bounds, that all methods start
    from; random search spends half of the budget on trials, of that start and of other draws, and
    half on training with the best.
    """

    setting: Setting = field(default_factory=Setting)
    """What is learned."""
    methods: tuple[str, ...] = tuple(CHANGES)
    """Rows of the table."""
    bounds: tuple[float, float] = (0.001, 10.0)
    """Least and greatest initial rate, of both."""
    seeds: int = 10
    """Draws of initial rates, parameters and episodes."""
    iterations: int = 500
    """Outer updates that a method may spend."""
    trials: int = 8
    """Draws of the random search."""
    val_tasks: int = 50
    """Tasks by which it chooses."""
    test_tasks: int = 200
    """Tasks of the test."""
    workers: int = 1
    """Methods and seeds at once, a single-threaded process each."""
    ray: bool = False
    """Send them to a Ray cluster instead."""
    out: Path = Path("runs/alpha-comparison")
    """Folder of the outcomes and the table; a second call goes on where one stopped."""

    def run(self, console: Console) -> None:
        """Train what is not trained yet; write the table."""
        check_names("method", self.methods, CHANGES)
        if not 1 <= self.trials <= self.iterations // 2:
            raise InputError(
                f"trials={self.trials} must be at least 1 and at most half of "
                f"iterations={self.iterations}, an iteration each"
            )
        check_at_least(2, "to give an interval", seeds=self.seeds)
        if not 0 < self.bounds[0] < self.bounds[1] < math.inf:
            raise InputError(f"bounds={self.bounds} must be positive and in order")
        device = resolve_device(self.setting.device)
        own = replace(self, setting=replace(self.setting, device=device))
        jobs = {(m, seed): (own, m, seed) for m in self.methods for seed in range(self.seeds)}
        found = dict(each(spend, jobs, workers=self.workers, ray=self.ray, console=console))
        accuracies = {m: [found[m, seed] for seed in range(self.seeds)] for m in self.methods}
        summary = {
            "initial_rates": [draw(self.bounds, seed, 0) for seed in range(self.seeds)],
            "test_accuracy": accuracies,
        }
        table = self._markdown(accuracies)
        write_up(self.out, device, console, ("comparison.json", summary), table=table)

    def config(self, method: str, alpha: float, beta: float, seed: int) -> RunConfig:
        """Return the settings of a method from given initial rates."""
        config = replace(self.setting, seed=seed).config(alpha, beta, None, None)
        return replace(
            config,
            algorithm=replace(config.algorithm, **CHANGES[method]),
            iterations=self.iterations,
            val_tasks=self.val_tasks,
            test_tasks=self.test_tasks,
        )

    def _markdown(self, accuracies: dict[str, list[float]]) -> str:
        s = self.setting
        best = max(accuracies, key=lambda method: statistics.mean(accuracies[method]))
        lines = [
            f"{s.dataset} {s.ways}-way {s.shots}-shot, Conv4-{s.filters}, 1 step, SGD outside,",
            f"{self.iterations} iterations of {s.tasks} tasks for each method, {self.seeds} draws",
            f"of both rates within {self.bounds[0]:g} and {self.bounds[1]:g}. Test accuracy in %,",
            "95% interval over the draws; the last column is paired by draw.",
            "",
            "| method | mean | median | worst | behind the best row |",
            "|---|---|---|---|---|",
        ]
        for method, values in accuracies.items():
            behind = [a - b for a, b in zip(accuracies[best], values, strict=True)]
            mean, lag = interval(values), "-" if method == best else interval(behind)
            median, worst = 100 * statistics.median(values), 100 * min(values)
            lines.append(f"| {method} | {mean} | {median:.1f} | {worst:.1f} | {lag} |")
        return "\n".join(lines) + "\n"


def interval(values: Sequence[float]) -> str:
    """Return the mean in % with its 95% interval."""
    mean, half = mean_and_ci95(100 * torch.tensor(values, dtype=torch.float64))
    return f"{mean:.1f} ± {half:.1f}"


def draw(bounds: tuple[float, float], seed: int, number: int) -> tuple[float, float]:
    """Return alpha and beta, log-uniform within bounds; draw 0 is where every method starts."""
    generator = torch.Generator().manual_seed(1000 * seed + number)
    low, high = map(math.log, bounds)
    alpha, beta = (low + (high - low) * torch.rand(2, generator=generator)).exp().tolist()
    return alpha, beta


def spend(options: AlphaComparison, method: str, seed: int) -> float:
    """Spend a method's budget; return the test accuracy.

    Args:
        options: The comparison.
        method: Its row.
        seed: Its draw.
    """
    alpha, beta = draw(options.bounds, seed, 0)
    folder = options.out / "outcomes" / folder_name(method)
    iterations = options.iterations
    if method == "random search":
        iterations = options.iterations // 2
        length = iterations // options.trials
        losses = {}
        for trial in range(options.trials):
            rates = draw(options.bounds, seed, trial)
            config = replace(options.config(method, *rates, seed), iterations=length)
            path = folder / f"seed{seed}-trial{trial}.json"
            outcome = train(path, config, val_every=length)
            loss = outcome["validation"][-1][1] if outcome["validation"] else math.inf
            is_whole = outcome["broken"] is None and math.isfinite(loss)
            losses[rates] = loss if is_whole else math.inf
        alpha, beta = min(losses, key=lambda rates: losses[rates])
    config = replace(options.config(method, alpha, beta, seed), iterations=iterations)
    outcome = train(folder / f"seed{seed}.json", config, is_tested=True)
    accuracy: float = outcome["test"]["mean"]
    return accuracy
