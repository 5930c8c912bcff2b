"""MAML's paper: sinusoids from a few points, against a network trained on all of them at once."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console

from fewstep.core.errors import check_at_least, check_names, check_some
from fewstep.core.learner import MetaLearner
from fewstep.core.scores import Scores
from fewstep.data.sinusoid import SinusoidEpisodes
from fewstep.experiments.seeds import (
    cell,
    earlier_rows,
    mean_seconds,
    over_seeds,
    rounded,
    seed_folder,
    spread,
)
from fewstep.experiments.sweep import complete_all, finished
from fewstep.experiments.write_up import write_up
from fewstep.report.figure import label_plainly, legend_below, new_figure, save_figure
from fewstep.report.sinusoid_fits import plot_sinusoid_fits
from fewstep.training.build import build_learner, resolve_device
from fewstep.training.config import Recipe, RunConfig
from fewstep.training.display import say
from fewstep.training.evaluate import Scoring
from fewstep.training.network_options import SinusoidMLPOptions
from fewstep.training.presets import preset
from fewstep.training.run_folder import RunFolder

PRETRAINED = "pretrained"
RECIPES: dict[str, tuple[Recipe, int]] = {  # and the steps of the test
    "MAML": ("maml", 10),
    "first-order MAML": ("fomaml", 10),
    "Meta-SGD": ("meta-sgd", 1),
    "MAML++": ("maml++", 5),
    PRETRAINED: ("maml", 10),
}
TUNED_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
SHOWN_STEPS = (0, 1, 5, 10)
PAPER = {  # after 1, 5 and 10 steps from 5 points
    "MAML": {1: 0.67, 5: 0.38, 10: 0.35},
    PRETRAINED: {1: 2.41, 5: 2.23, 10: 2.19},
}
PAPER_POINTS = 5
TESTS = (Scoring(),)
QUERIES = 100
VAL_TASKS = 200


@dataclass(frozen=True)
class MamlSinusoid:
    """The errors of sinusoids after 0 to 10 gradient steps, MAML against its baseline.

    Trained on 10 points and one step, tested on 5, 10 and 20. "pretrained" learns all sinusoids at
    once, without a step; its rate in the test is the best of six in validation, for each number of
    points, as the paper tunes it. MAML++, which has five steps, has the parts that need no batch
    norm. Where rates are learned, there are no more steps in the test than in training.
    """

    methods: tuple[str, ...] = tuple(RECIPES)
    """Rows of the table."""
    seeds: int = 3
    """Runs of each row."""
    iterations: int = 70_000
    """Outer updates of a run, of 25 tasks each."""
    points: tuple[int, ...] = (5, 10, 20)
    """Support points in the test."""
    hidden: int = 40
    """Units of each hidden layer."""
    val_every: int = 5_000
    """Iterations between validations."""
    test_tasks: int = 600
    """Tasks of the test."""
    compile: bool = False
    """Hand the recordings to torch.compile (needs a C++ compiler): three times faster."""
    workers: int = 1
    """Runs at once, a single-threaded process each."""
    ray: bool = False
    """Send the runs to a Ray cluster instead."""
    out: Path = Path("runs/maml-sinusoid")
    """Folder of the runs, the table and the figures; a second call goes on where one stopped."""
    device: str = "cpu"
    """"cpu", "cuda", ...; "auto" takes a GPU where there is one."""

    def run(self, console: Console) -> None:
        """Train what is not trained yet; write the table and the figures."""
        check_names("method", self.methods, RECIPES)
        check_some("points", self.points)
        check_at_least(1, seeds=self.seeds, points=min(self.points))
        check_at_least(2, test_tasks=self.test_tasks)
        device = resolve_device(self.device)
        plan = {
            self._path(method, seed): replace(self.config(method, seed), device=device)
            for seed in range(self.seeds)
            for method in self.methods
        }
        found = complete_all(plan, TESTS, console, workers=self.workers, ray=self.ray)
        if len(found) < len(plan):
            return
        others = {
            method: {
                self._path(method, seed): replace(self.config(method, seed), device=device)
                for seed in range(self.seeds)
            }
            for method in RECIPES
            if method not in self.methods
        }
        told = earlier_rows(others, lambda path, config: finished(path, config, TESTS), console)
        told |= {m: [found[self._path(m, s)] for s in range(self.seeds)] for m in self.methods}
        rows = {
            method: self._row(method, told[method], device) for method in RECIPES if method in told
        }
        plot_errors(rows, self.out / "errors.png")
        shown = self._learner(self.methods[0], 0, device)
        plot_sinusoid_fits(shown, self.out / "fits.png")
        write_up(
            self.out, device, console, ("table.json", {"rows": rows}),
            table=self._markdown(rows), pictures=["errors.png", "fits.png"],
        )  # fmt: skip
        run = quote(str(self._path(self.methods[0], 0)))
        say(console, f"next: fewstep evaluate {run} --shots 3   # from other numbers of points")

    def config(self, method: str, seed: int) -> RunConfig:
        """Return the settings of a run."""
        recipe, eval_steps = RECIPES[method]
        base = preset("sinusoid", recipe=recipe)
        num_steps = 0 if method == PRETRAINED else base.algorithm.num_steps
        return replace(
            base,
            model=SinusoidMLPOptions(self.hidden),
            algorithm=replace(base.algorithm, num_steps=num_steps, eval_steps=eval_steps),
            iterations=self.iterations,
            val_every=self.val_every,
            test_tasks=self.test_tasks,
            keep_best=1,
            compile=self.compile,
            seed=seed,
        )

    def _path(self, method: str, seed: int) -> Path:
        return seed_folder(self.out, method, seed)

    def _row(
        self, method: str, of_seeds: Sequence[list[dict[str, Any]]], device: str
    ) -> dict[str, Any]:
        """Return the errors of a method by support points and steps."""
        seconds = mean_seconds(of_seeds)
        tests = {}
        for points in self.points:
            learners = [self._tuned(method, s, points, device) for s in range(self.seeds)]
            steps = RECIPES[method][1]
            scores = [_scores(each, "test", points, self.test_tasks, steps) for each in learners]
            of_steps = zip(*(each.metric.T.tolist() for each in scores), strict=True)
            tests[points] = [_errors(of_step) for of_step in of_steps]
        return {"points": tests, "seconds_per_run": seconds}

    def _tuned(self, method: str, seed: int, points: int, device: str) -> MetaLearner:
        """Return the learner of a finished run, with the rate that suits its validation tasks."""
        if method != PRETRAINED:
            return self._learner(method, seed, device)
        learners = [self._learner(method, seed, device, rate) for rate in TUNED_RATES]
        steps = RECIPES[method][1]
        errors = [_scores(each, "val", points, VAL_TASKS, steps).mean for each in learners]
        finite = [e if math.isfinite(e) else math.inf for e in errors]
        return learners[finite.index(min(finite))]

    def _learner(
        self, method: str, seed: int, device: str, rate: float | None = None
    ) -> MetaLearner:
        """Return the learner of a finished run, with another inner rate if one is given."""
        run, config = RunFolder(self._path(method, seed)), self.config(method, seed)
        if rate is not None:
            config = replace(config, algorithm=replace(config.algorithm, inner_lr=rate))
        learner = build_learner(replace(config, device=device), (1,), 1)
        learner.load_state_tensors(run.load_checkpoint(run.kept("best")[0].name))
        return learner

    def _markdown(self, rows: Mapping[str, dict[str, Any]]) -> str:
        steps = " | ".join(str(k) for k in SHOWN_STEPS)
        lines = [
            f"Sinusoids, {self.iterations:,} iterations of 25 tasks of 10 points, "
            f"{self.hidden} units a layer, {self.seeds} seed{'s' * (self.seeds > 1)}, "
            f"{self.test_tasks} test tasks of {QUERIES} query points.",
            f"Mean squared error ± 95% interval over the test tasks{spread(self.seeds)}, "
            "by gradient steps.",
            "Where single tasks diverge, the median.",
        ]
        for points in self.points:
            lines += [
                "",
                f"| from {points} points | {steps} | s per run |",
                f"|---|{'---|' * (len(SHOWN_STEPS) + 1)}",
            ]
            for method, row in rows.items():
                errors = row["points"][points]
                cells = [_cell(errors[k]) if k < len(errors) else "" for k in SHOWN_STEPS]
                cells.append(rounded(row["seconds_per_run"]))
                lines.append(f"| {' | '.join([method, *cells])} |")
                if points == PAPER_POINTS and method in PAPER:
                    told = PAPER[method]
                    cells = [f"{told[k]:.2f}" if k in told else "" for k in SHOWN_STEPS]
                    lines.append(f"| {' | '.join([f'{method}, paper', *cells, ''])} |")
        return "\n".join(lines) + "\n"


def _scores(learner: MetaLearner, split: str, points: int, tasks: int, steps: int) -> Scores:
    device = next(learner.module.parameters()).device
    episodes = SinusoidEpisodes(split, shots=points, queries=QUERIES, device=device)
    return learner.evaluate(episodes, tasks, num_steps=steps)


def _errors(of_seeds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return what `over_seeds` does, and the median of all tasks of all seeds."""
    ordered = (error if math.isfinite(error) else math.inf for error in chain(*of_seeds))
    return over_seeds(of_seeds) | {"median": statistics.median(ordered)}


