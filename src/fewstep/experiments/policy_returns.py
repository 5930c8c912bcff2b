"""Returns of policies before and after gradient steps, MAML against the paper's baselines."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.console import Console

from fewstep.core.errors import check_at_least, check_names
from fewstep.core.rates import StepRates
from fewstep.experiments.policy_runs import (
    has_policy,
    told_by_policy,
    train_policy,
    trained_policy,
)
from fewstep.experiments.policy_settings import METHODS, PolicyRun, Setting
from fewstep.experiments.pool import each
from fewstep.experiments.seeds import (
    cell,
    earlier_rows,
    folder_name,
    over_seeds,
    seed_folder,
    spread,
)
from fewstep.experiments.write_up import write_up
from fewstep.report.figure import draw_band, legend_below, new_figure, save_figure
from fewstep.rl.rollouts import Rollouts
from fewstep.training.build import resolve_device

Numbers = Mapping[str, tuple[float, ...]]
SHOWN_TASKS = 4
Plan = dict[Path, tuple[Path, PolicyRun]]


@dataclass(frozen=True)
class PolicyReturns(ABC):
    """A table of returns, a row for each method, and figures of them."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Rows of the table."""
    seeds: int = 3
    """Runs of each row."""
    setting: Setting = field(default_factory=Setting)
    """What is learned, and how it is tested."""
    workers: int = 1
    """Runs at once, a single-threaded process each."""
    ray: bool = False
    """Send the runs to a Ray cluster instead."""
    out: Path | None = None
    """Folder of the runs, the table and the figures; a second call goes on where one stopped.
    runs/maml-PROBLEM if not given."""
    device: str = "cpu"
    """"cpu", "cuda", ...; "auto" takes a GPU where there is one."""

    @property
    @abstractmethod
    def problem(self) -> str:
        """One of PROBLEMS."""

    @property
    def folder(self) -> Path:
        """Folder of the runs, the table and the figures."""
        return self.out or Path(f"runs/maml-{folder_name(self.problem)}")

    @property
    @abstractmethod
    def paper(self) -> Numbers:
        """The paper's returns after 0, 1, ... steps, by the method."""

    @abstractmethod
    def draw(self, title: str, rollouts: Sequence[Rollouts]) -> Path:
        """Draw episodes of the first test tasks after 0, 1, ... steps; return the file."""

    def run(self, console: Console) -> None:
        """Train what is not trained yet; write the table and the figures."""
        check_names("method", self.methods, METHODS)
        check_at_least(1, seeds=self.seeds)
        device = resolve_device(self.device)
        runs = {
            method: {
                seed_folder(self.folder, method, seed): PolicyRun(
                    self.problem, method, seed, self.setting, device
                )
                for seed in range(self.seeds)
            }
            for method in METHODS
        }
        plan = {  # all methods of a seed before the next seed
            path: (path, run)
            for seed in zip(*(runs[method].items() for method in self.methods), strict=True)
            for path, run in seed
        }
        found = self._complete(plan, console)
        others = {method: runs[method] for method in METHODS if method not in self.methods}
        told = earlier_rows(others, told_by_policy, console)
        told |= {method: [found[path] for path in runs[method]] for method in self.methods}
        outcomes = {method: told[method] for method in METHODS if method in told}
        rows = {method: _row(of_seeds) for method, of_seeds in outcomes.items()}
        plot_returns(outcomes, self.paper, self.folder / "returns.png")
        pictures = ["returns.png"]
        kept = {m: row for m, row in rows.items() if has_policy(next(iter(runs[m])))}
        if (best := self._best(kept)) is not None:
            first = next(iter(runs[best].items()))
            pictures.append(self.draw(f"{best}, seed 0", self._rollouts(*first)).name)
        table, numbers = self._markdown(rows), ("table.json", {"rows": rows})
        write_up(self.folder, device, console, numbers, table=table, pictures=pictures)

    def _best(self, rows: Mapping[str, dict[str, Any]]) -> str | None:
        """Return the method that gives most after the steps it is trained for, if it has any."""
        returns = {
            name: row["steps"][min(METHODS[name].num_steps, self.setting.test_steps)]["mean"]
            for name, row in rows.items()
            if METHODS[name].num_steps
        }
        return max(returns, key=returns.__getitem__, default=None)

    def _rollouts(self, path: Path, run: PolicyRun) -> list[Rollouts]:
        """Return what the policy of a finished run does in the first test tasks."""
        return trained_policy(path, run).roll_out(
            run.tasks("test"),
            slice(0, SHOWN_TASKS),
            num_steps=min(2, self.setting.test_steps),
            inner_rate=StepRates(self.setting.test_lrs),
            episodes=self.setting.test_episodes,
        )

    def _complete(self, plan: Plan, console: Console) -> dict[Path, dict[str, Any]]:
        """Complete the runs, with a bar for each if it is one after the other, else for all."""
        is_alone = self.workers == 1 and not self.ray
        train = partial(train_policy, console=console) if is_alone else train_policy
        quiet = Console(quiet=True) if is_alone else console
        return dict(each(train, plan, workers=self.workers, ray=self.ray, console=quiet))

    def _markdown(self, rows: Mapping[str, dict[str, Any]]) -> str:
        setting, steps = self.setting, self.setting.test_steps
        seeds = f"{self.seeds} seed{'s' * (self.seeds > 1)}"
        lines = [
            f"{self.problem.capitalize()}, {setting.iterations} iterations of {setting.tasks} "
            f"tasks of {setting.episodes} episodes, {seeds}, {setting.test_tasks} test tasks.",
            f"Return ± 95% interval over the test tasks{spread(self.seeds)}, by gradient steps.",
            "",
            f"| method | {' | '.join(map(str, range(steps + 1)))} | s per run |",
            f"|---|{'---|' * (steps + 2)}",
        ]
        for method, row in rows.items():
            lines.append(_line(method, [*map(cell, row["steps"])], row["seconds"], steps))
        for method, returns in self.paper.items():
            numbers = [f"{number:.2f}" for number in returns[: steps + 1]]
            lines.append(_line(f"{method}, paper", numbers, None, steps))
        return "\n".join(lines) + "\n"


