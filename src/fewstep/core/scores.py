"""Scores of many tasks, with their interval."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.core.errors import InputError


def mean_and_ci95(of_tasks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over tasks, and the half width of its 95% interval.

    mean ± 1.96 s / sqrt(tasks), s the standard deviation over the tasks.

    Args:
        of_tasks: (tasks, ...).
    """
    x = of_tasks.double()
    return x.mean(0), 1.96 * x.std(0) / len(x) ** 0.5


@dataclass(frozen=True)
class Scores:
    """How well tasks were solved after some numbers of inner steps.

    Args:
        metric_name: "accuracy", "loss" or the name of the metric given to the learner.
        metric: Metric of every task, (tasks, len(after)).
        loss: Query loss of every task, (tasks, len(after)).
        statistics: What normalisation layers normalised by.
        after: The numbers of steps, the last of which is the final score's.
    """

    metric_name: str
    metric: Tensor
    loss: Tensor
    statistics: str
    after: tuple[int, ...]

    @property
    def num_tasks(self) -> int:
        """How many tasks were scored."""
        return self.metric.shape[0]

    @property
    def num_steps(self) -> int:
        """Inner steps before the final score."""
        return self.after[-1]

    @property
    def mean(self) -> float:
        """Mean of the final score."""
        return self.curve[-1]

    @property
    def ci95(self) -> float:
        """Half width of the 95% interval of `mean`."""
        return self.curve_ci95[-1]

    @property
    def curve(self) -> list[float]:
        """Mean metric after each number of steps in `after`."""
        return mean_and_ci95(self.metric)[0].tolist()

    @property
    def curve_ci95(self) -> list[float]:
        """Half widths of the 95% intervals of `curve`."""
        return mean_and_ci95(self.metric)[1].tolist()

    @property
    def rank(self) -> float:
        """The mean, turned so that more is better: a loss is better low, other metrics high."""
        return -self.mean if self.metric_name == "loss" else self.mean

    def as_dict(self) -> dict[str, object]:
        """Return the summary as plain values, for a JSON file."""
        return {
            "metric": self.metric_name,
            "mean": self.mean,
            "ci95": self.ci95,
            "num_tasks": self.num_tasks,
            "num_steps": self.num_steps,
            "after": list(self.after),
            "curve": self.curve,
            "curve_ci95": self.curve_ci95,
            "loss_curve": self.loss.double().mean(0).tolist(),
            "statistics": self.statistics,
            "per_task": [float(f"{value:.6g}") for value in self.metric[:, -1].tolist()],
        }

    def __str__(self) -> str:
        if self.metric_name == "accuracy":
            value = f"accuracy {100 * self.mean:.2f}% ± {100 * self.ci95:.2f}"
        else:
            value = f"{self.metric_name} {self.mean:.4g} ± {self.ci95:.2g}"
        return (
            f"{value} (95% interval; {self.num_tasks} tasks; {self.num_steps} inner steps; "
            f"normalisation statistics: {self.statistics})"
        )


@dataclass(frozen=True)
class Difference:
    """How far one way of solving tasks is above another on the same tasks.

    Args:
        mean: Mean of the tasks' differences.
        ci95: Half width of its 95% interval.
        above: Tasks with the higher metric.
        below: Tasks with the lower metric.
    """

    mean: float
    ci95: float
    above: int
    below: int

    @property
    def is_significant(self) -> bool:
        """Whether the 95% interval leaves out 0."""
        return abs(self.mean) > self.ci95


def paired_difference(metric: Tensor, baseline: Tensor) -> Difference:
    """Compare two ways of solving the same tasks, task by task.

    mean(d) ± 1.96 s_d / sqrt(tasks), with d_i = metric_i - baseline_i: narrower than what two
    separate intervals allow, as tasks that are hard for one are hard for the other.

    Args:
        metric: Metric of every task, (tasks,), such as `scores.metric[:, -1]`.
        baseline: The other's on the same tasks in the same order, (tasks,).

    Raises:
        InputError: they are not as many, or fewer than 2.
    """
    if metric.shape != baseline.shape or metric.ndim != 1 or len(metric) < 2:
        raise InputError(
            f"metrics of shapes {tuple(metric.shape)} and {tuple(baseline.shape)} are not of the "
            "same tasks, 2 or more; score both on as many"
        )
    d = metric.double() - baseline.double()
    mean, ci95 = mean_and_ci95(d)
    return Difference(float(mean), float(ci95), int((d > 0).sum()), int((d < 0).sum()))
