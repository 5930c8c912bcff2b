"""Scores of many tasks, with their interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from fewstep.core.errors import InputError


@lru_cache(maxsize=1024)
def t95(degrees: int) -> float:
    """Return what 5% of Student's t are beyond, on either side: 1.96 for many degrees of freedom.

    P(|t| < sqrt(n) tan(a)) = sin(a) (1 + 1/2 cos^2(a) + 1*3/(2*4) cos^4(a) + ...), to the power of
    n - 2, for even n; for odd n, 2/pi (a + sin(a) (cos(a) + 2/3 cos^3(a) + ...)).

    Args:
        degrees: Degrees of freedom, n; NaN comes of none.

    Source: Abramowitz and Stegun (1964), 26.7.3 and 26.7.4.
    """
    if degrees == 0:
        return math.nan
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _within(middle, degrees) < 0.95 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    is_odd, cos = degrees % 2, math.cos(angle)
    term, total = cos if is_odd else 1.0, 0.0
    for k in range(2 + is_odd, degrees + 1, 2):
        total += term
        term *= (k - 1) / k * cos**2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if is_odd else total


def mean_and_ci95(of_tasks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over tasks, and the half width of its 95% interval.

    mean ± t s / sqrt(tasks), s the standard deviation over the tasks, t of tasks - 1 degrees of
    freedom: 1.96 for many, 2.14 for 15.

    Args:
        of_tasks: (tasks, ...).
    """
    x = of_tasks.double()
    return x.mean(0), t95(len(x) - 1) * x.std(0) / len(x) ** 0.5


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

    mean(d) ± t s_d / sqrt(tasks), with d_i = metric_i - baseline_i and t as in `mean_and_ci95`:
    narrower than what two separate intervals allow, as tasks that are hard for one are hard for the
    other.

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