def _line(name: str, cells: list[str], seconds: float | None, steps: int) -> str:
    cells = cells + [""] * (steps + 1 - len(cells))
    return f"| {' | '.join([name, *cells, '' if seconds is None else f'{seconds:.0f}'])} |"


def _row(of_seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the seeds gave together after each number of steps."""
    of_tasks = [zip(*outcome["test"]["of_tasks"], strict=True) for outcome in of_seeds]
    return {
        "steps": [over_seeds(of_step) for of_step in zip(*of_tasks, strict=True)],
        "seconds": statistics.mean(o["seconds"] for o in of_seeds),
    }


def plot_returns(outcomes: Mapping[str, list[dict[str, Any]]], paper: Numbers, path: Path) -> None:
    """Draw the returns in validation over training, and those of the test by gradient steps.

    Args:
        outcomes: What `train_policy` returned for each seed, by the method.
        paper: The paper's returns by gradient steps, by the method.
        path: PNG file to write.
    """
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    for number, (method, of_seeds) in enumerate(outcomes.items()):
        color = f"C{number}"
        series = [{row[0]: row[1] for row in outcome["validation"]} for outcome in of_seeds]
        draw_band(left, series, method, color)
        steps = _row(of_seeds)["steps"]
        means, ci95 = [s["mean"] for s in steps], [s["ci95"] for s in steps]
        right.errorbar(
            range(len(means)), means, ci95, marker="o", markersize=4, capsize=3, label=method,
            color=color,
        )  # fmt: skip
    colors = {method: f"C{number}" for number, method in enumerate(outcomes)}
    for (method, returns), style in zip(paper.items(), cycle(("x--", "+:"))):
        right.plot(returns, style, color=colors.get(method, "0.5"), label=f"{method}, paper")
    several = ", band from the lowest to the highest seed" * (
        len(next(iter(outcomes.values()))) > 1
    )
    left.set(xlabel="iteration", ylabel="return after the steps of training")
    left.set_title(f"validation{several}")
    right.set(xlabel="gradient steps", ylabel="return", title="test, 95% interval")
    right.set_xticks(range(max(len(line.get_xdata()) for line in right.lines)))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    legend_below(figure, right)
    save_figure(figure, path)