def _cell(value: Mapping[str, Any]) -> str:
    if not _says_something(value):
        return f"median {value['median']:.3g}"
    return cell(value, ".3g", ".2g")


def _says_something(value: Mapping[str, Any]) -> bool:
    """Whether a mean is above 0 by its interval: not where it is that of a task that diverges."""
    return bool(value["ci95"] < value["mean"])


def plot_errors(rows: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Draw the errors by gradient steps, a panel for each number of support points.

    Means that single tasks which diverge have made meaningless are left out.

    Args:
        rows: "points" of each method: by their number, the errors after 0, 1, ... steps.
        path: PNG file to write.
    """
    panels = list(next(iter(rows.values()))["points"])
    figure = new_figure(4 * len(panels), 4.2)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, points in zip(axes, panels, strict=True):
        for number, (method, row) in enumerate(rows.items()):
            errors = row["points"][points]
            shown = [k for k, error in enumerate(errors) if _says_something(error)]
            axis.errorbar(
                shown, [errors[k]["mean"] for k in shown], [errors[k]["ci95"] for k in shown],
                marker="o", markersize=3, capsize=2, label=method, color=f"C{number}",
            )  # fmt: skip
            if points == PAPER_POINTS and method in PAPER:
                axis.plot(
                    PAPER[method].keys(), PAPER[method].values(), "x", color=f"C{number}",
                    markersize=9, label=f"{method}, paper",
                )  # fmt: skip
        axis.set(yscale="log", xlabel="gradient steps", title=f"from {points} points")
        axis.grid(alpha=0.3)
    label_plainly(axes[0].yaxis)
    axes[0].set_ylabel("mean squared error, 95% interval")
    legend_below(figure, axes[0])
    save_figure(figure, path)
